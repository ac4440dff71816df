"""Advantages of responses whose groups stand together, from their rewards R.

group_std     (R - mean(group)) / (std(group) + floor)      GRPO, arXiv 2402.03300
group_mean    R - mean(group)                               Dr.GRPO, arXiv 2503.20783
reward        R                                             no baseline: plain REINFORCE

A reward of NaN stands for a response that was dropped: it is in no mean, and its own advantage is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def advantages_of(kind: str, rewards: Tensor, group_size: int, std_floor: float = 1e-6) -> Tensor:
    """float32 ``[num_groups * group_size]`` by the module's table; `rewards` has the same shape."""
    if kind == "reward":
        return rewards.float().nan_to_num(0.0)
    return group_relative_advantages(rewards, group_size, std_floor, divide_by_std=kind == "group_std")


def group_relative_advantages(rewards: Tensor, group_size: int, std_floor: float = 1e-6, divide_by_std: bool = True) -> Tensor:
    """Advantages of responses whose groups stand together.

    Args:
        rewards: float ``[num_groups * group_size]``.
        std_floor: added to the (unbiased) standard deviation.
    Returns:
        float32 ``[num_groups * group_size]``; exactly 0 throughout a group whose rewards are equal.
    """
    groups = rewards.to(torch.float64).view(-1, group_size)
    present = ~groups.isnan()
    count = present.sum(1, keepdim=True)
    advantages = torch.where(present, groups - groups.nansum(1, keepdim=True) / count.clamp(min=1), 0.0)
    if divide_by_std:
        variance = advantages.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + std_floor)
    # Equal rewards can leave 1e-17 of rounding, which a floor of 1e-6 would pass on as a signal.
    return advantages.masked_fill(~has_signal(rewards, group_size)[:, None], 0.0).float().view(-1)


def has_signal(rewards: Tensor, group_size: int) -> Tensor:
    """bool ``[num_groups]``: whether the rewards of a group differ; where they do not, it contributes no gradient."""
    groups = rewards.view(-1, group_size)
    return groups.nan_to_num(float("-inf")).amax(1) > groups.nan_to_num(float("inf")).amin(1)


def num_zero_signal_groups(rewards: Tensor, group_size: int) -> int:
    """Groups whose rewards are all equal."""
    return int((~has_signal(rewards, group_size)).sum())
