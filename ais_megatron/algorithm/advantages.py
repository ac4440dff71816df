"""Advantages of responses from their rewards R. The responses of a group are adjacent.

group_std     (R - mean(group)) / (std(group) + floor)      GRPO, arXiv 2402.03300
group_mean    R - mean(group)                               Dr.GRPO, arXiv 2503.20783
reward        R                                             no baseline: plain REINFORCE

A reward of NaN means that the response was dropped. It is in no mean, and its advantage is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def advantages_of(kind: str, rewards: Tensor, group_size: int, std_floor: float = 1e-6) -> Tensor:
    """Advantages by the module's table, float32 ``[num_groups * group_size]``. `rewards` has the same shape."""
    if kind == "reward":
        return rewards.float().nan_to_num(0.0)
    return group_relative_advantages(rewards, group_size, std_floor, divide_by_std=kind == "group_std")


def group_relative_advantages(rewards: Tensor, group_size: int, std_floor: float = 1e-6, divide_by_std: bool = True) -> Tensor:
    """Advantages relative to the group. The responses of a group are adjacent.

    Args:
        rewards: float ``[num_groups * group_size]``.
        std_floor: added to the (unbiased) standard deviation.
    Returns:
        float32 ``[num_groups * group_size]``; exactly 0 in a group whose rewards are all equal.
    """
    groups = rewards.to(torch.float64).view(-1, group_size)
    present = ~groups.isnan()
    count = present.sum(1, keepdim=True)
    advantages = torch.where(present, groups - groups.nansum(1, keepdim=True) / count.clamp(min=1), 0.0)
    if divide_by_std:
        variance = advantages.square().sum(1, keepdim=True) / (count - 1).clamp(min=1)
        advantages = advantages / (variance.sqrt() + std_floor)
    # Equal rewards can leave a rounding error of 1e-17, which a floor of 1e-6 would turn into a signal.
    return advantages.masked_fill(~has_signal(rewards, group_size)[:, None], 0.0).float().view(-1)


def has_signal(rewards: Tensor, group_size: int) -> Tensor:
    """bool ``[num_groups]``: whether the rewards of a group differ. A group of equal rewards contributes no gradient."""
    groups = rewards.view(-1, group_size)
    return groups.nan_to_num(float("-inf")).amax(1) > groups.nan_to_num(float("inf")).amin(1)


def num_zero_signal_groups(rewards: Tensor, group_size: int) -> int:
    """Number of groups whose rewards are all equal."""
    return int((~has_signal(rewards, group_size)).sum())
