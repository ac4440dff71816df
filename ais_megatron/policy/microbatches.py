"""Splitting rows into microbatches by a token budget: sort by length, fill, pad to the longest.

The split changes memory and speed only: losses are sums with one global normaliser, so gradients do not depend on it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ais_megatron.batch import Batch


def split_by_tokens(lengths: Tensor, budget: int, at_least: int = 1) -> list[Tensor]:
    """Row numbers of each microbatch.

    Args:
        lengths: int64 ``[batch]``.
        budget: padded tokens (rows times longest row) that a microbatch may hold; a longer single row gets its own.
        at_least: microbatches wanted, for ranks that must run equally many; at most one per row.
    Returns:
        index tensors that together name every row once, longest rows first.
    """
    order = torch.argsort(lengths, descending=True, stable=True)
    groups: list[Tensor] = []
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        rows = max(1, budget // longest)
        groups.append(order[start : start + rows])
        start += rows
    while len(groups) < min(at_least, len(lengths)):
        largest = max(range(len(groups)), key=lambda i: len(groups[i]))
        half = len(groups[largest]) // 2
        groups[largest : largest + 1] = [groups[largest][:half], groups[largest][half:]]
    return groups


def make_microbatches(batch: Batch, budget: int, multiple: int = 1, at_least: int = 1) -> list[tuple[Batch, Tensor]]:
    """(rows cut to their longest, their row numbers) for each microbatch; lengths are rounded up to `multiple`, to
    which the batch has been padded before (`pad_columns`)."""
    microbatches = []
    for index in split_by_tokens(batch.lengths, budget, at_least):
        longest = int(batch.lengths[index].max())
        microbatches.append((batch.rows(index, longest + -longest % multiple), index))
    return microbatches


def idle_microbatch(batch: Batch, multiple: int) -> tuple[Batch, Tensor]:
    """A row that counts for nothing (no loss token, no real token), for a rank that has run out of its own."""
    index = torch.zeros(1, dtype=torch.int64)
    row = batch.rows(index, multiple)
    return replace(row, loss_mask=torch.zeros_like(row.loss_mask), lengths=torch.zeros_like(row.lengths)), index


def pad_columns(batch: Batch, multiple: int) -> Batch:
    """The batch with its columns padded to a multiple: sequence parallelism shards them over the TP group."""
    width = batch.tokens.shape[1]
    return batch.pad_columns(width + -width % multiple)
