"""The files of a run's ``checkpoints`` folder: which checkpoints are complete, which may be deleted, and whether any is damaged.

A checkpoint is written as ``step_000120.partial``. The manifest, ``{file: {"bytes": size, "sha256": digest}}``, is written last.
Then the folder gets its final name. So a folder with a final name and a manifest is complete, unless the disk damages it later.
Nothing here needs torch or a collective. `policy.saver` decides which rank calls what.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from ais_megatron.runs.folder import write_json_atomic

MANIFEST_FILE = "manifest.json"
PARTIAL, DAMAGED = ".partial", ".damaged"
_NAME = re.compile(r"step_(\d{6,})")

Entries = dict[str, dict[str, int | str]]


def folder_of(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step_{step:06d}"


def step_of(folder: Path) -> int:
    found = _NAME.fullmatch(folder.name)
    assert found, f"{folder}: not the name of a checkpoint"
    return int(found[1])


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """The complete checkpoints in a run's ``checkpoints`` folder, oldest first."""
    found = (path.parent for path in checkpoints.glob(f"step_*/{MANIFEST_FILE}"))
    return sorted((folder for folder in found if _NAME.fullmatch(folder.name)), key=step_of)


def newest(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint in a run's ``checkpoints`` folder, or None."""
    found = complete_checkpoints(checkpoints)
    return found[-1] if found else None


def entries(folder: Path, names: Iterable[str]) -> Entries:
    """The manifest's entries for the files `names` in `folder`, from reading the files."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": _digest(folder / name)} for name in names}


def write_manifest(folder: Path, listed: Entries) -> None:
    """Write the manifest, the last file of a checkpoint. Files that are not in `listed` are read here."""
    others = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - listed.keys()
    write_json_atomic(folder / MANIFEST_FILE, {"files": dict(sorted({**listed, **entries(folder, others)}.items()))})


def put_in_place(partial: Path, folder: Path) -> None:
    """Give a complete checkpoint its final name."""
    if folder.exists():
        _delete(folder)
    partial.rename(folder)
    handle = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(handle)  # a rename survives a crash of the machine only after its parent folder is on the disk
    finally:
        os.close(handle)


def prune(checkpoints: Path, keep: int, keep_every: int) -> None:
    """Delete all checkpoints except the newest `keep` and those whose step is a multiple of `keep_every`."""
    for folder in complete_checkpoints(checkpoints)[:-keep]:
        if not keep_every or step_of(folder) % keep_every:
            _delete(folder)


def sweep(checkpoints: Path) -> list[str]:
    """Delete folders that a killed run left half-written or half-deleted. Returns their names."""
    left = sorted(checkpoints.glob(f"step_*{PARTIAL}"))
    for folder in left:
        shutil.rmtree(folder)
    return [folder.name for folder in left]


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint. It is then neither loaded nor counted, but can still be inspected."""
    aside = folder.with_name(folder.name + DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def verify(folder: Path, checksums: bool, part: int = 0, parts: int = 1) -> None:
    """Compare the files of `folder` with its manifest: all names and sizes, and the checksum of every `parts`-th file.

    Raises:
        ValueError: a file is missing or differs; the message names it.
    """
    listed = _read_manifest(folder)
    for number, (name, written) in enumerate(listed.items()):
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path}: missing, although the checkpoint's {MANIFEST_FILE} lists it")
        size = path.stat().st_size
        if size != written["bytes"]:
            raise ValueError(f"{path}: damaged, has {size} bytes, but {written['bytes']} were written")
        if checksums and number % parts == part and _digest(path) != written["sha256"]:
            raise ValueError(f"{path}: damaged, its contents differ from what was written (sha256)")


def _read_manifest(folder: Path) -> Entries:
    path = folder / MANIFEST_FILE
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {name: {"bytes": int(entry["bytes"]), "sha256": str(entry["sha256"])} for name, entry in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged, not a manifest ({error})") from error


def _delete(folder: Path) -> None:
    """Rename the folder first, so that a kill in between cannot leave a folder that looks complete."""
    going = folder.with_name(folder.name + ".deleted" + PARTIAL)
    shutil.rmtree(going, ignore_errors=True)
    shutil.rmtree(folder.rename(going))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
