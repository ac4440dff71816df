"""Questions and answers from a user's own file: ``task.name=qa``.

A row has a prompt, as text or as a list of chat turns, and an answer, as text or a number. `task.reward` says how answers are compared:
``math``, ``exact`` and ``choice`` are in `judging`, and ``module:function`` is the user's own. Without keys for the columns the usual
names are tried, so files such as AIME's and AMC's can be read as they are.
"""

from __future__ import annotations

import difflib
import json
import math
import string
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple, cast

from ais_megatron.config import TaskConfig
from ais_megatron.config.task import ANSWER_COLUMNS, CHOICES_COLUMNS, MESSAGES_COLUMNS, PROMPT_COLUMNS, BuiltinReward
from ais_megatron.tasks.extraction import last_boxed
from ais_megatron.tasks.judging import INSTRUCTIONS, LETTERS, MAX_ANSWER_CHARS, judge, solution_of
from ais_megatron.tasks.reading import Row
from ais_megatron.tasks.streams import StreamTask
from ais_megatron.tasks.task import Problem, Reward

Turn = Mapping[str, Any]


class Choices(NamedTuple):
    texts: list[str]
    labels: list[str]
    """What the file calls the choices, such as "1" or "A"; empty if it only lists them."""


class QA(StreamTask):
    name = "qa"
    alphabet = string.printable.strip()  # so that a tokenizer made from a few rows can also read the held-out ones

    def __init__(self, config: TaskConfig, seed: int) -> None:
        self.kind: BuiltinReward | None = None if config.has_own_reward else cast(BuiltinReward, config.reward or "math")
        default = "" if self.kind is None else INSTRUCTIONS[self.kind]
        self.instruction = default if config.instruction is None else config.instruction
        super().__init__(config, seed)

    def parse(self, row: Row) -> Problem:
        column, turns = self._turns(row)
        choices = self._choices(row)
        truth: dict[str, Any] = {"answer": self._answer(row, choices)} | ({"choices": choices.texts} if choices else {})
        if self.kind is None:
            truth["row"] = {str(name): _plain(value) for name, value in row.values.items() if name != column.split(".")[0]}
        listed = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices.texts if choices else (), strict=False))
        turns = _with_text_after(row, column, turns, [text for text in (listed, self.instruction) if text])
        messages = None if len(turns) == 1 and turns[0]["role"] == "user" else turns
        text = turns[0]["content"] if messages is None else "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)
        return Problem(text, truth, self._solution(truth["answer"]), messages)

    def reward(self, problem_truth: Mapping[str, Any], response: str) -> Reward:
        assert self.kind is not None, "a function of the user's own judges instead"
        return judge(self.kind, problem_truth, response, self.config.format_weight)

    def _turns(self, row: Row) -> tuple[str, tuple[Turn, ...]]:
        """The column with the prompt, and its turns. A prompt that is plain text is one turn of the user."""
        key, value = "messages_key", None
        if self.config.messages_key is not None:
            column, value = _column(row, key, self.config.messages_key, ())
        else:
            usual = PROMPT_COLUMNS + (() if self.config.prompt_key else MESSAGES_COLUMNS)
            column, value = _column(row, "prompt_key", self.config.prompt_key, usual)
            if isinstance(value, str) and column not in MESSAGES_COLUMNS:
                if not value.strip():
                    raise ValueError(f"{row.where}: column {column!r} must be text, got {value!r}")
                return column, ({"role": "user", "content": value.strip()},)
            key = "prompt_key" if self.config.prompt_key else key
        if isinstance(value, str):  # a CSV file holds turns as JSON
            try:
                value = json.loads(value)
            except ValueError as error:
                raise ValueError(f"{row.where}: column {column!r} (task.{key}) is not a list of turns in JSON ({error})") from error
        return column, _checked_turns(row, column, value)

    def _choices(self, row: Row) -> Choices | None:
        """The choices, or None if the row has none or this task does not read them."""
        usual = [name for name in CHOICES_COLUMNS if name in row.values] if self.kind == "choice" else []
        if self.config.choices_key is None and not usual:
            return None
        column, value = _column(row, "choices_key", self.config.choices_key, usual)
        labels: list[str] = []
        if isinstance(value, Mapping):  # {"label": ["A", "B"], "text": ["yes", "no"]}
            labels, value = [str(label) for label in value.get("label") or ()], value.get("text")
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                pass
        texts = [_as_text(item) for item in value] if isinstance(value, list | tuple) else []
        if not 2 <= len(texts) <= len(LETTERS) or not all(texts):
            raise ValueError(
                f"{row.where}: column {column!r} must be a list of 2 to {len(LETTERS)} texts, the choices, got {_shortened(value)}"
            )
        return Choices([str(text) for text in texts], labels)

    def _answer(self, row: Row, choices: Choices | None) -> Any:
        if self.kind is None:
            if self.config.answer_key is None and not any(name in row.values for name in ANSWER_COLUMNS):
                return None
            return _plain(_column(row, "answer_key", self.config.answer_key, ANSWER_COLUMNS)[1])
        column, value = _column(row, "answer_key", self.config.answer_key, ANSWER_COLUMNS)
        several = isinstance(value, list | tuple) and len(value) > 0
        read = [self._one_answer(row, column, item, choices) for item in (value if several else [value])]
        return read if len(read) > 1 else read[0]

    def _one_answer(self, row: Row, column: str, value: object, choices: Choices | None) -> str:
        text = _as_text(value)
        if not text:
            raise ValueError(
                f"{row.where}: column {column!r} (task.answer_key) must be text, a finite number or a list of them, got {_shortened(value)}"
            )
        if self.kind == "choice":
            return _letter(row, column, value, text, choices)
        if self.kind == "math":  # worked solutions end with the answer in a box, and those of GSM8K after ####
            text = last_boxed(text) or text.rpartition("####")[2].strip() or text
        if len(text) > MAX_ANSWER_CHARS:
            raise ValueError(
                f"{row.where}: column {column!r} (task.answer_key) has an answer of {len(text)} characters; at most {MAX_ANSWER_CHARS} are "
                "read"
                + (r", unless it is a solution with its answer in \boxed{}" if self.kind == "math" else "")
                + "; name the column with the final answers"
            )
        return text

    def _solution(self, answer: Any) -> str | None:
        if self.kind is None:
            return None
        return solution_of(self.kind, answer if isinstance(answer, str) else answer[0])


