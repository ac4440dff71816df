"""The run folder: everything needed to say later what a run was, written so that a kill leaves no half-written file.

``config.yaml`` holds the resolved configuration below comment lines with the date, the git revision of the code and the
package versions, so that `load_config(run_dir / "config.yaml")` starts the same experiment again. Files are replaced
whole (write beside, fsync, rename); only ``metrics.jsonl`` grows, one line per step (see `metrics.Sinks`).
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import tempfile
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from ais_megatron.config import Config, ConfigError, dump_config

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"

# Distributions whose version can change a result; those that are not installed are left out of the record.
RECORDED_PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "transformers",
    "sglang",
    "sentencepiece",
    "safetensors",
    "numpy",
    "omegaconf",
    "pydantic",
)
_DATE_PREFIX = "# date:"
_PACKAGE_FOLDER = Path(__file__).resolve().parents[1]


def open_run_folder(config: Config, is_main: bool) -> Path:
    """Create ``run.dir`` with its ``config.yaml`` and return it.

    Only the main rank touches the disk: were every rank to look for an earlier run, a slow one would find the
    ``metrics.jsonl`` that the main rank has just begun. The caller makes the main rank's error known to the others.
    A resumed run whose record differs (configuration, revision or versions) keeps the earlier one as ``config.1.yaml``, ...

    Raises:
        ConfigError: ``run.dir`` holds a run and ``run.resume`` is false, or the folder cannot be written.
    """
    folder = Path(config.run.dir)
    if not is_main:
        return folder
    check_run_folder(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_config(folder / CONFIG_FILE, _provenance() + dump_config(config))
    except OSError as error:
        raise _unusable(config, error) from error
    return folder


def check_run_folder(config: Config) -> None:
    """Refuse at once what `open_run_folder` would refuse once the ranks run. Creates nothing.

    Raises:
        ConfigError: as `open_run_folder`.
    """
    folder = Path(config.run.dir)
    try:
        check_can_create(folder)
        holds_a_run = (folder / METRICS_FILE).exists()
    except OSError as error:
        raise _unusable(config, error) from error
    if holds_a_run and not config.run.resume:
        raise ConfigError(
            f"run.dir={config.run.dir}: already holds a run ({METRICS_FILE}); choose another run.dir, delete it, or set run.resume=true"
        )


def _unusable(config: Config, error: OSError) -> ConfigError:
    return ConfigError(f"run.dir={config.run.dir}: cannot be used as a run folder ({error}); choose another run.dir")


def check_export_folder(folder: Path) -> None:
    """Refuse a place for an export before a model is loaded. Creates nothing.

    Raises:
        ConfigError: it exists and is not empty, or it cannot be written.
    """
    try:
        check_can_create(folder)
        is_empty = not folder.exists() or not any(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"OUT={folder}: cannot be written ({error}); choose another folder") from error
    if not is_empty:
        raise ConfigError(f"OUT={folder}: exists and is not empty; choose another folder, or empty it")


def check_can_create(folder: Path) -> None:
    """Whether `folder` is there and can be written, or could be made with its parents. Leaves nothing behind.

    Raises:
        OSError: it cannot: something that is not a folder lies in the way, or no file can be made where it would be.
    """
    nearest = folder.absolute()
    while True:
        try:
            nearest.lstat()
            break
        except (FileNotFoundError, NotADirectoryError):
            nearest = nearest.parent
    if not nearest.is_dir():
        raise NotADirectoryError(f"{nearest} is not a folder")
    # Permissions alone do not tell: a file system may be read-only, full, or one like /proc that takes no files even from root.
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise OSError(f"no file can be made in {nearest}: {error.strerror}") from error


def _write_config(path: Path, text: str) -> None:
    if path.exists():
        earlier = path.read_text(encoding="utf-8")
        if _without_date(earlier) == _without_date(text):
            return  # a requeued job: the date of the first start is the one worth keeping
        number = 1
        while (kept := path.with_name(f"config.{number}.yaml")).exists():
            number += 1
        write_text_atomic(kept, earlier)
    write_text_atomic(path, text)


def _without_date(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith(_DATE_PREFIX)]


def _provenance() -> str:
    """What produced the run, as YAML comments: they inform the reader and never the loader."""
    lines = [f"{_DATE_PREFIX} {datetime.now(UTC).isoformat(timespec='seconds')}", f"# git revision: {git_revision()}"]
    lines += [f"# {name}: {version}" for name, version in package_versions().items()]
    return "\n".join(lines) + "\n"


def git_revision(folder: Path = _PACKAGE_FOLDER) -> str:
    """Commit hash of the code in `folder`, with ``+dirty`` when files there are changed or new; ``unknown`` outside git.

    An installed copy may lie inside somebody else's repository (a virtual environment in a checkout), so files that
    repository does not track are ``unknown`` too. Only `folder` counts as dirty or clean: the rest (configs, notes, run
    folders) does not change what the code does.
    """
    revision = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--", ".")
    if not revision or changes is None or not _git(folder, "ls-files", "--", "."):
        return "unknown"
    return revision + ("+dirty" if changes else "")


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of one git command, or None where git is missing, refuses or hangs."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def package_versions() -> dict[str, str]:
    """Versions of Python and of the installed `RECORDED_PACKAGES`, in that order."""
    versions = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def encode_json(obj: Any, indent: int | None = None) -> str:
    """Strict JSON: floats at full precision, and NaN or infinity as null, for which JSON has no word."""
    return json.dumps(_finite(obj), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(obj: Any) -> Any:
    if isinstance(obj, float):
        return obj if math.isfinite(obj) else None
    if isinstance(obj, dict):
        return {key: _finite(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple):
        return [_finite(value) for value in obj]
    return obj


def write_json_atomic(path: Path, obj: Any) -> None:
    """Write `obj` as indented `encode_json`; see `write_text_atomic`."""
    write_text_atomic(path, encode_json(obj, indent=2) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text` (UTF-8): a reader, or a kill at any moment, finds the old file or the new one, whole."""
    path = Path(path)
    # The temporary file lies beside its target because a rename is atomic only within one file system.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            # mkstemp makes files private; a run folder is shared like any other file of its owner.
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    umask = os.umask(0o022)
    os.umask(umask)
    return umask
