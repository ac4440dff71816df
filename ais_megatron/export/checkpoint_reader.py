"""Reads single tensors from a Megatron checkpoint with torch alone: no model, no optimizer, no process group.

Megatron's format "torch_dist" is torch's distributed checkpoint. Its metadata list every tensor with its whole shape and with the chunks
that the ranks wrote. Layers have one tensor for all of them, ``[num_layers, ...]``, and experts one for all layers,
``[num_layers, num_experts, ...]``. A part of such a tensor is read from those chunks that overlap it. Megatron can also store each layer
under its own name, so the reader looks for both.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from ais_megatron.config import Architecture
from ais_megatron.export.parameters import split
from ais_megatron.models.family import Weight, parameters_of, sections_of, shape_of, table_of

# Megatron stores its local layers under the names that Transformer Engine's fused layers have.
_STORED_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


class CheckpointReader:
    """The model's weights in a checkpoint folder.

    Raises:
        ValueError: the folder has no metadata of a distributed checkpoint.
    """

    def __init__(self, folder: Path, architecture: Architecture) -> None:
        self._folder, self._architecture = folder, architecture
        self._storage = FileSystemReader(str(folder))
        try:
            metadata = self._storage.read_metadata()
        except (OSError, pickle.UnpicklingError, EOFError, AttributeError, ImportError) as error:
            raise ValueError(f"{folder}: not a distributed checkpoint ({error})") from error
        self._stored = {key: entry for key, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)}
        self._storage.set_up_storage_reader(metadata, is_coordinator=True)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its Hugging Face name, one after the other, in the precision of the checkpoint. A tied head is left out.

        Raises:
            ValueError: a tensor is missing or has another shape.
            OSError: a file cannot be read.
        """
        a = self._architecture
        yield from self._parts((a.family.embedding,))
        for layer in range(a.num_hidden_layers):
            for rows in parameters_of(table_of(a, layer)):
                yield from self._parts(rows, layer)
            for expert in range(a.num_experts):
                for rows in parameters_of(a.family.experts):
                    yield from self._parts(rows, layer, expert)
        yield from self._parts((a.family.final_norm,))
        if not a.tie_word_embeddings:
            yield from self._parts((a.family.head,))

    def factor(self, name: str, shape: tuple[int, int]) -> Tensor:
        """A LoRA factor, named from ``layers.`` on, in the precision of the checkpoint.

        Raises:
            ValueError: it is missing or has another shape.
            OSError: a file cannot be read.
        """
        key = f"lora.{name}"
        parts = [key] if key in self._stored else [part for part in (f"{key}.{number}" for number in range(3)) if part in self._stored]
        sizes = [tuple(self._stored[part].size) for part in parts]
        found = (sum(size[0] for size in sizes), *sizes[0][1:]) if sizes else None
        if found != shape:
            raise ValueError(f"{self._folder}: {key} has shape {found}, but policy.lora in the run's config.yaml implies {shape}")
        return torch.cat([self._read(part, (), 0, size) for part, size in zip(parts, sizes, strict=True)])

    def _parts(self, rows: tuple[Weight, ...], layer: int | None = None, expert: int | None = None) -> Iterator[tuple[str, Tensor]]:
        """The Hugging Face tensors of one Megatron parameter."""
        family, shapes = self._architecture.family, [shape_of(row, self._architecture) for row in rows]
        names = [
            row.name.format(expert=expert) if layer is None else f"{family.layers}{layer}.{row.name.format(expert=expert)}" for row in rows
        ]
        heights = [shape[0] for shape in shapes]
        if (by_section := self._sections(rows, layer, shapes[0][1:])) is not None:
            yield from zip(names, split(by_section, heights, self._architecture), strict=True)
            return
        key, index = self._find(rows[0], layer, expert, names[0], (sum(heights), *shapes[0][1:]))
        if len(rows) == 3:  # interleaved, so the parts can only be read together
            whole = self._read(key, index, 0, (sum(heights), *shapes[0][1:]))
            yield from zip(names, split(whole, heights, self._architecture), strict=True)
            return
        for number, (name, shape) in enumerate(zip(names, shapes, strict=True)):
            yield name, self._read(key, index, sum(heights[:number]), shape)

    def _sections(self, rows: tuple[Weight, ...], layer: int | None, width: tuple[int, ...]) -> Tensor | None:
        """A parameter of a recurrent layer whose sections are stored one by one (policy/gated_delta_net.py), or None."""
        key = f"decoder.layers.{layer}.{rows[0].megatron}"
        if layer is None or f"{key}.0" not in self._stored:
            return None
        sizes = [size for row in rows for size in sections_of(row, self._architecture)]
        for number, size in enumerate(sizes):
            found = tuple(self._stored[f"{key}.{number}"].size) if f"{key}.{number}" in self._stored else None
            if found != (size, *width):
                raise ValueError(
                    f"{self._folder}: {key}.{number} has shape {found}, but the architecture in the run's config.yaml implies "
                    f"{(size, *width)} for a part of {rows[0].name}"
                )
        return torch.cat([self._read(f"{key}.{number}", (), 0, (size, *width)) for number, size in enumerate(sizes)])

    def _find(self, row: Weight, layer: int | None, expert: int | None, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """The stored tensor that holds the parameter of `row`, and the parameter's place in it: the layer, the expert, both or neither."""
        if layer is None:
            candidates: list[tuple[str, tuple[int, ...]]] = [(row.megatron, ())]
        else:
            place = () if expert is None else (expert,)
            candidates = [
                candidate
                for stored in _stored_names(row)
                for candidate in ((f"decoder.layers.{stored}", (layer, *place)), (f"decoder.layers.{layer}.{stored}", place))
            ]
        found = next((candidate for candidate in candidates if candidate[0] in self._stored), None)
        if found is None:
            looked_for = " or ".join(key for key, _ in candidates)
            raise ValueError(f"{self._folder}: has no tensor for {name} ({looked_for}); does the run's config.yaml describe another model?")
        key, index = found
        size = tuple(self._stored[key].size)
        rows_stored, *others = size[len(index) :]
        is_padded = layer is None and len(shape) == 2 and rows_stored >= shape[0]  # to a multiple of TP
        if (
            tuple(others) != shape[1:]
            or (rows_stored != shape[0] and not is_padded)
            or any(i >= n for i, n in zip(index, size, strict=False))
        ):
            raise ValueError(
                f"{self._folder}: {key} has shape {size}, but the architecture in the run's config.yaml implies {shape} for {name}"
            )
        return key, index

    def _read(self, key: str, index: tuple[int, ...], first: int, shape: tuple[int, ...]) -> Tensor:
        """The rows from `first` on of one parameter."""
        entry = self._stored[key]
        offsets, sizes = (*index, first, *(0 for _ in shape[1:])), (*(1 for _ in index), *shape)
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        self._storage.read_data(LoadPlan(items), _IntoTensor(target)).wait()
        return target.view(shape)


class _IntoTensor(DefaultLoadPlanner):
    """Tells torch to read every item of a plan into `target`."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        places = zip(read_item.dest_offsets, read_item.lengths, strict=True)
        return self._target[tuple(slice(start, start + length) for start, length in places)]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do, because torch has copied into the target."""


def _stored_names(row: Weight) -> list[str]:
    """Names of a layer's parameter in a checkpoint, likeliest first. Experts are numbered by an index, and not in the name."""
    plain = re.sub(r"\blocal_experts\.\{slot\}", "experts", row.megatron)
    others = [] if row.transformer_engine is None or "{slot}" in row.transformer_engine else [row.transformer_engine]
    return list(dict.fromkeys([_STORED_NAMES.get(plain, plain), plain, *others]))
