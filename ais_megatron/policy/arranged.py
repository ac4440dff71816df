"""Where the tokens of a microbatch's rows lie in what the model gets.

The model gets sequences of equal length, and its hidden states are ``[seq, sequences, hidden]``. A *place* is a position in them, counted
in this order. Rows become sequences in two ways: each row is padded to a sequence (`padded`), or all rows are joined to one (`packing`).
The rest of the policy asks only `Arranged` where a token is.

With context parallelism a rank has only a part of each sequence. It is cut into 2 cp chunks of equal length, and rank r has the chunks r
and 2 cp - 1 - r (`zigzag`). So all ranks have equally much causal attention to compute. Places are then counted over all ranks, one rank
after the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from ais_megatron.batch import Batch
from ais_megatron.policy.parallel import ALONE, Context
from ais_megatron.shapes import Shapes


@dataclass(frozen=True)
class Arranged:
    """A microbatch as the model gets it on this rank."""

    tokens: Tensor
    """int64 ``[sequences, seq/cp]``."""
    sources: Tensor
    """int64 ``[seq/cp * sequences]``: for each place on this rank, the number of its token in ``rows.tokens.flatten()``; -1 in padding."""
    places: Tensor
    """int64 ``[batch, seq]``, the place of each row's token. Beyond a row's end it means nothing."""
    positions: Tensor | None
    """int64 ``[seq/cp]``, each token's position in its row, for the rotary embedding; None if it is 0, 1, 2, …"""
    context: Context
    padding: Tensor | None = None
    """`Batch.padding` of the sequences, for a bidirectional model."""
    packed: PackedSeqParams | None = None
    """How rows are joined, for the attention; None if each sequence is a row."""

    @property
    def is_real(self) -> Tensor:
        """bool ``[places]``, False in padding."""
        return self.sources >= 0

    def of_places(self, values: Tensor) -> Tensor:
        """``[batch, seq, ...]`` in the order of this rank's places, ``[places, ...]``. In padding it means nothing."""
        if not len(values):  # a microbatch of padding
            return values.new_zeros(len(self.sources), *values.shape[2:])
        return values.flatten(0, 1)[self.sources.clamp(min=0)]

    def on_this_rank(self, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the given tokens are on this rank (numbers), and their places among those of this rank."""
        places = self.places[rows, columns]
        if self.context.size == 1:
            return torch.arange(len(places), device=places.device), places
        local = places - self.context.rank * len(self.sources)
        here = ((local >= 0) & (local < len(self.sources))).nonzero()[:, 0]
        return here, local[here]


def zigzag(numbers: Tensor, lengths: Tensor | int, ranks: int) -> tuple[Tensor, Tensor]:
    """(rank, number on that rank) of the tokens with these numbers in sequences of these lengths, which are multiples of 2 * ranks."""
    if ranks == 1:
        return torch.zeros_like(numbers), numbers
    size = torch.as_tensor(lengths, device=numbers.device).div(2 * ranks, rounding_mode="floor").clamp(min=1)
    chunk = numbers // size
    return torch.minimum(chunk, 2 * ranks - 1 - chunk), numbers % size + size * (chunk >= ranks)


def padded(rows: Batch, shapes: Shapes, context: Context = ALONE, *, bidirectional: bool = False) -> Arranged:
    """Each row as one sequence, padded to an allowed shape. bidirectional: tokens attend to later ones, so padding must be hidden."""
    given = shapes.fill(rows)
    (batch, seq), (sequences, width) = rows.tokens.shape, given.tokens.shape
    columns = torch.arange(width, device=given.tokens.device)
    owner, number = zigzag(columns, width, context.size)
    mine = columns[owner == context.rank]
    sources = torch.arange(sequences, device=columns.device) * seq + mine[:, None]
    first = owner * len(mine) + number  # of the sequence 0; the other sequences follow
    return Arranged(
        tokens=given.read[:, mine],
        sources=sources.masked_fill(mine[:, None] >= given.lengths, -1).flatten(),
        places=first[:seq] * sequences + torch.arange(batch, device=columns.device)[:, None],
        positions=None if context.size == 1 else mine,
        context=context,
        padding=given.padding if bidirectional else None,
    )
