"""Splits rows into microbatches with a token budget: sort by length, fill, pad to the longest row.

The split changes only memory and speed. Losses are sums with one global divisor, so gradients do not depend on the split. They do not
depend on `Shapes` either, because its padding is removed before the loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ais_megatron.batch import Batch
from ais_megatron.shapes import AS_IS, Shapes


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
