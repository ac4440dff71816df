"""Group-relative advantages (GRPO, arXiv 2402.03300): A_i = (R_i - mean(group)) / (std(group) + floor)."""

from __future__ import annotations

import torch
from torch import Tensor


def group_relative_advantages(rewards: Tensor, group_size: int, std_floor: float = 1e-6) -> Tensor:
    """Advantages of responses whose groups stand together.

    Args:
        rewards: float ``[num_groups * group_size]``.
        std_floor: added to the (unbiased) standard deviation.
    Returns:
        float32 ``[num_groups * group_size]``; exactly 0 throughout a group whose rewards are equal.
    """
    groups = rewards.to(torch.float64).view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    # Equal rewards can leave 1e-17 of rounding, which a floor of 1e-6 would pass on as a signal.
    equal = (groups == groups[:, :1]).all(1, keepdim=True)
    advantages = centred / (groups.std(1, keepdim=True) + std_floor)
    return advantages.masked_fill(equal, 0.0).float().view(-1)


def num_zero_signal_groups(rewards: Tensor, group_size: int) -> int:
    """Groups whose rewards are all equal: they contribute no gradient."""
    groups = rewards.view(-1, group_size)
    return int((groups == groups[:, :1]).all(1).sum())
