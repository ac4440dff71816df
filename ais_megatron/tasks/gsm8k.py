"""GSM8K (arXiv:2110.14168): grade-school word problems. The gold number follows ``#### `` in the column ``answer``.

The response reasons freely and ends with ``<answer>18</answer>``. Numbers are compared by value, so "$1,080.00", "1080 eggs" and
"1080." all equal 1080.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from ais_megatron.tasks.reading import Row
from ais_megatron.tasks.streams import StreamTask
from ais_megatron.tasks.task import Problem, Reward, extract_answer, make_reward, wrap_answer

MAX_ANSWER_CHARS = 64
INSTRUCTION = "\nReason step by step, then write the final number within <answer> and </answer>."
_CALCULATION = re.compile("<<[^<>]*>>")  # calculator annotations of the data set, for example <<48/2=24>>
# Digits with thousands separators only between groups of three, and a decimal part. A sign may come before a currency sign.
_NUMBER = re.compile(r"(?P<sign>[-+\u2212]?)\s*[$£€]?\s*(?P<number>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")


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
        answer = extract_answer(response, MAX_ANSWER_CHARS)
        number = read_number(answer) if answer is not None else None
        correct = number is not None and number == Decimal(problem_truth["answer"])
        return make_reward(self.config.format_weight, number is not None, correct)


def read_number(text: str) -> Decimal | None:
    """The number in `text`, which may also have currency signs, units and a full stop.

    None unless there is exactly one number, so that a list of guesses earns nothing."""
    match = _NUMBER.search(text)
    if match is None:
        return None
    rest = text[: match.start()] + " " + text[match.end() :]
    if any(character.isnumeric() for character in rest):
        return None
    value = Decimal(match["number"].replace(",", ""))
    return -value if match["sign"] in ("-", "\u2212") else value
