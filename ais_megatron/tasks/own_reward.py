"""`task.reward`: a function of the user's own, or an HTTP service, that judges the responses to the problems of any task.

A function gets plain values, and may be ``async``:

    def my_reward(truth: Mapping[str, Any], response: str, options: Mapping[str, Any]) -> float | Reward

`truth` is the `truth` of the problem, and `options` is `task.options`. A number means Reward(value, well_formed=value > 0,
correct=value >= 1). A plain function judges one response after the other and may take as long as it likes. Async functions and services
(`reward_service`) judge up to `task.reward_concurrency` responses of a rank at once, each within `task.reward_timeout_s`.

If a response cannot be judged, `task.reward_errors` decides. "stop" ends the run with an error that names the response. "drop" gives the
response the value NaN, and it is then neither in the loss nor in the baseline.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from ais_megatron.config import TaskConfig
from ais_megatron.tasks.concurrent import run_all
from ais_megatron.tasks.reward_service import RewardService, ServiceError
from ais_megatron.tasks.task import Attempt, Problem, Reward, Task

logger = logging.getLogger(__name__)

Function = Callable[[Mapping[str, Any], str, Mapping[str, Any]], float | Reward | Awaitable[float | Reward]]


@dataclass(frozen=True)
class RewardedTask:
    """A `Task` with the problems of `task`, whose responses `function` judges."""

    task: Task
    function: Function | RewardService
    key: str
    """What messages call the function: ``task.reward=module:function``, or ``task.name=module:Class`` for the method of a class."""
    config: TaskConfig

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
        """Judge one response; raises as `rewards`."""
        return self.rewards([Attempt(problem_truth, response)])[0]

    def rewards(self, attempts: Sequence[Attempt]) -> list[Reward]:
        """Judge responses, and print the first error if some are dropped.

        Raises:
            RuntimeError: the function raised (its exception is the cause), did not answer in time, or blocks its event loop.
            ValueError: it returned neither a finite number nor a `Reward` with a finite value. With `task.reward_errors=drop` only the
                blocked loop is raised.
        """
        rewards = self._all_at_once(attempts) if self._is_async else [self._or_dropped(self._judge(attempt)) for attempt in attempts]
        errors = [reward.reason for reward in rewards if reward.is_missing]
        if errors:
            logger.warning(
                "%d of %d responses could not be judged and are left out; the first one: %s", len(errors), len(rewards), errors[0]
            )
        return rewards

    @property
    def _is_async(self) -> bool:
        function = self.function
        return isinstance(function, RewardService) or any(map(inspect.iscoroutinefunction, (function, type(function).__call__)))

    def _all_at_once(self, attempts: Sequence[Attempt]) -> list[Reward]:
        config, function = self.config, self.function
        opened = function.opened() if isinstance(function, RewardService) else nullcontext(self._call)
        patience_s = function.patience_s if isinstance(function, RewardService) else config.reward_timeout_s

        async def judge(ask: Callable[[Attempt], Awaitable[object]], attempt: Attempt) -> Reward:
            return self._or_dropped(await self._judge_async(ask, attempt))

        try:
            return run_all(opened, judge, attempts, config.reward_concurrency, patience_s)
        except TimeoutError as error:
            raise RuntimeError(
                f"{self.key}: {len(attempts)} responses were not judged within their time limits, and cannot be cancelled; an async "
                "function must await everything that waits (aiohttp in place of requests, asyncio.sleep in place of time.sleep)"
            ) from error

    def _judge(self, attempt: Attempt) -> Reward | Exception:
        assert not isinstance(self.function, RewardService)
        try:
            verdict = self.function(attempt.truth, attempt.response, self.config.options)
        except Exception as error:
            return self._raised(error, attempt)
        return self._reward_of(verdict, attempt)

    async def _call(self, attempt: Attempt) -> object:
        assert not isinstance(self.function, RewardService)
        verdict = self.function(attempt.truth, attempt.response, self.config.options)
        assert inspect.isawaitable(verdict)
        return await verdict

    async def _judge_async(self, ask: Callable[[Attempt], Awaitable[object]], attempt: Attempt) -> Reward | Exception:
        limit_s = None if isinstance(self.function, RewardService) else self.config.reward_timeout_s
        try:
            async with asyncio.timeout(limit_s) as limit:
                verdict = await ask(attempt)
        except ServiceError as error:
            return _caused(RuntimeError(f"{self.key}: {error} for {self._which(attempt)}"), error)
        except Exception as error:
            if isinstance(error, TimeoutError) and limit.expired():
                message = f"{self.key}: did not return within task.reward_timeout_s={limit_s:g} for {self._which(attempt)}"
                return _caused(RuntimeError(message), error)
            return self._raised(error, attempt)
        return self._reward_of(verdict, attempt)

    def _reward_of(self, verdict: object, attempt: Attempt) -> Reward | Exception:
        reward = Reward(float(verdict), verdict > 0, verdict >= 1) if isinstance(verdict, int | float) else verdict
        if isinstance(reward, Reward) and math.isfinite(reward.value):
            return reward
        return ValueError(
            f"{self.key}: returned {verdict!r} for {self._which(attempt)}; return a finite number, 1.0 for a right answer, or an "
            "ais_megatron.tasks.Reward"
        )

    def _raised(self, error: Exception, attempt: Attempt) -> Exception:
        message = f"{self.key}: raised {type(error).__name__}: {error} for {self._which(attempt)}"
        return _caused(RuntimeError(f"{message}; it must accept any text, so return 0.0 for a text that it cannot read"), error)

    def _or_dropped(self, judged: Reward | Exception) -> Reward:
        """The reward. An error is raised, or turned into a missing reward, as `task.reward_errors` says."""
        if isinstance(judged, Reward):
            return judged
        if self.config.reward_errors == "stop":
            raise judged
        return Reward(float("nan"), well_formed=False, correct=False, reason=str(judged))

    def _which(self, attempt: Attempt) -> str:
        """The response, and the prompt and its place in a file if they are known."""
        text = repr(attempt.response) if len(attempt.response) <= 100 else repr(attempt.response[:100]) + "..."
        index = attempt.index
        if index is None:
            return f"the response {text}"
        problems = [self.task.train_problem(index)] if index >= 0 else self.task.test_problems(-index)[-1 - index :]
        where = next((getattr(problem, "where", "") for problem in problems), "")
        return f"the response {text} to {f'prompt {index}' if index >= 0 else f'held-out prompt {-1 - index}'}{where and f' ({where})'}"


def _caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error
