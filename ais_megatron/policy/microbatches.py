"""Splits rows into microbatches with a token budget, and arranges them for the model.

    padded    sort by length, fill, pad to the longest row
    packed    (`train.packing`) bins with about the same work; rows are joined without padding
    shared    (`train.share_prefixes`, on CPUs) rows that begin alike are together; they are joined, and equal beginnings are there once

The split and the arrangement change only memory and speed. Losses are sums with one global divisor, so gradients do not depend on the
split, and padding never reaches the loss.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from ais_megatron.batch import Batch
from ais_megatron.config import Config
from ais_megatron.distributed import device
from ais_megatron.policy.arranged import Arranged, padded
from ais_megatron.policy.balance import Work, work_of
from ais_megatron.policy.packing import pack
from ais_megatron.policy.parallel import Context, data_parallel_group
from ais_megatron.policy.shared_prefixes import split_sharing
from ais_megatron.shapes import AS_IS, CUDA_COLUMNS, Shapes


class Microbatches:
    """How this rank's rows become what the model gets.

    transformer_engine: whether the model has Transformer Engine's layers, whose attention knows neither shared beginnings nor `Packed`.
    """

    def __init__(self, config: Config, context: Context, transformer_engine: bool) -> None:
        parallel, ranks = config.parallel, context.size
        on_cpu, is_moe = device().type == "cpu", config.architecture.is_moe
        self.context = context
        family = config.architecture.family
        self._bidirectional = family.is_diffusion
        may_share = not (is_moe or family.is_diffusion or family.is_recurrent)
        self.shares = config.train.share_prefixes and on_cpu and may_share and ranks == 1
        self.packs = config.train.packing or self.shares or (ranks > 1 and not transformer_engine)
        self._thd = transformer_engine
        by_tp = parallel.tp if parallel.sequence_parallel else 1
        self._column_multiple = by_tp * (2 * ranks if ranks > 1 else 1)
        self._place_multiple = by_tp if on_cpu else math.lcm(CUDA_COLUMNS, by_tp)
        self.shapes = Shapes.on(device().type, self._column_multiple, ranks)
        self._budget = config.train.tokens_per_microbatch * ranks
        self._architecture = config.architecture
        self._work: list[float] = []
        self._real = self._computed = 0
        # Each layer waits for the tokens of all ranks that have experts.
        self._equal_counts = is_moe and dist.get_world_size(data_parallel_group()) > 1

    def pad(self, batch: Batch) -> Batch:
        """The batch with as many columns as every microbatch can have."""
        return pad_columns(batch, self._column_multiple)

    def split(self, batch: Batch) -> list[Tensor]:
        """Row numbers of each microbatch. If experts are spread over data-parallel ranks, all ranks have the same number of microbatches.
        The last ones may be empty."""
        groups = split_sharing(batch, self._budget) if self.shares else self._split_equally(batch)
        work = work_of(batch.lengths, self._architecture)
        self._work = [float(work[rows].sum()) for rows in groups]
        self._real, self._computed = int(batch.lengths.sum()), 0
        return groups

    def work(self) -> Tensor:
        """`Work.of_this_rank` of the latest pass."""
        return Work.of_this_rank(self._work, self._computed, self._real)

    def _split_equally(self, batch: Batch) -> list[Tensor]:
        groups = self._split(batch, 1)
        if not self._equal_counts:
            return groups
        most = torch.tensor(len(groups), device=device())
        dist.all_reduce(most, op=dist.ReduceOp.MAX, group=data_parallel_group())
        groups = self._split(batch, int(most))
        return groups + [torch.zeros(0, dtype=torch.int64)] * (int(most) - len(groups))

    def _split(self, batch: Batch, at_least: int) -> list[Tensor]:
        if self.packs:
            return split_evenly(batch.lengths, work_of(batch.lengths, self._architecture), self._budget, at_least)
        return split_by_tokens(batch.lengths, self._budget, at_least, self.shapes)

    def rows(self, batch: Batch, index: Tensor) -> Batch:
        """The rows of a microbatch, on the device. The batch must be padded (`pad`)."""
        return make_microbatch(batch, index, self._column_multiple).to(device())

    def arrange(self, rows: Batch) -> Arranged:
        """What the model gets on this rank."""
        if self.packs:
            arranged = pack(rows, self._place_multiple, self.context, share=self.shares, thd=self._thd)
        else:
            arranged = padded(rows, self.shapes, self.context, bidirectional=self._bidirectional)
        self._computed += arranged.tokens.numel() * self.context.size
        return arranged


def split_evenly(lengths: Tensor, work: Tensor, budget: int, at_least: int = 1) -> list[Tensor]:
    """Row numbers of each microbatch of rows that are packed: as few as the budget allows, with about the same work.

    Args:
        lengths: int64 ``[batch]``.
        work: float64 ``[batch]``, of each row, in any unit. It grows with the length.
        budget: most tokens of a microbatch. A single row that is longer gets its own microbatch.
        at_least: smallest number of microbatches; at most one per row.
    """
    values, costs = lengths.tolist(), work.tolist()
    order = sorted(range(len(values)), key=lambda row: -values[row])
    count = min(max(at_least, math.ceil(sum(min(value, budget) for value in values) / budget)), len(values))
    while count:
        bins: list[list[int]] = [[] for _ in range(count)]
        tokens, loads = [0] * count, [0.0] * count
        for row in order:  # the longest first, each where there is least work yet
            fitting = [i for i in range(count) if not bins[i] or tokens[i] + values[row] <= budget]
            if not fitting:
                break
            least = min(fitting, key=loads.__getitem__)
            bins[least].append(row)
            tokens[least] += values[row]
            loads[least] += costs[row]
        else:
            return [torch.tensor(sorted(rows)) for rows in sorted(bins, key=lambda rows: -sum(costs[row] for row in rows))]
        count += 1
    return []


def split_by_tokens(lengths: Tensor, budget: int, at_least: int = 1, shapes: Shapes = AS_IS) -> list[Tensor]:
    """Row numbers of each microbatch.

    Args:
        lengths: int64 ``[batch]``.
        budget: most padded tokens (rows times columns) of a microbatch. A single row that is longer gets its own microbatch.
        at_least: smallest number of microbatches, for ranks that must have the same number; at most one per row.
    Returns:
        index tensors that together contain every row once, longest rows first.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    groups: list[Tensor] = []
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        rows = shapes.most_rows(budget // shapes.width(longest))
        groups.append(order[start : start + rows])
        start += rows
    while len(groups) < min(at_least, len(lengths)):
        largest = max(range(len(groups)), key=lambda i: len(groups[i]))
        half = len(groups[largest]) // 2
        groups[largest : largest + 1] = [groups[largest][:half], groups[largest][half:]]
    return groups


def make_microbatch(batch: Batch, index: Tensor, multiple: int = 1) -> Batch:
    """The rows of `index`, with as many columns as the longest of them, rounded up to `multiple`. The batch must be padded (`pad_columns`).

    Without rows the microbatch has `multiple` columns, and `Shapes.fill` adds a row of padding. Ranks that have no rows left need this.
    """
    longest = int(batch.lengths[index].max()) if len(index) else 1
    return batch.rows(index, longest + -longest % multiple)


def pad_columns(batch: Batch, multiple: int) -> Batch:
    """The batch with its columns padded to a multiple, because sequence parallelism shards them over the TP group."""
    width = batch.tokens.shape[1]
    return batch.pad_columns(width + -width % multiple)
