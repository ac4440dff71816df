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
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ais_megatron.config import Architecture
from ais_megatron.config.hf_config import generation_config, hf_config
from ais_megatron.models import family

SHARD_BYTES = 5 * 10**9
INDEX_FILE = "model.safetensors.index.json"
FLOAT32 = "F32", torch.float32
_DTYPES = {"bf16": ("BF16", torch.bfloat16), "fp32": FLOAT32}
_ALIGNMENT = 8  # of a file's first tensor


class Kind(NamedTuple):
    """Shape and precision of a tensor in a file."""

    shape: tuple[int, ...]
    code: str
    """The name of its dtype in safetensors."""
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * prod(self.shape)


class Projections(Protocol):
    """A layout of a quantised model's projections (`quantized`)."""

    def kinds(self, name: str, shape: tuple[int, ...]) -> dict[str, Kind]:
        """The tensors that stand for the projection ``X.weight`` of this shape, in order."""

    def tensors(self, name: str, weight: Tensor) -> list[tuple[str, Tensor]]:
        """The same tensors with their values. Raises ValueError if the weight cannot be quantised."""

    def config(self, architecture: Architecture) -> dict[str, object]:
        """``quantization_config`` of the model's config.json."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    file: str
    offset: int
    """Its first byte, counted from the beginning of the file."""
    kind: Kind


class HFFolder:
    """The weights of a model in `folder`, which is created. `write` takes the tensors in any order, and `finish` completes the folder.

    Args:
        dtype: "bf16" or "fp32", the precision of the files.
        shard_bytes: the most bytes of tensors in one file. A tensor that is larger has a file of its own.
        projections: the layout of a quantised model's projections; None: they are written like all others.
    Raises:
        OSError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        architecture: Architecture,
        dtype: str,
        shard_bytes: int = SHARD_BYTES,
        projections: Projections | None = None,
    ) -> None:
        self._folder, self._architecture, self._dtype, self._projections = folder, architecture, dtype, projections
        folder.mkdir(parents=True, exist_ok=True)
        self._places: dict[str, Place] = {}
        self._missing: set[str] = set()
        shards = _shards(_tensors(architecture, dtype, projections), shard_bytes)
        names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
        for name, shard in zip(["model.safetensors"] if len(shards) == 1 else names, shards, strict=True):
            self._begin(name, shard)

    def _begin(self, file: str, shard: dict[str, Kind]) -> None:
        """Write the header of a file, and give the file its final size."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end, starts = 0, {}
        for name, kind in shard.items():
            starts[name] = end
            end += kind.nbytes
            entries[name] = {"dtype": kind.code, "shape": list(kind.shape), "data_offsets": [starts[name], end]}
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % _ALIGNMENT)
        with (self._folder / file).open("wb") as stream:
            stream.write(len(header).to_bytes(8, "little") + header)
            stream.truncate(8 + len(header) + end)
        self._places |= {name: Place(file, 8 + len(header) + starts[name], kind) for name, kind in shard.items()}
        self._missing |= shard.keys()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one whole tensor under its Hugging Face name.

        Raises:
            OSError: the file cannot be written.
        """
        place = self._places[name]
        assert tuple(tensor.shape) == place.kind.shape, f"{name}: has shape {tuple(tensor.shape)}, not {place.kind.shape}"
        flat = tensor.detach().to("cpu", place.kind.dtype).contiguous().view(-1).view(torch.uint8)
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
            total = sum(place.kind.nbytes for place in self._places.values())
            self._write_json(INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": files})
        quantization = {} if self._projections is None else {"quantization_config": self._projections.config(self._architecture)}
        self._write_json("config.json", hf_config(self._architecture, self._dtype, eos_ids, pad_id) | quantization)
        self._write_json("generation_config.json", generation_config(eos_ids, pad_id))

    def _write_json(self, name: str, content: dict[str, object]) -> None:
        (self._folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def total_bytes(architecture: Architecture, dtype: str, projections: Projections | None = None) -> int:
    """Bytes of all tensors of an exported model."""
    return sum(kind.nbytes for kind in _tensors(architecture, dtype, projections).values())


def _tensors(architecture: Architecture, dtype: str, projections: Projections | None) -> dict[str, Kind]:
    """Every tensor of an exported model. A tied head is the embedding, and is not written twice."""
    skipped = {family.HEAD.name} if architecture.tie_word_embeddings else set()
    kinds: dict[str, Kind] = {}
    for tensor in family.tensors_of(architecture):
        if tensor.name in skipped:
            continue
        if tensor.quantized and projections is not None:
            kinds |= projections.kinds(tensor.name, tensor.shape)
        else:
            kinds[tensor.name] = Kind(tensor.shape, *_DTYPES[dtype])
    return kinds


def _shards(kinds: dict[str, Kind], shard_bytes: int) -> list[dict[str, Kind]]:
    """The tensors of each file."""
    shards: list[dict[str, Kind]] = [{}]
    filled = 0
    for name, kind in kinds.items():
        if shards[-1] and filled + kind.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = kind
        filled += kind.nbytes
    return shards
