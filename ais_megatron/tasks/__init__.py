"""The registry of tasks: `make_task` turns the `task` section of a configuration into prompts and a verifiable reward."""

from __future__ import annotations

import difflib

from ais_megatron.config import TaskConfig
from ais_megatron.tasks.countdown import Countdown
from ais_megatron.tasks.gsm8k import GSM8K
from ais_megatron.tasks.math500 import Math500
from ais_megatron.tasks.streams import StreamTask
from ais_megatron.tasks.sudoku import Sudoku
from ais_megatron.tasks.task import Problem, Reward, Task

TASKS: dict[str, type[StreamTask]] = {task.name: task for task in (Countdown, Sudoku, GSM8K, Math500)}

__all__ = ["TASKS", "Problem", "Reward", "Task", "make_task"]


def make_task(config: TaskConfig, seed: int) -> Task:
    """The task that `config` names, its files read.

    Raises:
        ValueError: an unknown task.name, or a file that is missing, empty or malformed.
    """
    if config.name not in TASKS:
        nearest = difflib.get_close_matches(config.name, TASKS, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"task.name={config.name!r}: unknown task; allowed: {', '.join(TASKS)}{hint}")
    return TASKS[config.name](config, seed)
