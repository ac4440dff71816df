"""What every task offers: problems to answer and a reward that a program, not a model, decides.

A response is free text that must hold exactly one ``<answer>…</answer>`` with nothing but white space after it. The reward
is the usual verifiable one, split so that a model that cannot solve anything yet still has a slope to climb:

    value = format_weight * well_formed + (1 - format_weight) * correct        (correct implies well_formed)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

OPEN, CLOSE = "<answer>", "</answer>"
HELD_OUT_BUCKETS = 8  # one puzzle in this many is never generated for training


@dataclass(frozen=True)
class Problem:
    """One question.

    text: the prompt as the model sees it.
    truth: what the reward needs; plain JSON values, so that it survives a trip through a rollout log.
    solution: a gold response text that scores 1.0, also the SFT target; None only if the file has none.
    """

    text: str
    truth: Mapping[str, Any]
    solution: str | None


@dataclass(frozen=True)
class Reward:
    """`value` in [0, 1]; see the module's equation."""

    value: float
    well_formed: bool
    correct: bool


class Task(Protocol):
    @property
    def name(self) -> str:
        """What messages and random streams call the task."""

    @property
    def special_pieces(self) -> tuple[str, ...]:
        """Texts that the tokenizer keeps as one token each."""

    def train_problem(self, index: int) -> Problem:
        """The problem at `index` (from 0, endless) of the training stream: a pure function of (seed, index)."""

    def test_problems(self, num: int) -> list[Problem]:
        """At most `num` held-out problems, the same ones on every call and for every seed."""

    def reward(self, problem_truth: Mapping[str, Any], response: str) -> Reward:
        """Judge any string at all: garbage scores 0.0, it never raises and never hangs."""

    def tokenizer_corpus(self, num_lines: int) -> list[str]:
        """Texts from which a tokenizer learns its pieces; every character of the task's own texts occurs in them."""


def make_reward(format_weight: float, well_formed: bool, correct: bool) -> Reward:
    """The module's equation."""
    assert well_formed or not correct
    return Reward(format_weight * well_formed + (1.0 - format_weight) * correct, well_formed, correct)


def extract_answer(response: str, max_chars: int) -> str | None:
    """The stripped text between the tags; None unless there is exactly one pair, in order, followed by white space only.

    An answer that is empty or longer than `max_chars` characters is None too. The bound keeps a hostile megabyte away from
    the parsers behind this function.
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
    """Whether a generated puzzle belongs to the test side. A stable hash of the puzzle itself decides, not a seed or a
    counter: two streams that ask this question can never share a puzzle, whatever they draw."""
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_BUCKETS == 0
