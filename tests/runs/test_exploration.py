"""Solved prompts and different responses of a group, counted by hand."""

from __future__ import annotations

from ais_megatron.batch import DROPPED, Prompt, Rollout
from ais_megatron.runs.exploration import num_distinct, num_solved_groups
from ais_megatron.tasks.task import Reward


def response(*tokens: int, finish_reason: str = "stop") -> Rollout:
    return Rollout(Prompt(0, "", (1,), {}), tokens, (0.0,) * len(tokens), finish_reason, 0)


def test_a_group_is_solved_by_one_response() -> None:
    right, wrong = Reward(1.0, well_formed=True, correct=True), Reward(0.0, well_formed=True, correct=False)
    assert num_solved_groups([wrong, right, wrong, wrong, right, right], 2) == 2


def test_equal_responses_count_once_in_their_group_only() -> None:
    a, b = response(1, 2), response(1, 3)
    assert num_distinct([a, a, b, a, a, a], 3) == 3, "two of the first group and one of the second, although both have it"
    assert num_distinct([a, response(1, 4, finish_reason=DROPPED), b], 3) == 2
