"""The registry of tasks: `make_task` turns the `task` section of a configuration into prompts and a verifiable reward."""

from __future__ import annotations

from importlib import import_module

from ais_megatron.config import BUILTIN_TASKS, TaskConfig, doors
from ais_megatron.tasks.own_reward import RewardedTask
from ais_megatron.tasks.streams import StreamTask
from ais_megatron.tasks.task import Problem, Reward, Task

TASKS: dict[str, type[StreamTask]] = {
    name: getattr(import_module(f"{__name__}.{builtin.module}"), builtin.attribute) for name, builtin in BUILTIN_TASKS.items()
}
MEMBERS = ("name", "special_pieces", "train_problem", "test_problems", "reward", "tokenizer_corpus")  # of the protocol `Task`

__all__ = ["TASKS", "Problem", "Reward", "Task", "make_task"]


def make_task(config: TaskConfig, seed: int) -> Task:
    """The task that `config` names, its files read, with the reward that `config` names.

    Raises:
        ValueError: a file that is missing, empty or malformed; or a class of the user's own that is not a `Task`.
        RuntimeError: code of the user's own raised; the cause is its own exception.
    """
    task = _own_task(config, seed) if doors.is_own(config.name) else TASKS[config.name](config, seed)
    if config.reward is None:
        return task
    function = doors.load("task.reward", config.reward)
    return RewardedTask(task, function, f"task.reward={config.reward}", config.options)


def _own_task(config: TaskConfig, seed: int) -> Task:
    made = doors.load("task.name", config.name)
    try:
        task = made(config, seed)
    except ValueError:  # a task's way to say what the user must change
        raise
    except Exception as error:
        raise RuntimeError(f"task.name={config.name}: making the task failed with {type(error).__name__}: {error}") from error
    if missing := [member for member in MEMBERS if not hasattr(task, member)]:
        raise ValueError(
            f"task.name={config.name}: the class lacks {', '.join(missing)}; see the protocol in ais_megatron/tasks/task.py, "
            "or derive it from ais_megatron.tasks.streams.StreamTask"
        )
    return task
