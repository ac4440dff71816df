"""The tasks. `make_task` turns the section `task` of a configuration into a task with prompts and a verifiable reward."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from ais_megatron.config import BUILTIN_TASKS, TaskConfig, doors
from ais_megatron.config.task import is_url
from ais_megatron.tasks.own_reward import RewardedTask
from ais_megatron.tasks.reward_service import RewardService
from ais_megatron.tasks.streams import StreamTask
from ais_megatron.tasks.task import Attempt, Problem, Reward, Task

TASKS: dict[str, type[StreamTask]] = {
    name: getattr(import_module(f"{__name__}.{builtin.module}"), builtin.attribute) for name, builtin in BUILTIN_TASKS.items()
}
MEMBERS = ("name", "special_pieces", "train_problem", "test_problems", "reward", "tokenizer_corpus")  # members of the protocol `Task`

__all__ = ["TASKS", "Attempt", "Problem", "Reward", "Task", "judge_all", "make_task"]


def make_task(config: TaskConfig, seed: int) -> Task:
    """Create the task of `config`, read its files, and use the reward function of `config` if there is one.

    Raises:
        ValueError: a file is missing, empty or malformed, or a class of the user's own is not a `Task`.
        RuntimeError: the user's own code raised; its exception is the cause.
    """
    task = _own_task(config, seed) if doors.is_own(config.name) else TASKS[config.name](config, seed)
    if not config.has_own_reward:
        if not doors.is_own(config.name):
            return task
        judge = task.reward
        return RewardedTask(task, lambda truth, response, _: judge(truth, response), f"task.name={config.name}", config)
    assert config.reward is not None
    function = RewardService(config.reward, config) if is_url(config.reward) else doors.load("task.reward", config.reward)
    return RewardedTask(task, function, f"task.reward={config.reward}", config)


def judge_all(task: Task, attempts: Sequence[Attempt]) -> list[Reward]:
    """The task's rewards, at once if the task can judge many responses at once. Raises as `RewardedTask.rewards`."""
    if isinstance(task, RewardedTask):
        return task.rewards(attempts)
    return [task.reward(attempt.truth, attempt.response) for attempt in attempts]


def _own_task(config: TaskConfig, seed: int) -> Task:
    made = doors.load("task.name", config.name)
    try:
        task = made(config, seed)
    except ValueError:  # this is how a task tells the user what to change
        raise
    except Exception as error:
        raise RuntimeError(f"task.name={config.name}: creating the task failed with {type(error).__name__}: {error}") from error
    if missing := [member for member in MEMBERS if not hasattr(task, member)]:
        raise ValueError(
            f"task.name={config.name}: the class lacks {', '.join(missing)}; add what the protocol in ais_megatron/tasks/task.py says"
        )
    return task
