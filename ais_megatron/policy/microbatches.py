"""Splitting rows into microbatches by a token budget: sort by length, fill, pad to the longest.

The split changes memory and speed only: losses are sums with one global normaliser, so gradients do not depend on it. Nor
do they depend on `Shapes`, because what it adds is cut off again before the loss.
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
        budget: padded tokens (rows times columns that the model is given) that a microbatch may hold; a longer single row gets
            its own.
        at_least: microbatches wanted, for ranks that must run equally many; at most one per row.
    Returns:
        index tensors that together name every row once, longest rows first.
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
    """The rows of `index` cut to their longest, rounded up to `multiple`, to which the batch has been padded before (`pad_columns`).

    Without any row it is an idle one: of `multiple` columns, which `Shapes.fill` makes a row that counts for nothing, for a rank that has
    run out of its own.
    """
    longest = int(batch.lengths[index].max()) if len(index) else 1
    return batch.rows(index, longest + -longest % multiple)


def pad_columns(batch: Batch, multiple: int) -> Batch:
    """The batch with its columns padded to a multiple: sequence parallelism shards them over the TP group."""
    width = batch.tokens.shape[1]
    return batch.pad_columns(width + -width % multiple)
