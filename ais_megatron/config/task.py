"""The section `task`: which problems the policy is trained on, and what judges its answers."""

from __future__ import annotations

import difflib
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

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


def is_url(reward: str) -> bool:
    """Whether `task.reward` is a service."""
    return reward.lower().startswith(("http:", "https:"))


def _check_url(reward: str) -> None:
    try:
        parts = urlsplit(reward)
        is_valid = bool(parts.hostname) and parts.port != 0 and not any(character.isspace() for character in reward)
    except ValueError:
        is_valid = False
    if not is_valid:
        raise ValueError(f"task.reward={reward!r}: not a URL; write for example http://127.0.0.1:8000/reward")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            f"task.reward: the URL of {parts.hostname} has a name or a password, which would be written into the run folder; leave them "
            "out, and put a bearer token into the environment variable AIS_REWARD_KEY"
        )


class TaskConfig(Section):
    name: str = Field(
        "countdown", description="countdown, sudoku, gsm8k, math500, or a class of your own as module:Class (docs/extending.md)"
    )
    reward: str | None = Field(
        None,
        description="a function of your own, as module:function, or a service, as http(s)://..., that judges the answers in place of the "
        "task (docs/extending.md); empty: the task judges",
    )
    reward_concurrency: PositiveInt = Field(32, description="async functions and services: most responses that one rank has judged at once")
    reward_timeout_s: float = Field(
        30.0, gt=0.0, description="async functions and services: longest time for one response; plain functions have no limit"
    )
    reward_retries: int = Field(
        3, ge=0, description="services: further tries after a connection error, a timeout, HTTP 429 or HTTP 5xx, at growing intervals"
    )
    reward_errors: Literal["stop", "drop"] = Field(
        "stop",
        description="what happens if your own reward raises, returns NaN or does not answer. stop: the run ends, and names the response. "
        "drop: the response is left out of the loss and of its group's baseline",
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
        if reward is not None and is_url(reward):
            _check_url(reward)
        elif reward is not None:
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
