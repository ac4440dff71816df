"""Writes weights as a Hugging Face folder that transformers and SGLang load: safetensors shards, their index, and the configuration.

A safetensors file is the length of its header (8 bytes, little-endian), the header (JSON with dtype, shape and place of each tensor) and
the tensors' bytes. The architecture says all names and shapes beforehand. So the shards are planned first, and every tensor is written to
its place as soon as it exists. Only this tensor is in memory, never a whole shard.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from ais_megatron.config import Architecture
from ais_megatron.config.hf_config import generation_config, hf_config
from ais_megatron.models import family

SHARD_BYTES = 5 * 10**9
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"bf16": ("BF16", torch.bfloat16), "fp32": ("F32", torch.float32)}
_ALIGNMENT = 8  # of a file's first tensor


@dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    file: str
    offset: int
    """Its first byte, counted from the beginning of the file."""
    shape: tuple[int, ...]


class HFFolder:
    """The weights of a model in `folder`, which is created. `write` takes the tensors in any order, and `finish` completes the folder.

    Args:
        dtype: "bf16" or "fp32", the precision of the files.
        shard_bytes: the most bytes of tensors in one file. A tensor that is larger has a file of its own.
    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, architecture: Architecture, dtype: str, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder, self._architecture, self._dtype = folder, architecture, dtype
        folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[str, Place] = {}
        self._missing: set[str] = set()
        shards = _shards(architecture, itemsize(dtype), shard_bytes)
        names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
        for name, shard in zip(["model.safetensors"] if len(shards) == 1 else names, shards, strict=True):
            self._begin(name, shard)

    def _begin(self, file: str, shard: dict[str, tuple[int, ...]]) -> None:
        """Write the header of a file, and give the file its final size."""
        kind, size = _DTYPES[self._dtype][0], itemsize(self._dtype)
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end, starts = 0, {}
        for name, shape in shard.items():
            starts[name] = end
            end += size * prod(shape)
            entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [starts[name], end]}
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % _ALIGNMENT)
        with (self._folder / file).open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(8 + len(header) + end)
        self._places |= {name: Place(file, 8 + len(header) + starts[name], shape) for name, shape in shard.items()}
        self._missing |= shard.keys()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one whole tensor under its Hugging Face name.

        Raises:
            OSError: the file cannot be written.
        """
        place = self._places[name]
        assert tuple(tensor.shape) == place.shape, f"{name}: has shape {tuple(tensor.shape)}, not {place.shape}"
        flat = tensor.detach().to("cpu", _DTYPES[self._dtype][1]).contiguous().view(-1).view(torch.uint8)
        with (self._folder / place.file).open("r+b") as stream:
            stream.seek(place.offset)
            stream.write(flat.numpy().data)
        self._missing.discard(name)

    def finish(self, *, eos_ids: Sequence[int] = (), pad_id: int | None = None) -> None:
        """Write the index and the configuration after the last tensor, and wait until the weights are on the disk."""
        assert not self._missing, f"these tensors were not written: {sorted(self._missing)}"
        files = {name: place.file for name, place in self._places.items()}
        for file in sorted(set(files.values())):
            with (self._folder / file).open("r+b") as stream:
                os.fsync(stream.fileno())
        if len(set(files.values())) > 1:
            total = itemsize(self._dtype) * sum(prod(place.shape) for place in self._places.values())
            self._write_json(INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": files})
        self._write_json("config.json", hf_config(self._architecture, self._dtype, eos_ids, pad_id))
        self._write_json("generation_config.json", generation_config(eos_ids, pad_id))

    def _write_json(self, name: str, content: dict[str, object]) -> None:
        (self._folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def itemsize(dtype: str) -> int:
    """Bytes of one number; dtype: "bf16" or "fp32"."""
    return _DTYPES[dtype][1].itemsize


def total_bytes(architecture: Architecture, dtype: str) -> int:
    """Bytes of all tensors of an exported model."""
    return itemsize(dtype) * sum(prod(shape) for shape in _tensors(architecture).values())


def _tensors(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an exported model. A tied head is the embedding, and is not written twice."""
    skipped = {family.HEAD.name} if architecture.tie_word_embeddings else set()
    return {tensor.name: tensor.shape for tensor in family.tensors_of(architecture) if tensor.name not in skipped}


def _shards(architecture: Architecture, itemsize: int, shard_bytes: int) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each file."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in _tensors(architecture).items():
        size = itemsize * prod(shape)
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    return shards
