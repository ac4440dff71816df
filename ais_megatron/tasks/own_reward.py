"""`task.reward=module:function`: a function of the user's own that judges the responses to the problems of any task.

Its signature has plain values:

    def my_reward(truth: Mapping[str, Any], response: str, options: Mapping[str, Any]) -> float | Reward

`truth` is the `truth` of the problem, and `options` is `task.options`. A number means Reward(value, well_formed=value > 0,
correct=value >= 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ais_megatron.tasks.task import Problem, Reward, Task


@dataclass(frozen=True)
class RewardedTask:
    """A `Task` with the problems of `task`, whose responses `function` judges."""

    task: Task
    function: Callable[[Mapping[str, Any], str, Mapping[str, Any]], float | Reward]
    key: str
    """What messages call the function: ``task.reward=module:function``, or ``task.name=module:Class`` for the method of a class."""
    options: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def special_pieces(self) -> tuple[str, ...]:
        return self.task.special_pieces

    def train_problem(self, index: int) -> Problem:
        return self.task.train_problem(index)

    def test_problems(self, num: int) -> list[Problem]:
        return self.task.test_problems(num)

    def tokenizer_corpus(self, num_lines: int) -> list[str]:
        return self.task.tokenizer_corpus(num_lines)

    def reward(self, problem_truth: Mapping[str, Any], response: str) -> Reward:
        """Call the function.

        Raises:
            RuntimeError: the function raised; its exception is the cause.
            ValueError: it returned neither a finite number nor a `Reward` with a finite value.
        """
        try:
            verdict = self.function(problem_truth, response, self.options)
        except Exception as error:
            raise RuntimeError(
                f"{self.key}: raised {type(error).__name__}: {error} for the response {_shortened(response)}; "
                "it must accept any text, so return 0.0 for a text that it cannot read"
            ) from error
        reward = Reward(float(verdict), verdict > 0, verdict >= 1) if isinstance(verdict, int | float) else verdict
        if not isinstance(reward, Reward) or not math.isfinite(reward.value):
            raise ValueError(
                f"{self.key}: returned {verdict!r} for the response {_shortened(response)}; return a finite number, 1.0 for a "
                "right answer, or an ais_megatron.tasks.Reward"
            )
        return reward


def _shortened(text: str) -> str:
    return repr(text) if len(text) <= 100 else repr(text[:100]) + "..."
