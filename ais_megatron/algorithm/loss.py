"""The clipped policy-gradient loss, as a sum over tokens.

    loss = - sum_t weight_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t),   r_t = exp(logprobs - old_logprobs)

weight_t comes from `AISLossScaler`; the division by the global number of tokens is Megatron's.
"""

from __future__ import annotations

import torch
from torch import Tensor

POLICY_METRICS = ("loss", "entropy", "policy_ratio_mean", "clip_fraction")


def clipped_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    token_weights: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of one microbatch.

    Args:
        logprobs: float32 ``[batch, seq]`` with grad; old_logprobs, token_weights: the same shape, no grad.
        advantages: float32 ``[batch]``; loss_mask: bool ``[batch, seq]``.
    Returns:
        (loss sum, float32 scalar; policy_ratio ``[batch, seq]``; clipped, bool ``[batch, seq]``).
    """
    advantages = advantages[:, None]
    # Outside the mask both are set to 0 before the exponential, so that padding can produce neither inf nor a gradient.
    log_ratio = (logprobs - old_logprobs).masked_fill(~loss_mask, 0.0)
    policy_ratio = log_ratio.exp()
    unclipped = policy_ratio * advantages
    clipped = policy_ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    loss = -(token_weights * torch.minimum(unclipped, clipped)).sum()
    return loss, policy_ratio.detach(), ((clipped < unclipped) & loss_mask).detach()


def masked_sum(values: Tensor, loss_mask: Tensor) -> Tensor:
    """float64 scalar, detached."""
    return values.detach().masked_fill(~loss_mask, 0.0).sum(dtype=torch.float64)
