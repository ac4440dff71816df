"""What a rank has of a batch: its rows, how they are split into microbatches, and their bytes on the device. No torch here.

A microbatch has `train.tokens_per_microbatch` tokens, or more if a single row is longer, padded to the shapes that the model uses
(`shapes`).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from ais_megatron.config import Config
from ais_megatron.planning.parameters import FP32
from ais_megatron.shapes import Shapes


@dataclass(frozen=True)
class Microbatching:
    """How the rows of a rank, all of the same length, are split into the microbatches of one update."""

    count: int
    """Number of microbatches."""
    rows: int
    """Rows of a full microbatch, padding included."""
    width: int
    """Columns of a microbatch, padding included."""
    computed: int
    """Rows of all microbatches, padding rows included."""


def shapes_of(config: Config, cuda: bool) -> Shapes:
    """The shapes of rows, which context-parallel ranks share in chunks."""
    parallel = config.parallel
    multiple = (parallel.tp if parallel.sequence_parallel else 1) * (2 * parallel.cp if parallel.cp > 1 else 1)
    return Shapes.on("cuda" if cuda else "cpu", multiple, parallel.cp)


def microbatching(config: Config, row: int, cuda: bool) -> Microbatching:
    """How policy/microbatches.py splits rows of `row` tokens. `parallel.dp` must be set."""
    rollout, train, shapes = config.rollout, config.train, shapes_of(config, cuda)
    rows = ceil(
        rollout.prompts_per_step * rollout.group_size * config.rows_per_response / (config.parallel.dp or 1) / train.updates_per_batch
    )
    budget = train.tokens_per_microbatch * config.parallel.cp
    if train.packing:
        full = max(budget // row, 1)
        return Microbatching(ceil(rows / full), full, row, rows)
    width = shapes.width(row)
    full = shapes.most_rows(budget // width)
    count = ceil(rows / full)
    return Microbatching(count, full, width, (count - 1) * full + shapes.rows(rows - (count - 1) * full))


def microbatch_tokens(config: Config, longest_row: int, cuda: bool) -> int:
    """Padded tokens of the largest microbatch on a rank: `train.tokens_per_microbatch`, or its part of a single row that is longer."""
    return max(config.train.tokens_per_microbatch, ceil(shapes_of(config, cuda).width(longest_row) / config.parallel.cp))


def route_bytes(config: Config) -> int:
    """Bytes of the routes of one token, in `batch.routes_dtype`."""
    a = config.architecture
    if not config.rollout.return_routed_experts:
        return 0
    return a.num_hidden_layers * a.num_experts_per_tok * (1 if a.num_experts <= 2**7 else 2 if a.num_experts <= 2**15 else 4)


def batch_memory(config: Config, tokens: int) -> int:
    """Bytes of microbatches of `tokens` padded tokens on the device: ids, mask, log-probabilities, positions and routes, and what a
    diffusion model reads. Each microbatch is moved there when it is needed, and context-parallel ranks have its whole rows."""
    return tokens * (8 + 1 + FP32 + 8 + (8 if config.architecture.family.is_diffusion else 0) + route_bytes(config))


def gathered_memory(config: Config, row: int) -> int:
    """Bytes on the device while the ranks of a model-parallel group exchange their responses: all responses, and a second copy of the
    rank's own. With dynamic sampling the whole job is one group."""
    parallel, rollout = config.parallel, config.rollout
    assert parallel.dp is not None, "set parallel.dp first (`with_gpus`)"
    group = parallel.model_parallel_size * (parallel.dp if config.objective.resolved.dynamic_sampling else 1)
    if group == 1:
        return 0
    rows = rollout.prompts_per_step * rollout.group_size * config.rows_per_response
    tokens = row * rows * group // (parallel.model_parallel_size * parallel.dp)
    read = 4 if config.architecture.family.is_diffusion else 0
    return (tokens + tokens // group) * (4 + 1 + FP32 + read + route_bytes(config))
