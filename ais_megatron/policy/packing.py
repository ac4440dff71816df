"""Joins the rows of a microbatch to one sequence, without padding between them.

    rows      a b c d e        packed      a b c d e f g h i j k
              f g h
              i j k

All layers work on the joined sequence, and only attention knows rows: each has its own tokens as queries, and all its tokens as keys and
values. So log-probabilities and gradients are those of padded rows, up to rounding. If rows begin alike, the tokens with which they do may
be packed only once (`shared_prefixes`).

Megatron's local layers get a `Packed`, whose blocks of rows `SDPAttention` (model.py) computes one after the other. With context
parallelism every rank gathers the keys and values of all ranks. Transformer Engine gets the rows' limits (`qkv_format="thd"`), and has
kernels for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from ais_megatron.batch import Batch
from ais_megatron.policy.arranged import Arranged, zigzag
from ais_megatron.policy.parallel import ALONE, Context
from ais_megatron.policy.shared_prefixes import in_order, shared_with_previous
from ais_megatron.shapes import CUDA_COLUMNS

SIMILAR = 0.75  # rows of a block have at least this share of the queries of its largest one

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # queries, keys, values and mask, see `Packed.attend`


@dataclass(frozen=True)
class Block:
    """Rows whose attention is computed together."""

    queries: Tensor
    """int64 ``[rows, queries]``, places on this rank of each row's own tokens. Those beyond a row's end mean nothing."""
    keys: Tensor
    """int64 ``[rows, keys]``, places of all tokens of each row, the same."""
    mask: Tensor | None
    """float32 ``[rows, 1, queries, keys]``: 0 where the query attends to the key, -inf elsewhere. None if every row is whole here, so that
    causal attention needs no mask. (A single long row would have a very large one.)"""


@dataclass
class Packed(PackedSeqParams):
    """What attention knows of joined rows. Megatron passes this object unchanged to the core attention, also if it recomputes layers."""

    qkv_format: str = "sbhd"  # Megatron handles Q, K and V as if they were one ordinary row
    blocks: tuple[Block, ...] = ()
    outputs: Tensor = field(default_factory=lambda: torch.zeros(0))
    """int64 ``[places]``, the number of each of this rank's places among the queries of all blocks, one after the other."""
    context: Context = ALONE

    def attend(self, attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention within rows.

        Args:
            attention: gets queries, keys and values ``[rows, heads, tokens, head_dim]`` and a block's mask, and returns what the queries
                have.
            query, key, value: ``[places, heads, head_dim]``; keys and values may have fewer heads.
        Returns:
            ``[places, heads * head_dim]``.
        """
        if not self.blocks:  # there is nothing but padding
            return query.flatten(1)
        if self.context.size > 1:
            # The backward pass adds up what all ranks have for each key, because each rank has other queries.
            both = torch.cat([key, value], -1)
            both = gather_from_sequence_parallel_region(both, tensor_parallel_output_grad=True, group=self.context.group)
            key, value = both.split([key.shape[-1], value.shape[-1]], -1)

        def rows(x: Tensor, places: Tensor) -> Tensor:
            return x.flatten(1).index_select(0, places.flatten()).view(*places.shape, *x.shape[1:]).transpose(1, 2)

        parts = [
            attention(rows(query, block.queries), rows(key, block.keys), rows(value, block.keys), block.mask).transpose(1, 2).flatten(0, 1)
            for block in self.blocks
        ]
        return torch.cat(parts).flatten(1).index_select(0, self.outputs)


def pack(rows: Batch, multiple: int = 1, context: Context = ALONE, *, share: bool = False, thd: bool = False) -> Arranged:
    """The rows of a microbatch as one sequence.

    Args:
        rows: there may be none. Then the sequence is padding.
        multiple: a rank's number of tokens is padded to a multiple of this, at the end of the last row.
        share: tokens with which rows begin alike are packed once. Not together with context parallelism.
        thd: for Transformer Engine.
    """
    assert not share or context.size == 1, "a shared token would be needed on several ranks"
    rows = rows if len(rows) else rows.pad_rows(1)
    seq, columns = rows.tokens.shape[1], torch.arange(rows.tokens.shape[1], device=rows.tokens.device)
    order = in_order(rows.tokens) if share else torch.arange(len(rows), device=columns.device)
    lengths = rows.lengths[order]
    # The number of the first token that each row has for itself, and of how many tokens it has.
    first = shared_with_previous(rows.tokens[order], lengths) if share else torch.zeros_like(lengths)
    sizes = sizes_of(lengths - first, multiple, context.size)
    starts = sizes.cumsum(0) - sizes
    own = (columns >= first[:, None]) & (columns < lengths[:, None])
    owner, number = zigzag((columns - first[:, None]).clamp(min=0), sizes[:, None], context.size)
    local = int(sizes.sum()) // context.size
    places = (owner * local + starts[:, None] // context.size + number).masked_fill_(~own, 0)
    mine = own & (owner == context.rank)
    sources = torch.full((local,), -1, device=columns.device)
    sources[places[mine] - context.rank * local] = (order[:, None] * seq + columns)[mine]
    if share:
        places = places.cummax(0).values  # a shared token has the place of the last row up to its own that has it for itself
    known = sources.clamp(min=0)
    if thd:
        packed = _limits_of(sizes, context.size)
    else:
        blocks = _blocks(places, first, lengths, sizes, starts, context)
        packed = Packed(blocks=blocks, outputs=_outputs(blocks, local), context=context, max_seqlen_q=seq, max_seqlen_kv=seq)
    return Arranged(
        tokens=rows.tokens.flatten()[known].masked_fill_(sources < 0, 0)[None],
        sources=sources,
        places=places[order.argsort()],
        positions=known % seq,
        context=context,
        packed=packed,
    )


def sizes_of(counts: Tensor, multiple: int, ranks: int) -> Tensor:
    """int64 ``[rows]``: the tokens of rows that have `counts`, with their padding. The last row gets that of the whole sequence."""
    sizes = counts if ranks == 1 else counts + -counts % (2 * ranks)
    unit = multiple if ranks == 1 else math.lcm(multiple, 2) * ranks
    total = max(int(sizes.sum()), 1)
    end = torch.arange(len(sizes), device=sizes.device) == len(sizes) - 1
    return sizes + end * (total + -total % unit - int(sizes.sum()))


def _limits_of(sizes: Tensor, ranks: int) -> PackedSeqParams:
    """For Transformer Engine. Padding counts as tokens at the end of its row, to which no real token attends. So every kernel will do, also
    those that know no padding between rows."""
    limits = F.pad(sizes.cumsum(0), (1, 0)).int()
    longest = int(sizes.max())
    longest += -longest % (CUDA_COLUMNS * ranks)  # few shapes, as in `Shapes`
    if longest == int(limits[-1]) and len(sizes) > 1:
        longest += CUDA_COLUMNS * ranks  # as many rotary angles as tokens would mean to Megatron that rows do not begin at position 0
    return PackedSeqParams(qkv_format="thd", cu_seqlens_q=limits, cu_seqlens_kv=limits, max_seqlen_q=longest, max_seqlen_kv=longest)


def _blocks(places: Tensor, first: Tensor, lengths: Tensor, sizes: Tensor, starts: Tensor, context: Context) -> tuple[Block, ...]:
    """All queries of this rank. A row without own tokens is in no block."""
    ranks = context.size
    if ranks == 1:
        return tuple(_block(places[p], starts[p], first[p], (lengths - first)[p]) for p in _similar(lengths - first))
    chunk = sizes // (2 * ranks)
    return tuple(
        _block(places[p], starts[p] // ranks + half * chunk[p], number * chunk[p], chunk[p])
        for p in _similar(chunk)
        for half, number in enumerate((context.rank, 2 * ranks - 1 - context.rank))
    )


def _similar(counts: Tensor) -> list[Tensor]:
    """Row numbers of blocks whose rows have similar counts, so that little is padded to the largest."""
    ordered, order = counts.sort(descending=True, stable=True)
    values = [value for value in ordered.tolist() if value]
    parts: list[Tensor] = []
    start = 0
    for row, value in enumerate(values):
        if value < SIMILAR * values[start]:
            parts.append(order[start:row])
            start = row
    return [part.sort().values for part in (*parts, order[start : len(values)]) if len(part)]


def _block(places: Tensor, start: Tensor, column: Tensor, counts: Tensor) -> Block:
    """The given rows' queries. In each row they begin at this place of this rank and at this column, and there are so many of them."""
    steps = torch.arange(int(counts.max()), device=places.device)
    queries = torch.where(steps < counts[:, None], start[:, None] + steps, -1)
    if not int(column.max()):
        return Block(queries, places[:, : len(steps)], None)
    keys = torch.arange(min(int((column + counts).max()), places.shape[1]), device=places.device)
    visible = keys <= (column[:, None] + steps)[..., None]
    mask = torch.zeros(visible.shape, device=places.device).masked_fill_(~visible, -torch.inf)
    return Block(queries, places[:, : len(keys)], mask[:, None])


def _outputs(blocks: tuple[Block, ...], local: int) -> Tensor:
    """See `Packed.outputs`. Marks of absent queries are removed from the blocks."""
    outputs = torch.zeros(local, dtype=torch.int64, device=blocks[0].queries.device if blocks else None)
    if blocks:
        asked = torch.cat([block.queries.flatten() for block in blocks])
        outputs[asked[asked >= 0]] = (asked >= 0).nonzero()[:, 0]
    for block in blocks:
        block.queries.clamp_(min=0)
    return outputs
