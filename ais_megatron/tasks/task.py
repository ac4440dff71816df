"""The protocol of tasks: problems, and a verifiable reward, which a program decides and not a model.

A response is free text that holds an answer (`extraction` says how it is found). The reward has a part for a well-formed answer, which
is one that the judge can read. So a model that cannot solve anything yet still gets a signal:

    value = format_weight * well_formed + (1 - format_weight) * correct        (correct implies well_formed)
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

OPEN, CLOSE = "<answer>", "</answer>"
HELD_OUT_BUCKETS = 8  # one puzzle in this many is never generated for training


@dataclass(frozen=True)
class Problem:
    """One problem."""

    text: str
    """The prompt as a person reads it, without what a chat template adds."""
    truth: Mapping[str, Any]
    """What the reward needs, as plain JSON values, so that it can be logged and read again."""
    solution: str | None
    """A response that scores 1.0, for the warm start; None if the file has none."""
    messages: tuple[Mapping[str, Any], ...] | None = None
    """The turns of a conversation that the chat template renders, each with `role` and `content`. `text` then shows them to people. None:
    `text` is the only turn."""
    where: str = ""
    """"file:line" of a problem from a file, for messages."""


@dataclass(frozen=True)
class Reward:
    """The judgement of a response."""

    value: float
    """In [0, 1], see the module's equation. NaN: the response could not be judged, so it is neither in the loss nor in the baseline."""
    well_formed: bool
    correct: bool
    reason: str = ""
    """How the answer was found, or why it earns nothing. A person reads it beside the response."""

    @property
    def is_missing(self) -> bool:
        """Whether the response could not be judged."""
        return math.isnan(self.value)


@dataclass(frozen=True)
class Attempt:
    """A response that is to be judged."""

    truth: Mapping[str, Any]
    """That of the problem."""
    response: str
    prompt: str = ""
    """The problem's text."""
    index: int | None = None
    """The prompt's position in its stream, see `Prompt`; None if it is in none."""


class Task(Protocol):
    @property
    def name(self) -> str:
        """What messages and random streams call the task."""

    @property
    def special_pieces(self) -> tuple[str, ...]:
        """Texts that the tokenizer keeps as one token each."""

    def train_problem(self, index: int) -> Problem:
        """The problem at position `index` (from 0) of the endless training stream. It depends only on (seed, index)."""

    def test_problems(self, num: int) -> list[Problem]:
        """At most `num` held-out problems, the same in every call and for every seed."""

    def reward(self, problem_truth: Mapping[str, Any], response: str) -> Reward:
        """Judge any text. Garbage scores 0.0. This never raises and never hangs."""

    def tokenizer_corpus(self, num_lines: int) -> list[str]:
        """Texts for training a tokenizer. They contain every character of the task's own texts."""


def make_reward(format_weight: float, well_formed: bool, correct: bool, reason: str = "") -> Reward:
    """The module's equation."""
    assert well_formed or not correct
    return Reward(format_weight * well_formed + (1.0 - format_weight) * correct, well_formed, correct, reason)


def extract_answer(response: str, max_chars: int) -> str | None:
    """The stripped text between the tags, or None unless there is exactly one pair of tags, followed only by white space.

    An answer that is empty or longer than `max_chars` characters is None too. The limit keeps a hostile text of a megabyte away from
    the parsers that get the answer.
    """
    if response.count(OPEN) != 1 or response.count(CLOSE) != 1:
        return None
    before, _, after = response.partition(CLOSE)
    _, opened, answer = before.partition(OPEN)
    answer = answer.strip() if len(answer) <= 2 * max_chars else ""
    if not opened or after.strip() or not 0 < len(answer) <= max_chars:
        return None
    return answer


def wrap_answer(answer: str) -> str:
    return f"{OPEN}{answer}{CLOSE}"


def is_held_out(key: str) -> bool:
    """Whether a generated puzzle is held out. A stable hash of the puzzle decides, so training and held-out puzzles never overlap, whatever
    is drawn."""
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_BUCKETS == 0
