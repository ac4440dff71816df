"""Balances the work of data-parallel ranks, which wait for each other in every update.

The work of a row is the FLOPs of its forward pass: its tokens times the weights, and attention with the square of its tokens. Groups of the
busiest rank and of an idler one change places while that makes the busiest less busy. A group stays in its update, so every update trains
on the same responses as without.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ais_megatron.batch import Batch
from ais_megatron.config import Architecture, Config
from ais_megatron.distributed import all_reduce_sum, gather_batch
from ais_megatron.planning.cost import forward_flops
from ais_megatron.policy.parallel import data_parallel_group

LEAST_GAIN = 0.01  # a swap must make the busiest of two ranks this much less busy, as a share of the mean work of a rank

Held = list[list[tuple[int, int]]]
"""For each rank, the groups that it trains on: (the rank that has it now, its number there)."""


class Work(NamedTuple):
    """What an update computes."""

    of_ranks: list[float]
    """FLOPs of each data-parallel rank's rows."""
    of_microbatches: float
    """The largest microbatch over the mean one, as a mean over ranks."""
    computed: float
    """Tokens that go through the layers."""
    real: float
    """Tokens of all rows."""

    @staticmethod
    def of_this_rank(microbatches: list[float], computed: int, real: int) -> Tensor:
        """float64 ``[ranks + 3]``, to be added up over the data-parallel ranks. microbatches: FLOPs of each."""
        group = data_parallel_group()
        ranks = [0.0] * dist.get_world_size(group)
        ranks[dist.get_rank(group)] = total = sum(microbatches)
        spread = max(microbatches) * len(microbatches) / total if total else 1.0
        return torch.tensor([*ranks, spread / len(ranks), computed, real], dtype=torch.float64)

    @staticmethod
    def of(sums: Tensor) -> Work:
        *ranks, spread, computed, real = sums.tolist()
        return Work(ranks, spread, computed, real)

    @property
    def metrics(self) -> dict[str, float]:
        return {
            "rank_work_max_over_mean": max(self.of_ranks) * len(self.of_ranks) / max(sum(self.of_ranks), 1.0),
            "microbatch_work_max_over_mean": self.of_microbatches,
            "computed_over_real_tokens": self.computed / max(self.real, 1.0),
        }


def work_of(lengths: Tensor, architecture: Architecture) -> Tensor:
    """float64 ``[rows]``, FLOPs of a forward pass over each row."""
    return torch.tensor([forward_flops(architecture, 1, length) for length in lengths.tolist()], dtype=torch.float64)


def balance(batch: Batch, groups: list[int], config: Config) -> tuple[Batch, list[int]]:
    """The rows on which this data-parallel rank trains, and the numbers of their groups.

    Collective over the data-parallel ranks: one reduction, and if groups move, one exchange of these. It changes nothing if ranks have
    different numbers of groups, or parts of groups in an update.

    groups: the numbers of the batch's groups in the prompt stream, in the order of its rows.
    """
    group, updates, size = data_parallel_group(), config.train.updates_per_batch, config.rollout.group_size
    ranks, mine = dist.get_world_size(group), dist.get_rank(group)
    if not config.train.balance or ranks == 1 or config.rollout.prompts_per_step % ranks or len(groups) % updates:
        return batch, groups
    known = torch.zeros(2, ranks, len(groups), dtype=torch.float64)
    known[0, mine] = work_of(batch.lengths, config.architecture).view(-1, size).sum(1)
    known[1, mine] = torch.tensor(groups, dtype=torch.float64)
    work, numbers = all_reduce_sum(known, group)
    held: Held = [[] for _ in range(ranks)]
    for part in torch.arange(len(groups)).chunk(updates):
        for rank, its in enumerate(swapped(work[:, part].tolist())):
            there = [(source, int(part[number])) for source, number in its]
            held[rank] += sorted(there, key=lambda place: float(numbers[place]))
    leaving = [sorted(place for rank in range(ranks) for place in held[rank] if place[0] == source != rank) for source in range(ranks)]
    if not any(leaving):
        return batch, groups
    own = torch.tensor([number for _, number in leaving[mine]], dtype=torch.int64)
    exchanged = gather_batch(batch.rows(_rows(own, size)), group)
    place_of = {(mine, number): number for number in range(len(groups))}
    place_of |= {place: len(groups) + i for i, place in enumerate(place for places in leaving for place in places)}
    index = torch.tensor([place_of[place] for place in held[mine]], dtype=torch.int64)
    joined = batch.joined(exchanged).rows(_rows(index, size))
    return joined.rows(torch.arange(len(joined)), int(joined.lengths.max())), [int(numbers[place]) for place in held[mine]]


def _rows(groups: Tensor, size: int) -> Tensor:
    """The rows of these groups, which lie one after the other."""
    return (groups[:, None] * size + torch.arange(size)).view(-1)


def swapped(work: list[list[float]]) -> Held:
    """Who holds which group after the swaps, from the work of each rank's groups. Every rank keeps its number of groups."""
    held = [[(rank, number) for number in range(len(its))] for rank, its in enumerate(work)]
    loads = [sum(its) for its in work]
    least = LEAST_GAIN * sum(loads) / len(loads)
    while True:
        high = max(range(len(loads)), key=loads.__getitem__)
        for low in sorted(range(len(loads)), key=loads.__getitem__):  # the idlest first
            excess = loads[high] - loads[low]
            pairs = [
                (abs(more - less - excess / 2), i, j, more - less)
                for i, more in enumerate(work[source][number] for source, number in held[high])
                for j, less in enumerate(work[source][number] for source, number in held[low])
                if least < min(more - less, excess - (more - less))
            ]
            if pairs:
                break
        else:
            return held
        _, i, j, moved = min(pairs)
        held[high][i], held[low][j] = held[low][j], held[high][i]
        loads[high] -= moved
        loads[low] += moved
