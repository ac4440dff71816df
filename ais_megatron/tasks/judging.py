r"""The built-in judges of ``task.name=qa``: ``task.reward=math``, ``exact`` or ``choice``.

Each finds the answer in a response (see `extraction`) and compares it with the accepted answers of the problem:

- math: equal as numbers, or as mathematical objects according to math-verify. "033" equals 33, and "0.5" equals ``\frac{1}{2}``.
- exact: the same text, apart from white space at the ends and its amount elsewhere. Two plain numbers are compared by value.
- choice: the letter of the right choice, such as "B", "(b)" or "B. Paris", or the text of that choice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from ais_megatron.config.task import BuiltinReward
from ais_megatron.tasks.extraction import find_answer
from ais_megatron.tasks.math500 import is_equal, strip_wrapping
from ais_megatron.tasks.task import Reward, make_reward, wrap_answer

MAX_ANSWER_CHARS = 512
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
INSTRUCTIONS: dict[BuiltinReward, str] = {
    "math": r"Reason step by step, then write the final answer within \boxed{}.",
    "exact": "Reason step by step, then write only the final answer within <answer> and </answer>.",
    "choice": "Reason step by step, then write the letter of the right choice within <answer> and </answer>.",
}
# With or without separators between groups of three digits. (Not \d, which also matches digits of other scripts.)
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?")
_LETTER = re.compile(r"\(?([A-Za-z])\)?(?:[.:)]\s*(.*))?", re.DOTALL)


def judge(kind: BuiltinReward, truth: Mapping[str, Any], response: str, format_weight: float) -> Reward:
    """Judge a response.

    Args:
        truth: `answer`, a text or a list of accepted texts. For "choice" they are letters, and `choices` has the texts of the choices if
            they are known.
    """
    found = find_answer(response, MAX_ANSWER_CHARS)
    if found.answer is None:
        return make_reward(format_weight, False, False, found.reason)
    if not found.answer.replace("\n", "").isprintable():
        return make_reward(format_weight, False, False, f"{found.reason} has characters that cannot be printed")
    accepted = [truth["answer"]] if isinstance(truth["answer"], str) else list(truth["answer"])
    said = f"answer {found.answer} from {found.reason}"
    if kind == "choice":
        letter = read_letter(found.answer, truth.get("choices"))
        if letter is None:
            return make_reward(format_weight, False, False, f"{said} names no single choice; expected {' or '.join(accepted)}")
        correct = letter in accepted
    else:
        same = is_same_math if kind == "math" else is_same_text
        correct = any(same(gold, found.answer) for gold in accepted)
    return make_reward(format_weight, True, correct, f"{said}; {'equal to' if correct else 'expected'} {' or '.join(accepted)}")


def solution_of(kind: BuiltinReward, answer: str) -> str:
    """A response with nothing but the answer, which scores 1.0."""
    return rf"\boxed{{{answer}}}" if kind == "math" else wrap_answer(answer)


def is_same_math(gold: str, answer: str) -> bool:
    numbers = read_plain_number(strip_wrapping(gold)), read_plain_number(strip_wrapping(answer))
    return numbers[0] == numbers[1] if None not in numbers else is_equal(gold, answer)


def is_same_text(gold: str, answer: str) -> bool:
    numbers = read_plain_number(gold), read_plain_number(answer)
    return numbers[0] == numbers[1] if None not in numbers else gold.split() == answer.split()


def read_plain_number(text: str) -> Decimal | None:
    """The value of a text that is a decimal number and nothing else, or None."""
    text = text.strip()
    if not any(character in "0123456789" for character in text) or not _NUMBER.fullmatch(text):
        return None
    return Decimal(text.replace(",", ""))


def read_letter(answer: str, choices: Sequence[str] | None) -> str | None:
    r"""The letter that an answer names, or None if it names none or several. ``\text{B}`` names B too."""
    answer = strip_wrapping(answer)
    if wrapped := re.fullmatch(r"\\(?:text|textbf|mathrm|mathbf)\{(.*)\}", answer, re.DOTALL):
        answer = wrapped[1].strip()
    texts = [_folded(choice) for choice in choices or ()]
    if texts.count(_folded(answer)) == 1:  # first, because a choice may itself be a letter
        return LETTERS[texts.index(_folded(answer))]
    match = _LETTER.fullmatch(answer)
    if match is None or choices is not None and match[1].upper() not in LETTERS[: len(choices)]:
        return None
    letter, text = match[1].upper(), match[2]
    if text and choices is not None and _folded(text) != texts[LETTERS.index(letter)]:
        return None  # "A. or B." and "A) the text of choice B"
    return letter


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()
