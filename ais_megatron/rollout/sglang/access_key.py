"""The key that requests to our servers must carry: a file that only its owner can read, named by rollout.sglang.key_file."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

KEY_BYTES = 32


def read_or_create_key(path: str | Path) -> str:
    """The key in the file, which is made with a random one if there is none. Whoever calls first decides, the others read.

    Raises:
        ValueError: others can read the file, it is empty, or it can be neither read nor made.
    """
    path = Path(path)
    try:
        if not path.exists():
            _create(path)
        if path.stat().st_mode & 0o077:
            raise ValueError(
                f"rollout.sglang.key_file={path}: other users can read it; run `chmod 600 {path}`, or delete it to have a new key made"
            )
        key = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(f"rollout.sglang.key_file={path}: cannot be read or made ({error}); name a file that you may write") from error
    if not key:
        raise ValueError(f"rollout.sglang.key_file={path}: is empty; delete it to have a key made, or write one into it")
    return key


def _create(path: Path) -> None:
    """Make the file appear whole: a hard link fails where the name exists, so two processes never see different keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")  # mode 0600
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(secrets.token_urlsafe(KEY_BYTES) + "\n")
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(temporary)


def authorization(key: str | None) -> dict[str, str]:
    """The HTTP header that carries `key`; empty without one."""
    return {"Authorization": f"Bearer {key}"} if key else {}
