"""`AISLossScaler`: every factor that multiplies the policy loss, in one place.

Megatron runs with ``calculate_per_token_loss=True``: the loss function returns a plain sum and its number of tokens, and
`finalize_model_grads` divides all gradients by the global number of tokens, once. So token t of response i needs

    token mean:     s_t
    sequence mean:  s_t (T / N) / len_i       T, N: tokens and responses of the whole update

and neither the microbatch split, nor padding, nor the number of ranks can enter the result.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ais_megatron.algorithm.correction import mixed_weights, truncated_is_weights


@dataclass(frozen=True)
class AISLossScaler:
    """alpha: in [0, 1]. weight_cap: C. tokens_per_sequence: T / N of the update, set by `for_update`."""

    alpha: float
    weight_cap: float
    aggregation: str
    tokens_per_sequence: float | None = None

    def for_update(self, num_tokens: float, num_sequences: float) -> AISLossScaler:
        """The scaler for one optimizer step over `num_tokens` tokens and `num_sequences` responses, counted globally."""
        return replace(self, tokens_per_sequence=num_tokens / max(num_sequences, 1.0))

    def token_weights(self, old_logprobs: Tensor, rollout_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
        """float32 ``[batch, seq]``: the factor of every token's loss before the division by T; 0 outside the mask."""
        weights = mixed_weights(truncated_is_weights(old_logprobs, rollout_logprobs, self.weight_cap), self.alpha)
        if self.aggregation == "sequence":
            assert self.tokens_per_sequence is not None, "sequence aggregation needs the update's totals: call for_update"
            weights = weights * (self.tokens_per_sequence / loss_mask.sum(1, keepdim=True).clamp(min=1))
        return weights.masked_fill(~loss_mask, 0.0).detach()
