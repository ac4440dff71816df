"""Reads or creates the access key that every request to our servers must carry. It is in the file rollout.sglang.key_file."""

from __future__ import annotations

import os
import secrets
import tempfile
from pathlib import Path

KEY_BYTES = 32


def read_or_create_key(path: str | Path) -> str:
    """The key in the file. If there is no file, the first caller creates it with a random key, and later callers read it.

    Raises:
        ValueError: other users can read the file, it is empty, or it can be neither read nor created.
    """
    path = Path(path)
    try:
        if not path.exists():
            _create(path)
        if path.stat().st_mode & 0o077:
            raise ValueError(
                f"rollout.sglang.key_file={path}: other users can read it; run `chmod 600 {path}`, or delete it, and a new key is created"
            )
        key = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ValueError(f"rollout.sglang.key_file={path}: cannot be read or created ({error}); name a file that you may write") from error
    if not key:
        raise ValueError(f"rollout.sglang.key_file={path}: is empty; delete it, and a key is created, or write a key into it")
    return key


def _create(path: Path) -> None:
    """Create the file in one step. A hard link fails if the name exists, so two processes never see different keys."""
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
    """The HTTP header with `key`; empty without a key."""
    return {"Authorization": f"Bearer {key}"} if key else {}
