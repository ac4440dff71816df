"""Converts between Megatron's shards and Hugging Face tensors, bucket by bucket.

The tables in models/ say which Hugging Face tensors make up each Megatron parameter, and along which dimension TP shards them.
`parameter_map` adds the pipeline stages and the places of experts. The import reads only this rank's rows or columns from the
safetensors files. The export gathers a bucket over TP on the stage that owns it and broadcasts it over PP. So every rank of a
model-parallel group sees all weights, but never holds more than one bucket.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from ais_megatron.batch import Bucket
from ais_megatron.config import Architecture, Config
from ais_megatron.config.policy import lora_targets
from ais_megatron.export.adapter import factor_names, factor_shapes
from ais_megatron.export.hf_reader import HFReader
from ais_megatron.export.parameters import join, split
from ais_megatron.models.family import Weight, parameters_of, sections_of, shape_of, table_of
from ais_megatron.policy.lora import LoRA

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor."""

    name: str
    shape: tuple[int, ...]
    """The full shape."""
    dim: int | None
    """The dimension that TP shards; None: every rank has a copy."""
    sections: tuple[int, ...] = ()
    """Heights of the sections of which a rank has a part each; empty: the tensor is one section."""

    def of_expert(self, number: int) -> Part:
        """The same tensor of expert `number`. The names of experts' parts have a placeholder for the number."""
        return Part(self.name.format(expert=number), self.shape, self.dim, self.sections)

    def local_shape(self, tp: int) -> tuple[int, ...]:
        return tuple(-(-n // tp) if i == self.dim else n for i, n in enumerate(self.shape))

    def pieces(self, tp: int, tp_rank: int) -> list[slice]:
        """Where the parts of a rank lie along `dim`, one for each section."""
        assert self.dim is not None, "every rank has the whole tensor"
        found, first = [], 0
        for size in self.sections or self.shape[self.dim : self.dim + 1]:
            local = -(-size // tp)
            found.append(slice(first + tp_rank * local, first + (tp_rank + 1) * local))
            first += size
        return found


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter."""

    stage: int
    """Its pipeline stage."""
    parameter: str
    """Its name on that stage."""
    parts: tuple[Part, ...]
    slot: int | None = None
    """The number of the expert among those of an expert-parallel rank; None outside experts. Rank r of ep has the experts from
    r * num_experts / ep on. They are sharded over expert tensor parallelism (etp) instead of tp."""


@dataclass(frozen=True)
class Shards:
    """How parameters of one kind (dense or experts) are spread over the ranks of a pipeline stage."""

    tp: int
    """Number of shards of each tensor."""
    tp_rank: int
    """This rank's shard."""
    ep: int = 1
    """Number of sets of experts."""
    ep_rank: int = 0
    """This rank's set."""
    group: dist.ProcessGroup | None = None
    """The tp * ep ranks that together have everything, ordered by ep and then tp; None for a single rank."""


def shards_of(entry: Entry) -> Shards:
    """The current layout of a dense or an expert parameter."""
    ps = parallel_state
    if entry.slot is None:
        return Shards(
            ps.get_tensor_model_parallel_world_size(), ps.get_tensor_model_parallel_rank(), group=ps.get_tensor_model_parallel_group()
        )
    return Shards(
        ps.get_expert_tensor_parallel_world_size(),
        ps.get_expert_tensor_parallel_rank(),
        ps.get_expert_model_parallel_world_size(),
        ps.get_expert_model_parallel_rank(),
        ps.get_expert_tensor_and_model_parallel_group(),
    )


def parameter_map(architecture: Architecture, pp: int, ep: int = 1, transformer_engine: bool = False) -> list[Entry]:
    """Every parameter of the model, stage by stage.

    transformer_engine: in its layers a norm's weight belongs to the next linear layer, and grouped experts are numbered.
    With tied embeddings and pp > 1, the last stage's copy is listed too. Its parts have the embedding's name.
    """
    a, family = architecture, architecture.family
    last = pp - 1
    entries = [_entry(a, 0, (family.embedding,))]
    per_stage = a.num_hidden_layers // pp
    for number in range(a.num_hidden_layers):
        stage, local = divmod(number, per_stage)
        place = f"{family.layers}{number}.", f"decoder.layers.{local}.", transformer_engine
        entries += [_entry(a, stage, rows, *place) for rows in parameters_of(table_of(a, number))]
        entries += [_entry(a, stage, rows, *place, slot) for slot in range(a.num_experts // ep) for rows in parameters_of(family.experts)]
    entries.append(_entry(a, last, (family.final_norm,)))
    if not a.tie_word_embeddings:
        entries.append(_entry(a, last, (family.head,)))
    elif pp > 1:
        entries.append(_entry(a, last, (family.embedding._replace(megatron=family.head.megatron),)))
    return entries


def _entry(
    a: Architecture,
    stage: int,
    rows: tuple[Weight, ...],
    prefix: str = "",
    megatron_prefix: str = "",
    transformer_engine: bool = False,
    slot: int | None = None,
) -> Entry:
    """The Megatron parameter for `rows` of a family's table."""
    name = rows[0].transformer_engine if transformer_engine and rows[0].transformer_engine else rows[0].megatron
    return Entry(stage, megatron_prefix + name.format(slot=slot), tuple(part_of(row, a, prefix) for row in rows), slot)


def part_of(row: Weight, a: Architecture, prefix: str = "") -> Part:
    """The tensor of a row of a family's table."""
    return Part(prefix + row.name, shape_of(row, a), row.tp_dim, sections_of(row, a) if row.sections else ())


def load_hf(model: nn.Module, architecture: Architecture, folder: str | Path, transformer_engine: bool) -> None:
    """Copy this rank's shards from a checkpoint folder (one or many safetensors files) into `model`, in place.

    Raises:
        ValueError: there is no safetensors file, a file cannot be read, or a tensor is missing or has another shape. The message
            names the file or tensor.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    parameters = dict(model.named_parameters())
    reader = _Reader(Path(folder))
    _say_what_is_left_aside(reader)
    for entry in _present_map(architecture, transformer_engine):
        if entry.stage != stage:
            continue
        layout = shards_of(entry)
        target = parameters.pop(entry.parameter)
        shards = [reader.shard(part, layout.tp, layout.tp_rank) for part in _parts_on(entry, layout.ep_rank, architecture, layout.ep)]
        with torch.no_grad():
            target.copy_(join(shards, architecture))
    assert not parameters, f"parameters without a Hugging Face counterpart: {sorted(parameters)}"


_said: set[Path] = set()


def _say_what_is_left_aside(reader: HFReader) -> None:
    """One warning for each folder with more than a language model."""
    if reader.left_aside and reader.folder not in _said and dist.get_rank() == 0:
        _said.add(reader.folder)
        kinds = sorted({re.match(r"(model\.)?[^.]+\.", name).group() for name in reader.left_aside})  # type: ignore[union-attr]
        logger.warning(
            f"model.path={reader.folder}: only the language model is used; {len(reader.left_aside)} tensors of {' and '.join(kinds)}* are "
            "left aside, and exports do not have them"
        )


def _present_map(architecture: Architecture, transformer_engine: bool) -> list[Entry]:
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    ep = parallel_state.get_expert_model_parallel_world_size() if architecture.is_moe else 1
    return parameter_map(architecture, pp, ep, transformer_engine)


def _parts_on(entry: Entry, ep_rank: int, architecture: Architecture, ep: int) -> list[Part]:
    """The parts of an entry on an expert-parallel rank."""
    if entry.slot is None:
        return list(entry.parts)
    return [part.of_expert(ep_rank * (architecture.num_experts // ep) + entry.slot) for part in entry.parts]


class _Reader(HFReader):
    """This rank's slices of the tensors of a checkpoint folder."""

    def shard(self, part: Part, tp: int, tp_rank: int) -> Tensor:
        """This rank's rows or columns of one tensor. The padding of the vocabulary is filled with zero rows."""
        if part.name not in self.files:
            raise ValueError(f"model.path={self.folder}: tensor {part.name} is missing; is this a checkpoint of another architecture?")
        with self.open(self.files[part.name]) as file:
            stored = file.get_slice(self.stored_name(part.name))
            shape = tuple(stored.get_shape())
            if shape != part.shape:
                raise ValueError(
                    f"model.path={self.folder}: tensor {part.name} has shape {shape}, but its config.json implies {part.shape}"
                )
            if part.dim is None:
                return stored[:]
            pieces = [stored[rows] if part.dim == 0 else stored[:, rows] for rows in part.pieces(tp, tp_rank)]
        piece = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        missing = part.local_shape(tp)[part.dim] - piece.shape[part.dim]
        return torch.cat([piece, piece.new_zeros(missing, *piece.shape[1:])]) if missing else piece


def export_buckets(
    model: nn.Module, architecture: Architecture, bucket_bytes: int, transformer_engine: bool, lora: LoRA | None = None
) -> Iterator[Bucket]:
    """All weights as whole tensors under Hugging Face names, in buckets of about `bucket_bytes` (at least one parameter of each rank).

    Every rank of the job must iterate to the end. For each bucket there is one all-gather over TP (for experts over ETP and EP) on the
    stage that owns it, and one broadcast over PP. The extra memory is about two buckets. Tied embeddings are exported once.

    lora: factors whose product is added to the weights.
    """
    entries = _present_map(architecture, transformer_engine)
    if architecture.tie_word_embeddings and entries[-1].parameter == "output_layer.weight":
        entries = entries[:-1]
    parameters = dict(model.named_parameters())
    itemsize = next(iter(parameters.values())).element_size()
    for bucket in _cut(entries, bucket_bytes, itemsize):
        yield _export(bucket, parameters, architecture, lora)


def export_factor_buckets(lora: LoRA, config: Config, bucket_bytes: int) -> Iterator[Bucket]:
    """All of LoRA's factors as whole tensors, named as in `factor_shapes`, as `export_buckets` does it for weights."""
    architecture, shapes = config.architecture, factor_shapes(config)
    per_stage = architecture.num_hidden_layers // parallel_state.get_pipeline_model_parallel_world_size()
    entries = []
    for layer in range(architecture.num_hidden_layers):
        for row in lora_targets(config.policy.lora, architecture, layer).values():
            sections = sections_of(row, architecture) if row.sections else ()
            # Column-parallel layers split B by rows, and row-parallel layers split A by columns.
            dims = (None, 0) if row.tp_dim == 0 else (1, None)
            for name, dim in zip(factor_names(f"{architecture.family.factor_layers}{layer}.{row.name}"), dims, strict=True):
                entries.append(Entry(layer // per_stage, name, (Part(name, shapes[name], dim, sections if dim == 0 else ()),)))
    factors = {name: factor for name, factor, _ in lora.named_factors()}
    itemsize = next(iter(factors.values())).element_size()
    for bucket in _cut(entries, bucket_bytes, itemsize):
        yield _export(bucket, factors, architecture, None)


def _cut(entries: list[Entry], bucket_bytes: int, itemsize: int) -> Iterator[list[Entry]]:
    """Split entries into buckets: consecutive entries of one stage and one kind, with at most `bucket_bytes` as whole tensors."""
    pending: list[Entry] = []
    size = 0
    for entry in entries:
        entry_size = shards_of(entry).ep * sum(prod(part.shape) for part in entry.parts) * itemsize
        other_kind = pending and (entry.stage, entry.slot is None) != (pending[0].stage, pending[0].slot is None)
        if pending and (other_kind or size + entry_size > bucket_bytes):
            yield pending
            pending, size = [], 0
        pending.append(entry)
        size += entry_size
    yield pending


def _export(entries: list[Entry], parameters: dict[str, nn.Parameter], architecture: Architecture, lora: LoRA | None) -> Bucket:
    layout = shards_of(entries[0])
    sizes = [prod(part.local_shape(layout.tp)) for entry in entries for part in entry.parts]
    example = next(iter(parameters.values()))
    ranks = layout.tp * layout.ep
    if entries[0].stage == parallel_state.get_pipeline_model_parallel_rank():
        whole = {e: parameters[e.parameter].detach() for e in entries}
        if lora is not None:
            whole = {e: lora.merged(e.parameter, value) for e, value in whole.items()}
        shards = [shard for e, value in whole.items() for shard in split(value, _heights(e, layout.tp), architecture)]
        flat = _gather(torch.cat([shard.reshape(-1) for shard in shards]), ranks, layout.group)
    else:
        flat = torch.empty(ranks * sum(sizes), dtype=example.dtype, device=example.device)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(flat, src=dist.get_global_rank(group, entries[0].stage), group=group)
    bucket = []
    for ep_rank, block in enumerate(flat.view(layout.ep, layout.tp, -1)):
        parts = [part for entry in entries for part in _parts_on(entry, ep_rank, architecture, layout.ep)]
        bucket += [(part.name, _whole(part, shards, layout.tp)) for part, shards in zip(parts, block.split(sizes, dim=1), strict=True)]
    return bucket


def _heights(entry: Entry, tp: int) -> list[int]:
    """Rows of each part on one rank."""
    return [part.local_shape(tp)[0] for part in entry.parts]


def _gather(flat: Tensor, ranks: int, group: dist.ProcessGroup | None) -> Tensor:
    if ranks == 1:
        return flat
    gathered = torch.empty(ranks * flat.numel(), dtype=flat.dtype, device=flat.device)
    dist.all_gather_into_tensor(gathered, flat, group=group)
    return gathered


def _whole(part: Part, shards: Tensor, tp: int) -> Tensor:
    """One tensor from its flattened shards ``[tp, numel/tp]``: joined along its sharded dimension, or the first copy."""
    local = part.local_shape(tp)
    if part.dim is None:
        return shards[0].view(local)
    if part.sections:
        by_rank = shards.reshape(tp, *local).split([size // tp for size in part.sections], dim=1)
        return torch.cat([section.flatten(0, 1) for section in by_rank])
    if part.dim == 0:
        return shards.reshape(tp * local[0], *local[1:])[: part.shape[0]]
    return torch.cat([shard.view(local) for shard in shards], dim=part.dim)
