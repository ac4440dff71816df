"""The section `task`: which problems the policy is trained on, and what judges its answers."""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

from pydantic import Field, field_validator, model_validator

from ais_megatron.config import doors
from ais_megatron.config.section import Fraction, PositiveInt, Section


class BuiltinTask(NamedTuple):
    module: str
    """Name of the module in ais_megatron.tasks."""
    attribute: str
    """Name of the class in that module."""
    needs_file: bool = False
    """Its problems come from files and cannot be generated."""


BUILTIN_TASKS = {
    "countdown": BuiltinTask("countdown", "Countdown"),
    "sudoku": BuiltinTask("sudoku", "Sudoku"),
    "gsm8k": BuiltinTask("gsm8k", "GSM8K", needs_file=True),
    "math500": BuiltinTask("math500", "Math500", needs_file=True),
}


class TaskConfig(Section):
    name: str = Field(
        "countdown", description="countdown, sudoku, gsm8k, math500, or a class of your own as module:Class (docs/extending.md)"
    )
    reward: str | None = Field(
        None,
        description="a function of your own, as module:function, that judges the answers in place of the task (docs/extending.md); "
        "empty: the task judges",
    )
    options: dict[str, Any] = Field({}, description="options for your own class or function; built-in tasks have none")
    train_path: str | None = Field(
        None, description="JSONL, CSV, parquet or arrow file, or a Hugging Face datasets folder; empty: puzzles generated from run.seed"
    )
    test_path: str | None = Field(None, description="the same for held-out problems; empty: generated puzzles that never occur in training")
    max_number: PositiveInt = Field(99, description="countdown: largest number and largest target in generated puzzles")
    empty_cells: PositiveInt = Field(8, le=16, description="sudoku: number of empty cells in generated puzzles")
    format_weight: Fraction = Field(0.1, description="reward of an answer that is well-formed but wrong; a correct answer has 1")

    @field_validator("name")
    @classmethod
    def _known_task(cls, name: str) -> str:
        if doors.is_own(name):
            doors.check("task.name", name, "class")
        elif name not in BUILTIN_TASKS:
            nearest = difflib.get_close_matches(name, BUILTIN_TASKS, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"task.name={name!r}: unknown task; allowed: {', '.join(BUILTIN_TASKS)}, or module:Class{hint}")
        return name

    @field_validator("reward")
    @classmethod
    def _known_reward(cls, reward: str | None) -> str | None:
        if reward is not None:
            doors.check("task.reward", reward, "function")
        return reward

    @model_validator(mode="after")
    def _options_have_a_reader(self) -> TaskConfig:
        if self.options and not doors.is_own(self.name) and self.reward is None:
            raise ValueError(
                f"task.options={self.options}: nothing reads them, because task.name={self.name} is built in and task.reward is empty; "
                "leave out task.options, or set task.name or task.reward to your own code"
            )
        return self
