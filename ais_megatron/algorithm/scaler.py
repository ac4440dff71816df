"""`LossScaler`: every factor that multiplies the policy loss, in one place.

Megatron runs with ``calculate_per_token_loss=True``: the loss function returns a plain sum and its number of tokens, and
`finalize_model_grads` divides all gradients by the global number of tokens, once. So token t of response i needs

    token mean:      s_t
    sequence mean:   s_t (T / N) / len_i       T, N: tokens and responses of the whole update
    constant length: s_t (T / N) / L           L: the longest response allowed (Dr.GRPO, arXiv 2503.20783)

and neither the microbatch split, nor padding, nor the number of ranks can enter the result. Rejected responses are in
none of T, N and len_i.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ais_megatron.algorithm.correction import Correction, log_importance_ratio, mixed_weights


class TokenFactors(NamedTuple):
    """Of one microbatch, ``[batch, seq]``, no grad, 0 (False) outside `kept`.

    policy: float32, the factor of the policy loss, before the division by T.
    shares: float32, the aggregation alone (s = 1): the factor of what is no estimate over mu, KL penalty and entropy.
    kept: bool, the loss mask without rejected responses; its sum is the number of tokens that the loss reports.
    """

    policy: Tensor
    shares: Tensor
    kept: Tensor


@dataclass(frozen=True)
class LossScaler:
    """How strongly and over what this batch is corrected."""

    alpha: float
    """The strength of the correction, in [0, 1]."""
    aggregation: str = "token"
    """token, sequence or constant."""
    correction: Correction = field(default_factory=Correction)
    """What is mixed in with strength alpha."""
    mean_weight: float = 1.0
    """The global mean of s, by which batch normalisation divides: over tokens, or over responses where one weight stands for a
    response."""
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

    def factors(self, old_logprobs: Tensor, rollout_logprobs: Tensor, loss_mask: Tensor) -> TokenFactors:
        """What multiplies every token of one microbatch; see `TokenFactors`. Inputs float32, bool ``[batch, seq]``."""
        log_ratio = log_importance_ratio(old_logprobs, rollout_logprobs).detach()
        kept = self.correction.kept(log_ratio, loss_mask)
        weights = mixed_weights(self.correction.weights(log_ratio, loss_mask), self.alpha)
        if self.mean_weight != 1.0:
            weights /= self.mean_weight
        shares = self._shares(kept)
        if self.needs_totals:  # otherwise shares are 1 wherever the mask is
            weights *= shares
        # A masked product, not a multiplication by 0: what padding holds is anything, infinity included.
        return TokenFactors(weights.masked_fill_(~kept, 0.0), shares, kept)

    def kept(self, old_logprobs: Tensor, rollout_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """`TokenFactors.kept` alone, for counting T and N."""
        return self.correction.kept(log_importance_ratio(old_logprobs, rollout_logprobs), loss_mask)

    def _shares(self, kept: Tensor) -> Tensor:
        if not self.needs_totals:
            return kept.float()
        assert self.tokens_per_sequence is not None, "this aggregation needs the update's totals: call for_update"
        if self.aggregation == "constant":
            assert self.response_limit is not None
            return kept * torch.tensor(self.tokens_per_sequence / self.response_limit, device=kept.device)
        return kept * (self.tokens_per_sequence / kept.sum(1, keepdim=True).clamp(min=1))
