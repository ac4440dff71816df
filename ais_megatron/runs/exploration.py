"""How much the responses of a group differ. If mismatch helps early in training, it does so through exploration, and this is where it
would show: more different responses, and more prompts that at least one of them solves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ais_megatron.batch import Rollout


class Judged(Protocol):
    """A reward."""

    @property
    def correct(self) -> bool: ...


def num_solved_groups(rewards: Sequence[Judged], group_size: int) -> int:
    """How many groups have a correct response. Divided by the number of groups it is pass@k of the training prompts, k = `group_size`."""
    return sum(any(reward.correct for reward in rewards[i : i + group_size]) for i in range(0, len(rewards), group_size))


def num_distinct(rollouts: Sequence[Rollout], group_size: int) -> int:
    """How many responses are left if equal ones of the same group count once. Dropped responses do not count."""
    groups = [rollouts[i : i + group_size] for i in range(0, len(rollouts), group_size)]
    return sum(len({tuple(rollout.token_ids) for rollout in group if not rollout.is_dropped}) for group in groups)
