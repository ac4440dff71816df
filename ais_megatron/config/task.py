"""The section `task`: which problems the policy is trained on, and what judges its answers."""

from __future__ import annotations

import difflib
from typing import Any, Literal, NamedTuple, get_args
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
    "qa": BuiltinTask("qa", "QA", needs_file=True),
}
BuiltinReward = Literal["math", "exact", "choice"]
BUILTIN_REWARDS: tuple[BuiltinReward, ...] = get_args(BuiltinReward)
PROMPT_COLUMNS = ("prompt", "question", "problem", "query", "instruction", "input")
MESSAGES_COLUMNS = ("messages", "conversation", "conversations")
ANSWER_COLUMNS = ("answer", "final_answer", "ground_truth", "target", "output", "label", "answerKey", "solution")
CHOICES_COLUMNS = ("choices", "options")
QA_KEYS = ("prompt_key", "messages_key", "answer_key", "choices_key", "instruction")
STYLED_TASKS = ("countdown", "sudoku")


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
        "countdown",
        description="countdown, sudoku, gsm8k, math500, qa (questions and answers of your own, docs/own_data.md), or a class of your own "
        "as module:Class (docs/extending.md)",
    )
    reward: str | None = Field(
        None,
        description="a function of your own, as module:function, or a service, as http(s)://..., that judges the answers in place of the "
        "task (docs/extending.md); for task.name=qa also math (mathematical equivalence), exact (same text or number) or choice (multiple "
        "choice); empty: the task judges, qa as math does",
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
    prompt_key: str | None = Field(
        None, description=f"qa: column with the prompt; a.b is b inside a; empty: the first of {', '.join(PROMPT_COLUMNS)} in the row"
    )
    messages_key: str | None = Field(
        None,
        description="qa: column with a list of {role, content} turns that takes the place of the prompt; empty: "
        f"{', '.join(MESSAGES_COLUMNS)} if the row has no prompt",
    )
    answer_key: str | None = Field(
        None, description=f"qa: column with the answer, or a list of them; empty: the first of {', '.join(ANSWER_COLUMNS)} in the row"
    )
    choices_key: str | None = Field(
        None, description=f"qa: column with the choices, which the prompt then lists; empty: {', '.join(CHOICES_COLUMNS)} for reward=choice"
    )
    instruction: str | None = Field(
        None, description="qa: text after each prompt; empty: asks for the form of answer that task.reward reads; '': none"
    )
    system_prompt: str | None = Field(None, description="system turn before each prompt that has none; needs a chat template")
    template_kwargs: dict[str, Any] = Field({}, description="variables for the chat template, such as {enable_thinking: false}")
    prompt_style: Literal["terse", "instruct"] = Field(
        "terse",
        description="countdown, sudoku: terse: only the puzzle. instruct: the rules in words too, and the answer may stand anywhere in the "
        "response, for models trained to chat",
    )
    max_prompt_tokens: PositiveInt | None = Field(
        None, description="most tokens of a prompt from a file; empty: what rollout.max_response_tokens leaves of the model's context"
    )
    long_prompts: Literal["error", "drop"] = Field(
        "error", description="what happens to prompts from a file with more tokens. error: the run does not start. drop: they are left out"
    )
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
        if reward is None or reward in BUILTIN_REWARDS:
            return reward
        if is_url(reward):
            _check_url(reward)
        elif not doors.is_own(reward) and (nearest := difflib.get_close_matches(reward, BUILTIN_REWARDS, n=1)):
            allowed = f"{', '.join(BUILTIN_REWARDS)}, module:function or http(s)://..."
            raise ValueError(f"task.reward={reward!r}: unknown reward; allowed: {allowed}; did you mean {nearest[0]}?")
        else:
            doors.check("task.reward", reward, "function")
        return reward

    @property
    def has_own_reward(self) -> bool:
        """Whether a function or a service of the user's own judges the answers."""
        return self.reward is not None and self.reward not in BUILTIN_REWARDS

    @model_validator(mode="after")
    def _options_have_a_reader(self) -> TaskConfig:
        if self.options and not doors.is_own(self.name) and not self.has_own_reward:
            raise ValueError(
                f"task.options={self.options}: nothing reads them, because task.name={self.name} is built in and task.reward is "
                f"{self.reward or 'empty'}; leave out task.options, or set task.name or task.reward to your own code"
            )
        return self

    @model_validator(mode="after")
    def _keys_of_other_tasks(self) -> TaskConfig:
        if self.name != "qa" and self.reward in BUILTIN_REWARDS:
            raise ValueError(
                f"task.reward={self.reward}: judges only the answers of task.name=qa, and task.name={self.name} has its own judge; leave "
                "out task.reward, or set it to your own module:function or http(s)://..."
            )
        if self.prompt_key is not None and self.messages_key is not None:
            raise ValueError(
                f"task.prompt_key={self.prompt_key} with task.messages_key={self.messages_key}: a prompt comes from one column; leave out "
                "one of them"
            )
        if doors.is_own(self.name):  # a class of the user's own may read any of these keys
            return self
        for key in QA_KEYS:
            if self.name != "qa" and (value := getattr(self, key)) is not None:
                raise ValueError(f"task.{key}={value!r}: only task.name=qa reads it; leave it out, or set task.name=qa")
        if self.prompt_style != "terse" and self.name not in STYLED_TASKS:
            raise ValueError(
                f"task.prompt_style={self.prompt_style}: only {' and '.join(STYLED_TASKS)} have it; leave it out, because the prompts of "
                f"task.name={self.name} are written in words already"
            )
        return self
