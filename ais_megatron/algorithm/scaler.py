"""`LossScaler`: all factors that multiply the policy loss.

Megatron runs with ``calculate_per_token_loss=True``. The loss function returns a sum and its number of tokens, and
`finalize_model_grads` divides all gradients once by the global number of tokens. So the factor of token t in response i is

    token mean:      s_t
    sequence mean:   s_t (T / N) / len_i       T, N: tokens and responses of the whole update
    constant length: s_t (T / N) / L           L: the longest response allowed (Dr.GRPO, arXiv 2503.20783)

and the result does not depend on microbatches, padding or the number of ranks. Rejected responses are not counted in T, N and len_i.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ais_megatron.algorithm.correction import Correction, log_importance_ratio, mixed_weights


class TokenFactors(NamedTuple):
    """The factors of one microbatch, ``[batch, seq]``, without grad, 0 (False) outside `kept`."""

    policy: Tensor
    """float32, the factor of the policy loss, before the division by T."""
    shares: Tensor
    """float32, the factor from the aggregation only (s = 1), for terms that are no estimates over mu: KL penalty and entropy."""
    kept: Tensor
    """bool, the loss mask without rejected responses."""
    counts: Tensor
    """int64, how often the loss counts a token. The sum is the number of tokens that the loss reports."""


@dataclass(frozen=True)
class LossScaler:
    """How strongly a batch is corrected, and how its loss is averaged."""

    alpha: float
    """The strength of the correction, in [0, 1]."""
    aggregation: str = "token"
    """token, sequence or constant."""
    correction: Correction = field(default_factory=Correction)
    """The correction that alpha scales."""
    mean_weight: float = 1.0
    """The global mean of s, by which batch normalisation divides: over tokens, or over responses if a response has one weight."""
    response_limit: int | None = None
    """L, needed by the aggregation "constant"."""
    tokens_per_sequence: float | None = None
    """T / N of the update, set by `for_update`."""

    @property
    def needs_totals(self) -> bool:
        return self.aggregation != "token"

    def for_update(self, num_tokens: float, num_sequences: float) -> LossScaler:
        """The scaler for one optimizer step over `num_tokens` kept tokens of `num_sequences` responses, counted globally."""
        return replace(self, tokens_per_sequence=num_tokens / max(num_sequences, 1.0))

    def factors(self, old_logprobs: Tensor, rollout_logprobs: Tensor, loss_mask: Tensor, repeats: Tensor | None = None) -> TokenFactors:
        """The factors of every token of one microbatch, see `TokenFactors`. Inputs are float32, the mask bool, all ``[batch, seq]``.

        repeats: int64 ``[batch]``, how often the tokens of a row count; None: once.
        """
        log_ratio = log_importance_ratio(old_logprobs, rollout_logprobs).detach()
        kept = self.correction.kept(log_ratio, loss_mask)
        weights = mixed_weights(self.correction.weights(log_ratio, loss_mask), self.alpha)
        if self.mean_weight != 1.0:
            weights /= self.mean_weight
        shares = self._shares(kept)
        if self.needs_totals:  # otherwise shares are 1 wherever the mask is
            weights *= shares
        counts = kept.long()
        if repeats is not None:
            counts *= repeats[:, None]
            weights, shares = weights * counts, shares * counts
        # A masked product instead of a multiplication by 0, because padding may have any value, even infinity.
        return TokenFactors(weights.masked_fill(~kept, 0.0), shares, kept, counts)

    def kept(self, old_logprobs: Tensor, rollout_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """Only `TokenFactors.kept`, for counting T and N."""
        return self.correction.kept(log_importance_ratio(old_logprobs, rollout_logprobs), loss_mask)

    def _shares(self, kept: Tensor) -> Tensor:
        if not self.needs_totals:
            return kept.float()
        assert self.tokens_per_sequence is not None, "this aggregation needs the update's totals: call for_update"
        if self.aggregation == "constant":
            assert self.response_limit is not None
            return kept * torch.tensor(self.tokens_per_sequence / self.response_limit, device=kept.device)
        return kept * (self.tokens_per_sequence / kept.sum(1, keepdim=True).clamp(min=1))
