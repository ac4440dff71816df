r"""GSM8K (arXiv:2110.14168): grade-school word problems. The gold number follows ``#### `` in the column ``answer``.

The response reasons freely and ends with ``<answer>18</answer>`` or ``\boxed{18}``, see `extraction.find_answer`. Numbers are compared
by value, so "$1,080.00", "1{,}080\text{ eggs}", "**1080**" and "1080." all equal 1080. A line "#### 18", with which the data set
itself ends its solutions, is no answer outside the tags and the box, because the prompt asks for the tags.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from ais_megatron.tasks.extraction import find_answer
from ais_megatron.tasks.reading import Row
from ais_megatron.tasks.streams import StreamTask
from ais_megatron.tasks.task import Problem, Reward, make_reward, wrap_answer

MAX_ANSWER_CHARS = 64
INSTRUCTION = "\nReason step by step, then write the final number within <answer> and </answer>."
_CALCULATION = re.compile("<<[^<>]*>>")  # calculator annotations of the data set, for example <<48/2=24>>
# Digits with thousands separators only between groups of three, and a decimal part. A sign may come before a currency sign.
_NUMBER = re.compile(r"(?P<sign>[-+\u2212]?)\s*[$£€]?\s*(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
# How LaTeX writes a thousands separator: {,} or a thin space between digits, and 10,\!080.
_LATEX_SEPARATOR = re.compile(r"(?<=[0-9])(?:\{,\}|,\\!|\\[,;: ]|~)(?=[0-9]{3}(?![0-9]))")
_LATEX_LOOK = re.compile(r"\\(?:boxed|text|textbf|mathrm|mathbf|mbox|left|right|quad|circ|displaystyle)(?![a-zA-Z])|\\[^a-zA-Z]")
_COMMAND = re.compile(r"\\[a-zA-Z]")


class GSM8K(StreamTask):
    name = "gsm8k"

    def parse(self, row: Row) -> Problem:
        reasoning, mark, gold = row.text("answer").rpartition("####")
        number = read_number(gold) if mark else None
        if number is None:
            raise ValueError(f"{row.where}: column 'answer' must end with '#### ' and a number, got {row.text('answer')[-40:]!r}")
        solution = f"{_CALCULATION.sub('', reasoning).strip()}\n{wrap_answer(f'{number:f}')}"
        return Problem(row.text("question").strip() + INSTRUCTION, {"answer": f"{number:f}"}, solution)

    def reward(self, problem_truth: Mapping[str, Any], response: str) -> Reward:
        found = find_answer(response, MAX_ANSWER_CHARS)
        if found.answer is None:
            return make_reward(self.config.format_weight, False, False, found.reason)
        said = f"answer {found.answer} from {found.reason}"
        number, expected = read_number(found.answer), Decimal(problem_truth["answer"])
        if number is None:
            return make_reward(self.config.format_weight, False, False, f"{said}; it is not exactly one number")
        return make_reward(self.config.format_weight, True, number == expected, f"{said}; it is {number:f}, expected {expected:f}")


def read_number(text: str) -> Decimal | None:
    r"""The number in `text`, which may also have currency signs, units, a full stop, and LaTeX or Markdown around them.

    None unless there is exactly one number, so that a list of guesses earns nothing. None as well if a LaTeX command such as ``\sqrt`` or
    ``\frac`` would change the value."""
    text = _LATEX_LOOK.sub(" ", _LATEX_SEPARATOR.sub(",", text))
    match = _NUMBER.search(text)
    if match is None or _COMMAND.search(text):
        return None
    rest = text[: match.start()] + " " + text[match.end() :]
    if any(character.isnumeric() for character in rest):
        return None
    value = Decimal(match["number"].replace(",", ""))
    return -value if match["sign"] in ("-", "\u2212") else value
