"""Advantages of responses whose groups stand together, from their rewards R.

group_std     (R - mean(group)) / (std(group) + floor)      GRPO, arXiv 2402.03300
group_mean    R - mean(group)                               Dr.GRPO, arXiv 2503.20783
reward        R                                             no baseline: plain REINFORCE
"""

from __future__ import annotations

import torch
from torch import Tensor


def advantages_of(kind: str, rewards: Tensor, group_size: int, std_floor: float = 1e-6) -> Tensor:
    """float32 ``[num_groups * group_size]`` by the module's table; `rewards` has the same shape."""
    if kind == "reward":
        return rewards.float()
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
    advantages = groups - groups.mean(1, keepdim=True)
    if divide_by_std:
        advantages = advantages / (groups.std(1, keepdim=True) + std_floor)
    # Equal rewards can leave 1e-17 of rounding, which a floor of 1e-6 would pass on as a signal.
    return advantages.masked_fill(~has_signal(rewards, group_size)[:, None], 0.0).float().view(-1)


def has_signal(rewards: Tensor, group_size: int) -> Tensor:
    """bool ``[num_groups]``: whether the rewards of a group differ; where they do not, it contributes no gradient."""
    groups = rewards.view(-1, group_size)
    return (groups != groups[:, :1]).any(1)


def num_zero_signal_groups(rewards: Tensor, group_size: int) -> int:
    """Groups whose rewards are all equal."""
    return int((~has_signal(rewards, group_size)).sum())
