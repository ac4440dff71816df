"""`task.reward=module:function`: the user's own judgement of the responses to the problems of any task.

The function's signature, with plain values in and out:

    def my_reward(truth: Mapping[str, Any], response: str, options: Mapping[str, Any]) -> float | Reward

`truth` is what the task's problem carries, `options` is `task.options`. A number means Reward(value, well_formed=value > 0,
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
    """A `Task` with the problems of `task` and the judgement of `function`."""

    task: Task
    function: Callable[[Mapping[str, Any], str, Mapping[str, Any]], float | Reward]
    key: str
    """How messages name the function: ``task.reward=module:function``."""
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
        """The function's verdict.

        Raises:
            RuntimeError: the function raised; the cause is its own exception.
            ValueError: it returned neither a finite number nor a `Reward` with one.
        """
        try:
            verdict = self.function(problem_truth, response, self.options)
        except Exception as error:
            raise RuntimeError(
                f"{self.key}: raised {type(error).__name__}: {error} for the response {_shortened(response)}; "
                "it must judge any text, so return 0.0 for one that it cannot read"
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
