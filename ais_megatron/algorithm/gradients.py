"""Sketches of each response's gradient, from which `measured` chooses the strength of the correction.

The gradient of log pi(y_t) with respect to the output layer is the outer product of the token's score e_y - p (over the vocabulary) and
the hidden state h. Weighted by A and s, and summed over a response, it is one estimate of the policy gradient. It is far too large to keep,
so both factors are projected on a few random columns, R ``[vocab, a]`` and Q ``[hidden, b]``:

    phi_i(s) = sum_t s_t A_i (R^T (e_y - p)_t) outer (Q^T h_t)           a * b numbers for each response

The entries of R are +-1/sqrt(a) and those of Q +-1/sqrt(b), so the expectation of <phi_i, phi_j> over R and Q is the inner product of the
true gradients. R and Q depend on their sizes alone, so they are the same on all ranks, in all layouts and in all runs.

phi is linear in s. With s = 1 + alpha (v - 1), where v is w with some limit such as min(w, C), one vector for s = 1 and one for v - 1 with
each limit give phi for all alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ais_megatron.algorithm.correction import Correction, log_importance_ratio

SCORE_COLUMNS, STATE_COLUMNS = 8, 16  # a and b
SIZE = SCORE_COLUMNS * STATE_COLUMNS
_SEED = 2605_13907


class Sketch(NamedTuple):
    """The random columns. They are not parameters of the model, and no checkpoint holds them."""

    signs: Tensor
    """R, float32 ``[vocab, a]``."""
    directions: Tensor
    """Q, in the dtype of the hidden states, ``[hidden, b]``."""

    @staticmethod
    def random(vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Sketch:
        generator = torch.Generator().manual_seed(_SEED)

        def columns(rows: int, count: int) -> Tensor:
            return (torch.randint(0, 2, (rows, count), generator=generator) * 2 - 1) / count**0.5

        return Sketch(columns(vocab_size, SCORE_COLUMNS).to(device), columns(hidden_size, STATE_COLUMNS).to(device, dtype))


class GradientSums(NamedTuple):
    """Sums over the groups of a batch. Those of several ranks add up. With K limits, number 0 stands for s = 1 and k for v_k - 1."""

    groups: Tensor
    """float64 scalar, groups with at least one token in the loss."""
    tokens: Tensor
    """float64 scalar, tokens in the loss."""
    sums: Tensor
    """float64 ``[1 + K, SIZE]``, sums of phi."""
    products: Tensor
    """float64 ``[1 + K, 1 + K]``, sums over groups of the inner products of a group's phi."""

    def flat(self) -> Tensor:
        """One vector, for a reduction together with others."""
        return torch.cat([x.reshape(-1) for x in self])

    @staticmethod
    def length(limits: int) -> int:
        """The length of `flat`."""
        return 2 + (1 + limits) * (SIZE + 1 + limits)

    @staticmethod
    def of(flat: Tensor) -> GradientSums:
        """The reverse of `flat`."""
        kinds = round(((SIZE**2 + 4 * (len(flat) - 2)) ** 0.5 - SIZE) / 2)
        sums, products = flat[2:].split([kinds * SIZE, kinds * kinds])
        return GradientSums(flat[0], flat[1], sums.view(kinds, SIZE), products.view(kinds, kinds))


class ResponseGradients:
    """phi of every response of this data-parallel rank's batch, filled one microbatch after the other.

    Responses of a group share their baseline, so not they but groups are independent. A diffusion model's response has one row for each of
    its masks, and its phi is the sum over them.

    Args:
        limits: corrections of single tokens; each limits the weights in another way.
        rows: number of rows: whole groups of `group_size` responses one after the other, first all under one mask, then all under the next.
        mean_of_responses: whether the loss is the mean over responses of their tokens' means, and not over all tokens.
        masks: number of rows of each response.
    """

    def __init__(self, limits: Sequence[Correction], rows: int, group_size: int, mean_of_responses: bool, masks: int = 1) -> None:
        assert rows % (group_size * masks) == 0, "the batch has parts of a group"
        self._limits = limits
        self._group_size, self._mean_of_responses, self._masks = group_size, mean_of_responses, masks
        self._phi = torch.zeros(rows, 1 + len(limits), SIZE)
        self._tokens = torch.zeros(rows)
        self.length = GradientSums.length(len(limits))

    def add(
        self,
        index: Tensor,
        sketches: Tensor,
        old_logprobs: Tensor,
        rollout_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
        repeats: Tensor | None = None,
    ) -> None:
        """Set the rows in `index`. On a GPU nothing waits for the result.

        Args:
            index: int64 ``[rows]``, on the CPU.
            sketches: float32 ``[a + b, rows, seq]``, R^T (e_y - p) and Q^T h of every token in the mask.
            old_logprobs, rollout_logprobs: float32 ``[rows, seq]``; outside the mask any value is allowed.
            advantages: float32 ``[rows]``.
            loss_mask: bool ``[rows, seq]``.
            repeats: int64 ``[rows]``, how often the loss counts each token of a row; None: once.
        """
        device = sketches.device
        self._phi, self._tokens, index = self._phi.to(device), self._tokens.to(device), index.to(device)
        w = log_importance_ratio(old_logprobs.double(), rollout_logprobs.double()).exp()
        weights = torch.stack([torch.ones_like(w), *(limit.limited(w) - 1.0 for limit in self._limits)], 1)
        tokens = loss_mask.sum(1)
        factor = advantages.double() / tokens.clamp(min=1) if self._mean_of_responses else advantages.double()
        if repeats is not None:
            factor, tokens = factor * repeats, tokens * repeats
        weights = (weights * factor[:, None, None]).masked_fill_(~loss_mask[:, None], 0.0).float()
        scores, states = sketches.permute(1, 2, 0).split([SCORE_COLUMNS, STATE_COLUMNS], -1)
        self._phi[index] = weights @ (scores[..., None] * states[..., None, :]).flatten(2)
        self._tokens[index] = tokens.float()

    def sums(self) -> Tensor:
        """`GradientSums.flat` of this rank, float64 on the CPU."""
        kinds = self._phi.shape[1]
        phi = self._phi.double().view(self._masks, -1, self._group_size, kinds, SIZE).sum((0, 2))
        present = self._tokens.view(self._masks, -1, self._group_size).sum((0, 2)) > 0
        products = torch.einsum("gks,gls->kl", phi, phi)
        return GradientSums(present.sum().double(), self._tokens.sum().double(), phi.sum(0), products).flat().cpu()
