"""Reads tensors from a Hugging Face checkpoint folder with safetensors, one file or many.

A checkpoint of a model that also sees images has its language model under ``model.language_model.``. Here its tensors have the names that
the language model has alone, and all others are left aside.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

_NESTED = "model.language_model."
_OTHERS = ("model.visual.", "visual.", "mtp.")


class HFReader:
    """The tensors of a checkpoint folder.

    Raises:
        ValueError: there is no safetensors file, or a file cannot be read, or there is no language model. The message names it.
    """

    files: dict[str, str]
    """The file of each tensor."""
    left_aside: list[str]
    """Names of the tensors that are not the language model's, such as those of a vision tower."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if index.is_file():
            try:
                stored: dict[str, str] = json.loads(index.read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError) as error:
                raise ValueError(f"model.path={folder}: {index.name} is not a safetensors index ({error!r})") from error
        elif single.is_file():
            with self.open(single.name) as file:
                stored = dict.fromkeys(file.keys(), single.name)
        else:
            raise ValueError(
                f"model.path={folder}: the folder has neither {single.name} nor {index.name}; give a Hugging Face checkpoint with "
                "safetensors"
            )
        self.left_aside = [name for name in stored if name.startswith(_OTHERS)]
        names = {name.replace(_NESTED, "model.", 1): name for name in stored if not name.startswith(_OTHERS)}
        if not names:
            raise ValueError(
                f"model.path={folder}: has no language model, only {len(stored)} tensors such as {next(iter(stored), 'none')}; give a "
                "checkpoint whose tensors begin with model.layers. or model.language_model."
            )
        self._stored_names = names
        self.files = {name: stored[in_file] for name, in_file in names.items()}

    def stored_name(self, name: str) -> str:
        """The name of a tensor in its file."""
        return self._stored_names[name]

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
            tensor: Tensor = file.get_tensor(self.stored_name(name))
        return tensor
