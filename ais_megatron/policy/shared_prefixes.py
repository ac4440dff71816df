"""Runs the tokens with which rows begin alike through the model only once.

The responses of a group begin with the same prompt, and all prompts with the same turns of the chat template. In a causal model equal
beginnings have equal hidden states. So `pack` puts every token of a microbatch that differs from the row before it into one sequence,
and nothing else:

    rows      a b c d e        packed      a b c d e . f g . h          (a dot marks where the tokens of the next row begin)
              a b c f g
              a b h

All layers work on the packed sequence, and only attention knows rows. There each row has its own tokens as queries, and all its tokens
as keys and values. The log-probabilities and gradients are those of whole rows, up to rounding. With prompts of 100 tokens, groups of 8
and responses of 100 tokens, 44 % fewer tokens go through the layers.

This needs an attention that takes any mask, which is `SDPAttention` (model.py). Transformer Engine's has no such mask, and a MoE model's
balance losses count every token of every row. So both use whole rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from ais_megatron.batch import Batch

MOST_ROW_TOKENS = 4
"""Attention gathers the keys and values of whole rows. So a microbatch may have this many times `train.tokens_per_microbatch` in its
rows, however few of them are packed."""

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # queries, keys, values and mask, see `Packed.attend`


@dataclass(frozen=True)
class Block:
    """Rows whose attention is computed together."""

    queries: Tensor
    """int64 ``[rows, queries]``, places in the packed sequence of each row's own tokens. Those beyond a row's end mean nothing."""
    keys: Tensor
    """int64 ``[rows, keys]``, places of all tokens of each row, the same."""
    mask: Tensor | None
    """float32 ``[rows, 1, queries, keys]``: 0 where the query attends to the key, -inf elsewhere. None if every row is whole here, so that
    causal attention needs no mask. (A single long row would have a very large one.)"""


@dataclass
class Packed(PackedSeqParams):
    """A microbatch as one sequence. Megatron passes this object unchanged to the core attention, also if it recomputes layers."""

    qkv_format: str = "sbhd"  # Megatron handles Q, K and V as if they were one ordinary row
    tokens: Tensor = field(default_factory=lambda: torch.zeros(1, 0))
    """int64 ``[1, packed]``."""
    positions: Tensor = field(default_factory=lambda: torch.zeros(0))
    """int64 ``[packed]``, each token's position in its row, for the rotary embedding."""
    lengths: Tensor = field(default_factory=lambda: torch.zeros(1))
    """int64 ``[1]``, the number of tokens before the padding."""
    places: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    """int64 ``[batch, seq]``, the place of each row's token in the packed sequence."""
    blocks: tuple[Block, ...] = ()
    outputs: Tensor = field(default_factory=lambda: torch.zeros(0))
    """int64 ``[packed]``, each token's place among the queries of all blocks, one after the other."""

    def attend(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention within rows.

        Args:
            attention: gets queries, keys and values ``[rows, heads, tokens, head_dim]`` and a block's mask, and returns what the queries
                have.
            query, key, value: ``[packed, heads, head_dim]``; keys and values may have fewer heads.
        Returns:
            ``[packed, heads * head_dim]``.
        """

        def rows(x: Tensor, places: Tensor) -> Tensor:
            return x.flatten(1).index_select(0, places.flatten()).view(*places.shape, *x.shape[1:]).transpose(1, 2)

        parts = [
            attention(rows(query, block.queries), rows(key, block.keys), rows(value, block.keys), block.mask).transpose(1, 2).flatten(0, 1)
            for block in self.blocks
        ]
        return torch.cat(parts).flatten(1).index_select(0, self.outputs)


def in_order(tokens: Tensor) -> Tensor:
    """Row numbers of ``[batch, seq]`` in alphabetical order, which puts rows that begin alike side by side."""
    return torch.unique(tokens, dim=0, return_inverse=True)[1].argsort(stable=True)


def shared_with_previous(tokens: Tensor, lengths: Tensor) -> Tensor:
    """int64 ``[batch]``: the number of tokens with which each row begins like the row before it."""
    equal = (tokens[1:] == tokens[:-1]).long().cumprod(1).sum(1)
    return F.pad(torch.minimum(equal, torch.minimum(lengths[1:], lengths[:-1])), (1, 0))


def split_sharing(batch: Batch, budget: int) -> list[Tensor]:
    """Row numbers of each microbatch, so that rows that begin alike are together.

    budget: most packed tokens of a microbatch. A single row that is longer gets its own microbatch.
    """
    order = in_order(batch.tokens)
    lengths = batch.lengths[order]
    shared = shared_with_previous(batch.tokens[order], lengths)
    groups: list[Tensor] = []
    start = packed = longest = 0
    for row, (length, own) in enumerate(zip(lengths.tolist(), (lengths - shared).tolist(), strict=True)):
        longest = max(longest, length)
        if row > start and (packed + own > budget or (row + 1 - start) * longest > MOST_ROW_TOKENS * budget):
            groups.append(order[start:row])
            start, packed, longest = row, 0, length
        packed += own if row > start else length
    return [*groups, order[start:]] if len(order) else []


def pack(rows: Batch, multiple: int = 1) -> Packed:
    """The rows of a microbatch as one sequence, padded to a multiple of `multiple` tokens. There must be a row."""
    order = in_order(rows.tokens)
    tokens, lengths = rows.tokens[order], rows.lengths[order]
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    first = shared_with_previous(tokens, lengths)  # the first of each row's own tokens
    own = (columns >= first[:, None]) & (columns < lengths[:, None])
    # A token has the place of the last row up to its own that has this column for itself.
    numbers = own.flatten().cumsum(0).view(own.shape) - 1
    places = numbers.masked_fill(~own, 0).cummax(0).values
    padding = -int(own.sum()) % multiple
    blocks = tuple(_block(places[part], first[part], lengths[part]) for part in _alike(lengths - first))
    outputs = places.new_zeros(int(own.sum()) + padding)
    asked = torch.cat([block.queries.flatten() for block in blocks])
    real = torch.cat([_is_own(first[part], lengths[part]).flatten() for part in _alike(lengths - first)])
    outputs[asked[real]] = real.nonzero()[:, 0]
    return Packed(
        tokens=F.pad(tokens[own], (0, padding))[None],
        positions=F.pad(columns.expand_as(own)[own], (0, padding)),
        lengths=own.sum()[None],
        places=places[order.argsort()],
        blocks=blocks,
        outputs=outputs,
        max_seqlen_q=tokens.shape[1],  # Megatron computes rotary angles for as many positions
        max_seqlen_kv=tokens.shape[1],
    )


def _alike(counts: Tensor) -> list[Tensor]:
    """Row numbers of the blocks: rows with many tokens of their own (each group's first), and rows with few. Otherwise all would be padded
    to the many. The border is where the blocks have the fewest queries, padding included. Rows without any token of their own are in no
    block."""
    ordered, order = counts.sort(descending=True, stable=True)
    ordered = ordered[: int((ordered > 0).sum())]
    many = torch.arange(len(ordered), device=counts.device)
    border = int((many * ordered[0] + (len(ordered) - many) * ordered).argmin())
    parts = (order[:border].sort().values, order[border : len(ordered)].sort().values)
    return [part for part in parts if len(part)]


def _is_own(first: Tensor, lengths: Tensor) -> Tensor:
    """bool ``[rows, queries]``: whether a row has as many tokens of its own."""
    counts = lengths - first
    return torch.arange(int(counts.max()), device=counts.device) < counts[:, None]


def _block(places: Tensor, first: Tensor, lengths: Tensor) -> Block:
    """The block of the given rows, whose own tokens begin at column `first`."""
    if not int(first.max()):
        whole = places[:, : int(lengths.max())]
        return Block(whole, whole, None)
    keys = torch.arange(int(lengths.max()), device=places.device)
    columns = first[:, None] + torch.arange(int((lengths - first).max()), device=places.device)
    visible = keys <= columns[..., None]
    mask = torch.zeros(visible.shape, device=places.device).masked_fill_(~visible, -torch.inf)
    return Block(places.gather(1, columns.clamp(max=places.shape[1] - 1)), places[:, : len(keys)], mask[:, None])
