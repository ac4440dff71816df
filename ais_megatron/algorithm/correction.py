"""Importance weights between the rollout engine's distribution mu and the trainer's pi_old, and their mixing.

    l = clamp(old_logprobs - rollout_logprobs, -20, 20),   w = exp(l),   wbar = min(w, C),   s = 1 + alpha (wbar - 1)

Pure functions of ``[batch, seq]`` tensors; nothing here knows Megatron or a process group.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0


def log_importance_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """l, in the inputs' dtype; clamped so that one corrupt token can reach neither inf nor NaN."""
    return (old_logprobs - rollout_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def truncated_is_weights(old_logprobs: Tensor, rollout_logprobs: Tensor, weight_cap: float) -> Tensor:
    """wbar, the truncated importance weight of every token."""
    return log_importance_ratio(old_logprobs, rollout_logprobs).exp().clamp(max=weight_cap)


def mixed_weights(truncated_weights: Tensor, alpha: float) -> Tensor:
    """s = 1 + alpha (wbar - 1): the uncorrected gradient at alpha 0, truncated importance sampling at alpha 1.

    In this form a weight of exactly 1 gives exactly 1, whatever alpha (Proposition 3: no mismatch, no change).
    """
    return torch.ones_like(truncated_weights).add_(truncated_weights - 1.0, alpha=alpha)
