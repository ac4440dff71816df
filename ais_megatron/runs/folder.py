"""The run folder records what a run was. A kill at any moment leaves no half-written file in it.

``config.yaml`` holds the resolved configuration, below comment lines with the date, the git revision of the code and the package
versions. `load_config(run_dir / "config.yaml")` starts the same experiment again. Files are replaced as a whole: a new file is
written beside the old one, synced and renamed. Only ``metrics.jsonl`` and ``evaluations.jsonl`` grow, by one line per step, and per set
of every evaluation (see `metrics.Sinks`).
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
EVALUATIONS_FILE = "evaluations.jsonl"
SUMMARY_FILE = "summary.json"

# Packages whose version can change a result. Those that are not installed are not recorded.
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

    Only the main rank reads or writes here. If every rank looked for an earlier run, a slow rank would find the
    ``metrics.jsonl`` that the main rank has just begun. The caller tells the other ranks about an error. If a resumed run has
    another configuration, revision or versions, the earlier file is kept as ``config.1.yaml`` and so on.

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
    """Make the checks of `open_run_folder` before any rank starts. Creates nothing.

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
            f"run.dir={config.run.dir}: already holds a run ({METRICS_FILE}); choose another run.dir, delete this folder, or set "
            "run.resume=true to continue the run"
        )


def _unusable(config: Config, error: OSError) -> ConfigError:
    return ConfigError(f"run.dir={config.run.dir}: cannot be used as a run folder ({error}); choose another run.dir")


def config_of(run: Path) -> Path:
    """The configuration in the run folder `run`; ConfigError if the folder is not one."""
    if not (run / CONFIG_FILE).is_file():
        raise ConfigError(f"RUN={run}: is not a run folder, because it has no {CONFIG_FILE}; give the run.dir of a run")
    return run / CONFIG_FILE


def check_export_folder(folder: Path) -> None:
    """Check the folder of an export before a model is loaded. Creates nothing.

    Raises:
        ConfigError: the folder exists and is not empty, or it cannot be written.
    """
    try:
        check_can_create(folder)
        is_empty = not folder.exists() or not any(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"OUT={folder}: cannot be written ({error}); choose another folder") from error
    if not is_empty:
        raise ConfigError(f"OUT={folder}: exists and is not empty; choose another folder, or empty it")


def check_output_file(option: str, path: Path) -> None:
    """Check that a command will be able to write `path`, before it works for it. Creates nothing.

    Raises:
        ConfigError: it is a folder, or nothing can be written where it shall lie.
    """
    try:
        check_can_create(path.parent)
    except OSError as error:
        raise ConfigError(f"{option}={path}: cannot be written ({error}); choose another file") from error
    if path.is_dir():
        raise ConfigError(f"{option}={path}: is a folder; name a file")


def check_can_create(folder: Path) -> None:
    """Check that `folder` can be written, or can be created with its parents. Leaves nothing behind.

    Raises:
        OSError: something on the path is not a folder, or no file can be created there.
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
    # Permissions are not enough. A file system may be read-only or full, or allow no files even for root, like /proc.
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise OSError(f"no file can be created in {nearest}: {error.strerror}") from error


def _write_config(path: Path, text: str) -> None:
    if path.exists():
        earlier = path.read_text(encoding="utf-8")
        if _without_date(earlier) == _without_date(text):
            return  # a requeued job keeps the date of its first start
        number = 1
        while (kept := path.with_name(f"config.{number}.yaml")).exists():
            number += 1
        write_text_atomic(kept, earlier)
    write_text_atomic(path, text)


def _without_date(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.startswith(_DATE_PREFIX)]


def _provenance() -> str:
    """Date, git revision and versions as YAML comments, which are for readers and not loaded."""
    lines = [f"{_DATE_PREFIX} {datetime.now(UTC).isoformat(timespec='seconds')}", f"# git revision: {git_revision()}"]
    lines += [f"# {name}: {version}" for name, version in package_versions().items()]
    return "\n".join(lines) + "\n"


def git_revision(folder: Path = _PACKAGE_FOLDER) -> str:
    """Commit hash of the code in `folder`, with ``+dirty`` if files there are changed or new; ``unknown`` outside git.

    An installed copy may lie inside another repository, for example in a virtual environment in its checkout. Files that the
    repository does not track are therefore ``unknown`` too. Only changes in `folder` count as dirty, because configurations,
    notes and run folders do not change what the code does.
    """
    revision = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--", ".")
    if not revision or changes is None or not _git(folder, "ls-files", "--", "."):
        return "unknown"
    return revision + ("+dirty" if changes else "")


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of one git command, or None if git is missing, fails or hangs."""
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
    """Strict JSON with floats at full precision. NaN and infinity become null, because JSON does not have them."""
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
    """Replace the content of `path` by `text` (UTF-8). At any moment the file is complete, either the old one or the new one."""
    path = Path(path)
    # The temporary file is in the same folder, because a rename is atomic only within one file system.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            # mkstemp creates private files, but a run folder has the usual permissions of its owner's files.
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
