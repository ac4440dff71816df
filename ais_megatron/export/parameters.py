"""How Megatron puts Hugging Face tensors together: `join` makes a parameter, and `split` takes it apart again.

Rows of a family's table with the same Megatron name are the parts of one parameter. Three parts are Q, K and V, interleaved by KV group, as
weights or biases. Two parts lie one above the other, such as gate and up. Both functions also work on the shard of a tensor-parallel rank.

With gated attention the Hugging Face tensor of Q has the rows ``[q, gate]`` head by head, and Megatron has all q of a group before all
gates.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ais_megatron.config import Architecture


def split(parameter: Tensor, heights: Sequence[int], architecture: Architecture) -> list[Tensor]:
    """The parts of a Megatron parameter, of which each has so many rows."""
    if len(heights) == 1:
        return [parameter]
    if len(heights) == 2:
        return list(parameter.split(list(heights)))
    of_query = _query_heads(architecture)
    heads = parameter.view(-1, of_query + 2, architecture.head_dim, *parameter.shape[1:])
    query, key, value = heads.split([of_query, 1, 1], dim=1)
    if architecture.family.gated_attention:
        query = query.unflatten(1, (2, -1)).transpose(1, 2)
        return [query.flatten(0, 3), key.flatten(0, 2), value.flatten(0, 2)]
    return [x.flatten(0, 2) for x in (query, key, value)]


def join(parts: list[Tensor], architecture: Architecture) -> Tensor:
    """The inverse of `split`."""
    if len(parts) < 3:
        return torch.cat(parts)
    of_query = _query_heads(architecture)
    query, key, value = (x.view(-1, heads, architecture.head_dim, *x.shape[1:]) for x, heads in zip(parts, (of_query, 1, 1), strict=True))
    if architecture.family.gated_attention:
        query = query.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([query, key, value], dim=1).flatten(0, 2)


def _query_heads(architecture: Architecture) -> int:
    """Heads of a KV group that Q has: one for each query head, and one for its gate if there is any."""
    per_group = architecture.num_attention_heads // architecture.num_key_value_heads
    return 2 * per_group if architecture.family.gated_attention else per_group
