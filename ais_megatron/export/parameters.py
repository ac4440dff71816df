"""How Megatron puts Hugging Face tensors together: `join` makes a parameter, and `split` takes it apart again.

Rows of a family's table with the same Megatron name are the parts of one parameter. Three parts are Q, K and V, interleaved by KV group, as
weights or biases. Two parts are gate and up, one above the other. Both functions also work on the shard of a tensor-parallel rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ais_megatron.config import Architecture


def split(parameter: Tensor, parts: int, architecture: Architecture) -> list[Tensor]:
    """The parts of a Megatron parameter."""
    if parts == 1:
        return [parameter]
    if parts == 2:
        return list(parameter.chunk(2))
    per_group = architecture.num_attention_heads // architecture.num_key_value_heads
    heads = parameter.view(-1, per_group + 2, architecture.head_dim, *parameter.shape[1:])
    return [x.flatten(0, 2) for x in heads.split([per_group, 1, 1], dim=1)]


def join(parts: list[Tensor], architecture: Architecture) -> Tensor:
    """The inverse of `split`."""
    if len(parts) < 3:
        return torch.cat(parts)
    per_group = architecture.num_attention_heads // architecture.num_key_value_heads
    grouped = [x.view(-1, heads, architecture.head_dim, *x.shape[1:]) for x, heads in zip(parts, (per_group, 1, 1), strict=True)]
    return torch.cat(grouped, dim=1).flatten(0, 2)