def _column(row: Row, key: str, name: str | None, usual: Sequence[str]) -> tuple[str, Any]:
    """The column `name` with its value, or the first of the `usual` ones. "a.b" is the field b of a column a that holds objects."""
    if name is None:
        column = next((column for column in usual if column in row.values), None)
        if column is None:
            raise ValueError(
                f"{row.where}: none of the columns {', '.join(usual)} is there; columns found: {row.columns}; set task.{key} to one of them"
            )
        return column, row.values[column]
    if name in row.values:
        return name, row.values[name]
    value: Any = row.values
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            nearest = difflib.get_close_matches(name, [str(column) for column in row.values], n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"{row.where}: column {name!r} (task.{key}) is missing; columns found: {row.columns}{hint}")
        value = value[part]
    return name, value


def _checked_turns(row: Row, column: str, value: object) -> tuple[Turn, ...]:
    where = f"{row.where}: column {column!r}"
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{where} must be text or a list of {{role, content}} turns, got {_shortened(value)}")
    turns: list[Turn] = []
    for number, turn in enumerate(value, start=1):
        # (Tables fill fields that a turn does not have with None.)
        fields = {name: _plain(field) for name, field in turn.items() if field is not None} if isinstance(turn, Mapping) else {}
        if not isinstance(fields.get("role"), str) or not isinstance(fields.get("content"), str):
            raise ValueError(f"{where}, turn {number}: needs role and content as text, got {_shortened(turn)}")
        turns.append(fields)
    if turns[-1]["role"] == "assistant":
        raise ValueError(
            f"{where} ends with a turn of the assistant, but the model is to write that turn; leave it out, and put the right answer into "
            "the column that task.answer_key names"
        )
    return tuple(turns)


def _with_text_after(row: Row, column: str, turns: tuple[Turn, ...], texts: list[str]) -> tuple[Turn, ...]:
    """The turns with further lines at the end of the user's last one."""
    if not texts:
        return turns
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "user"), default=None)
    if last is None:
        raise ValueError(f"{row.where}: column {column!r} has no turn with the role 'user', which would get task.instruction; add one")
    longer = {**turns[last], "content": "\n".join([turns[last]["content"], *texts])}
    return (*turns[:last], longer, *turns[last + 1 :])


def _letter(row: Row, column: str, value: object, text: str, choices: Choices | None) -> str:
    """The letter of the right choice. A number is the index of a choice, counted from 0. A text is a label, a letter, the text of a choice,
    or an index."""
    where = f"{row.where}: column {column!r} (task.answer_key)"
    known = LETTERS if choices is None else LETTERS[: len(choices.texts)]
    letter = text.strip("().").upper()
    meant = {known.index(letter)} if len(letter) == 1 and letter in known else set()
    if choices is not None and isinstance(value, str) and text in choices.labels:
        meant = {choices.labels.index(text)}
    elif choices is not None:
        if isinstance(value, str) and choices.texts.count(text) == 1:
            meant.add(choices.texts.index(text))
        if text.isascii() and text.isdigit() and int(text) < len(choices.texts):
            meant.add(int(text))
    if len(meant) == 1:
        return LETTERS[meant.pop()]
    if meant:
        raise ValueError(f"{where}: {value!r} may mean choice {' or '.join(LETTERS[i] for i in sorted(meant))}; write the letter")
    allowed = f"a letter from {known[0]} to {known[-1]}" + (", the text of a choice, or its index from 0" if choices else "")
    raise ValueError(f"{where} must be {allowed}, got {value!r}" + ("" if choices else "; task.choices_key names the column of choices"))


def _as_text(value: object) -> str | None:
    """A text without white space around it, or a finite number as text ("142" for 142.0); None for anything else."""
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int | float | Decimal) or not math.isfinite(value):
        return None
    return str(value) if isinstance(value, int) else f"{value:.0f}" if value == int(value) else f"{Decimal(str(value)):f}"


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it. What it has no kind for, such as a date, becomes text."""
    if isinstance(value, Mapping):
        return {str(name): _plain(field) for name, field in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, str | bool | int) or isinstance(value, float) and math.isfinite(value):
        return value
    return str(value)


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:100] + "..."
