"""Megatron's shards <-> Hugging Face tensors, as a stream of buckets of bounded size.

The correspondence is stated once, in `plan`: which Megatron parameter, on which pipeline stage, is made of which Hugging
Face tensors, and along which dimension each is sharded over TP. Import reads exactly this rank's rows or columns from the
safetensors files; export gathers a bucket over TP on the stage that owns it and broadcasts it over PP, so that every rank
of a model-parallel group sees the whole stream but never holds more than a bucket of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ais_megatron.config import Architecture

Bucket = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor: name, full shape, and the dimension that TP shards (None: a copy on every rank)."""

    name: str
    shape: tuple[int, ...]
    dim: int | None

    def local_shape(self, tp: int) -> tuple[int, ...]:
        return tuple(-(-n // tp) if i == self.dim else n for i, n in enumerate(self.shape))


@dataclass(frozen=True)
class Entry:
    """One Megatron parameter: pipeline stage, name on that stage, and its parts."""

    stage: int
    parameter: str
    parts: tuple[Part, ...]


def plan(architecture: Architecture, pp: int, fused_norms: bool = False) -> list[Entry]:
    """Every parameter of the model, stage by stage.

    fused_norms: Transformer Engine keeps a norm's weight inside the linear layer that follows it.
    Tied embeddings with pp > 1: the last stage's copy is listed too (its parts repeat the embedding's name).
    """
    a = architecture
    vocabulary = lambda name: Part(name, (a.vocab_size, a.hidden_size), 0)  # noqa: E731
    entries = [Entry(0, "embedding.word_embeddings.weight", (vocabulary("model.embed_tokens.weight"),))]
    per_stage = a.num_hidden_layers // pp
    for number in range(a.num_hidden_layers):
        stage, local = divmod(number, per_stage)
        entries += [Entry(stage, f"decoder.layers.{local}.{name}", parts) for name, parts in _layer(a, number, fused_norms)]
    entries.append(Entry(pp - 1, "decoder.final_layernorm.weight", (Part("model.norm.weight", (a.hidden_size,), None),)))
    if not a.tie_word_embeddings:
        entries.append(Entry(pp - 1, "output_layer.weight", (vocabulary("lm_head.weight"),)))
    elif pp > 1:
        entries.append(Entry(pp - 1, "output_layer.weight", (vocabulary("model.embed_tokens.weight"),)))
    return entries


def _layer(a: Architecture, number: int, fused_norms: bool) -> list[tuple[str, tuple[Part, ...]]]:
    prefix = f"model.layers.{number}."
    hidden, ffn = a.hidden_size, a.intermediate_size
    q, kv = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim

    def part(name: str, *shape: int, dim: int | None = None) -> Part:
        return Part(prefix + name + ".weight", shape, dim)

    return [
        (
            "self_attention.linear_qkv.layer_norm_weight" if fused_norms else "input_layernorm.weight",
            (part("input_layernorm", hidden),),
        ),
        (
            "self_attention.linear_qkv.weight",
            (
                part("self_attn.q_proj", q, hidden, dim=0),
                part("self_attn.k_proj", kv, hidden, dim=0),
                part("self_attn.v_proj", kv, hidden, dim=0),
            ),
        ),
        ("self_attention.q_layernorm.weight", (part("self_attn.q_norm", a.head_dim),)),
        ("self_attention.k_layernorm.weight", (part("self_attn.k_norm", a.head_dim),)),
        ("self_attention.linear_proj.weight", (part("self_attn.o_proj", hidden, q, dim=1),)),
        ("mlp.linear_fc1.layer_norm_weight" if fused_norms else "pre_mlp_layernorm.weight", (part("post_attention_layernorm", hidden),)),
        ("mlp.linear_fc1.weight", (part("mlp.gate_proj", ffn, hidden, dim=0), part("mlp.up_proj", ffn, hidden, dim=0))),
        ("mlp.linear_fc2.weight", (part("mlp.down_proj", hidden, ffn, dim=1),)),
    ]


def split(entry: Entry, parameter: Tensor, architecture: Architecture) -> list[Tensor]:
    """This rank's shard of each part. Megatron interleaves Q, K and V per KV group; gate and up are stacked."""
    if len(entry.parts) == 1:
        return [parameter]
    if len(entry.parts) == 2:
        return list(parameter.chunk(2))
    per_group = architecture.num_attention_heads // architecture.num_key_value_heads
    rows = parameter.view(-1, (per_group + 2), architecture.head_dim, parameter.shape[-1])
    return [x.reshape(-1, parameter.shape[-1]) for x in rows.split([per_group, 1, 1], dim=1)]


def join(entry: Entry, shards: list[Tensor], architecture: Architecture) -> Tensor:
    """The inverse of `split`."""
    if len(shards) < 3:
        return torch.cat(shards)
    width = shards[0].shape[-1]
    per_group = architecture.num_attention_heads // architecture.num_key_value_heads
    grouped = [x.view(-1, heads, architecture.head_dim, width) for x, heads in zip(shards, (per_group, 1, 1), strict=True)]
    return torch.cat(grouped, dim=1).reshape(-1, width)


def load_hf(model: nn.Module, architecture: Architecture, folder: str | Path, fused_norms: bool) -> None:
    """Copy this rank's shards out of a checkpoint folder (one or many safetensors files) into `model`, in place.

    Raises:
        ValueError: no safetensors there, an unreadable file, a tensor missing or of another shape: named.
    """
    tp, tp_rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    stage = parallel_state.get_pipeline_model_parallel_rank()
    parameters = dict(model.named_parameters())
    reader = _Reader(Path(folder))
    for entry in plan(architecture, parallel_state.get_pipeline_model_parallel_world_size(), fused_norms):
        if entry.stage != stage:
            continue
        target = parameters.pop(entry.parameter)
        shards = [reader.shard(part, tp, tp_rank) for part in entry.parts]
        with torch.no_grad():
            target.copy_(join(entry, shards, architecture))
    assert not parameters, f"parameters without a Hugging Face counterpart: {sorted(parameters)}"


class _Reader:
    """Slices of tensors from a checkpoint folder, sharded or not."""

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
            with self._open(single.name) as file:
                self.files = dict.fromkeys(file.keys(), single.name)
        else:
            raise ValueError(f"model.path={folder}: neither {single.name} nor {index.name} is there")

    def _open(self, name: str):  # noqa: ANN202 - safetensors does not name its handle's type
        path = self.folder / name
        if not path.is_file():
            raise ValueError(f"model.path={self.folder}: the index names {name}, but there is no such file")
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"model.path={self.folder}: cannot read {name}: {error}") from error

    def shard(self, part: Part, tp: int, tp_rank: int) -> Tensor:
        """This rank's rows or columns of one tensor; a padded vocabulary is filled up with zero rows."""
        if part.name not in self.files:
            raise ValueError(f"model.path={self.folder}: tensor {part.name} is missing; is this a checkpoint of another architecture?")
        with self._open(self.files[part.name]) as file:
            stored = file.get_slice(part.name)
            shape = tuple(stored.get_shape())
            if shape != part.shape:
                raise ValueError(f"model.path={self.folder}: tensor {part.name} has shape {shape}, its config.json implies {part.shape}")
            if part.dim is None:
                return stored[:]
            size = part.local_shape(tp)[part.dim]
            start = tp_rank * size
            piece = stored[start : start + size] if part.dim == 0 else stored[:, start : start + size]
        missing = size - piece.shape[part.dim]
        return torch.cat([piece, piece.new_zeros(missing, *piece.shape[1:])]) if missing else piece


def export_buckets(model: nn.Module, architecture: Architecture, bucket_bytes: int, fused_norms: bool) -> Iterator[Bucket]:
    """All weights under Hugging Face names, whole, in buckets of about `bucket_bytes` (one tensor at least).

    Every rank of a model-parallel group must iterate to the end: each bucket is one all-gather over TP on the owning
    stage and one broadcast over PP. Peak extra memory is about two buckets. Tied embeddings are exported once.
    """
    pp = parallel_state.get_pipeline_model_parallel_world_size()
    entries = plan(architecture, pp, fused_norms)
    if architecture.tie_word_embeddings and pp > 1:
        entries = entries[:-1]
    parameters = dict(model.named_parameters())
    itemsize = next(iter(parameters.values())).element_size()
    for stage_entries in _cut(entries, bucket_bytes, itemsize):
        yield _export(stage_entries, parameters, architecture)


def _cut(entries: list[Entry], bucket_bytes: int, itemsize: int) -> Iterator[list[Entry]]:
    """Consecutive entries of one stage, together at most `bucket_bytes` when whole."""
    pending: list[Entry] = []
    size = 0
    for entry in entries:
        entry_size = sum(prod(part.shape) for part in entry.parts) * itemsize
        if pending and (entry.stage != pending[0].stage or size + entry_size > bucket_bytes):
            yield pending
            pending, size = [], 0
        pending.append(entry)
        size += entry_size
    yield pending


def _export(entries: list[Entry], parameters: dict[str, nn.Parameter], architecture: Architecture) -> Bucket:
    tp = parallel_state.get_tensor_model_parallel_world_size()
    parts = [part for entry in entries for part in entry.parts]
    sizes = [tp * prod(part.local_shape(tp)) for part in parts]
    example = next(iter(parameters.values()))
    owner = entries[0].stage == parallel_state.get_pipeline_model_parallel_rank()
    if owner:
        shards = [shard for e in entries for shard in split(e, parameters[e.parameter].detach(), architecture)]
        flat = _gather_over_tp(torch.cat([shard.reshape(-1) for shard in shards]), tp)
    else:
        flat = torch.empty(sum(sizes), dtype=example.dtype, device=example.device)
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(flat, src=dist.get_global_rank(group, entries[0].stage), group=group)
    by_rank = flat.view(tp, -1).split([size // tp for size in sizes], dim=1)
    return [(part.name, _whole(part, shards, tp)) for part, shards in zip(parts, by_rank, strict=True)]


def _gather_over_tp(flat: Tensor, tp: int) -> Tensor:
    if tp == 1:
        return flat
    gathered = torch.empty(tp * flat.numel(), dtype=flat.dtype, device=flat.device)
    dist.all_gather_into_tensor(gathered, flat, group=parallel_state.get_tensor_model_parallel_group())
    return gathered


def _whole(part: Part, shards: Tensor, tp: int) -> Tensor:
    """One tensor from its flattened shards ``[tp, numel/tp]``: joined along its dimension, or the first copy."""
    local = part.local_shape(tp)
    if part.dim is None:
        return shards[0].view(local)
    if part.dim == 0:
        return shards.reshape(tp * local[0], *local[1:])[: part.shape[0]]
    return torch.cat([shard.view(local) for shard in shards], dim=part.dim)
