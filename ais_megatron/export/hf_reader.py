"""Reads tensors from a Hugging Face checkpoint folder with safetensors, one file or many."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor


class HFReader:
    """The tensors of a checkpoint folder.

    Raises:
        ValueError: there is no safetensors file, or a file cannot be read. The message names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if index.is_file():
            try:
                self.files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError) as error:
                raise ValueError(f"model.path={folder}: {index.name} is not a safetensors index ({error!r})") from error
        elif single.is_file():
            with self.open(single.name) as file:
                self.files = dict.fromkeys(file.keys(), single.name)
        else:
            raise ValueError(
                f"model.path={folder}: the folder has neither {single.name} nor {index.name}; give a Hugging Face checkpoint with "
                "safetensors"
            )

    def open(self, name: str) -> Any:  # safetensors has no public type for its handle
        """The handle of a file, as a context manager."""
        path = self.folder / name
        if not path.is_file():
            raise ValueError(f"model.path={self.folder}: the index names {name}, but there is no such file")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"model.path={self.folder}: cannot read {name}: {error}") from error

    def read(self, name: str) -> Tensor:
        """A whole tensor.

        Raises:
            ValueError: there is none of this name, or its file cannot be read.
        """
        if name not in self.files:
            raise ValueError(f"model.path={self.folder}: tensor {name} is missing; is this a checkpoint of another architecture?")
        with self.open(self.files[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor
