"""The section `task`: which problems the policy is trained on, and who judges its answers."""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple

from pydantic import Field, field_validator, model_validator

from ais_megatron.config import doors
from ais_megatron.config.section import Fraction, PositiveInt, Section


class BuiltinTask(NamedTuple):
    module: str
    """Of ais_megatron.tasks."""
    attribute: str
    """The class in it."""
    needs_file: bool = False
    """Its questions are written, not generated."""


BUILTIN_TASKS = {
    "countdown": BuiltinTask("countdown", "Countdown"),
    "sudoku": BuiltinTask("sudoku", "Sudoku"),
    "gsm8k": BuiltinTask("gsm8k", "GSM8K", needs_file=True),
    "math500": BuiltinTask("math500", "Math500", needs_file=True),
}


class TaskConfig(Section):
    name: str = Field(
        "countdown", description="countdown, sudoku, gsm8k or math500; or a class of your own as module:Class (docs/extending.md)"
    )
    reward: str | None = Field(
        None,
        description="a function of your own as module:function, which judges in place of the task (docs/extending.md); empty: the task's",
    )
    options: dict[str, Any] = Field({}, description="anything that your own class or function reads; built-in tasks take no options")
    train_path: str | None = Field(None, description="JSONL file or HF-datasets folder; empty: puzzles generated from run.seed")
    test_path: str | None = Field(None, description="held-out file; empty: generated puzzles that never occur in training")
    max_number: PositiveInt = Field(99, description="countdown: largest number and target that is generated")
    empty_cells: PositiveInt = Field(8, le=16, description="sudoku: cells left empty in generated puzzles")
    format_weight: Fraction = Field(0.1, description="share of the reward given for a well-formed answer alone")

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
                "leave task.options out, or name code of your own"
            )
        return self
