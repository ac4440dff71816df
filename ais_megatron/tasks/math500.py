r"""MATH-500 (arXiv:2103.03874, the split of arXiv:2305.20050): competition problems with LaTeX answers.

The answer stands in ``<answer>…</answer>`` or ``\boxed{…}``, see `extraction.find_answer`. Two answers are equal if their normalised
LaTeX is the same text, or if math-verify considers them the same mathematical object (in a child process, see `equivalence`). If a row
has no column ``answer``, as in MATH's training files, the answer is in the last ``\boxed{…}`` of their ``solution``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ais_megatron.tasks.equivalence import are_equivalent
from ais_megatron.tasks.extraction import find_answer, last_boxed
from ais_megatron.tasks.reading import Row
from ais_megatron.tasks.streams import StreamTask
from ais_megatron.tasks.task import Problem, Reward, make_reward, wrap_answer

MAX_ANSWER_CHARS = 512
INSTRUCTION = "\nReason step by step, then write the final answer as LaTeX within <answer> and </answer>."
_SAME_LOOK = {r"\dfrac": r"\frac", r"\tfrac": r"\frac", r"\left": "", r"\right": "", r"\!": "", r"\,": "", r"\ ": "", r"\$": ""}
_REPLACED = re.compile("|".join(re.escape(text) + ("(?![a-zA-Z])" if text[-1].isalpha() else "") for text in _SAME_LOOK))


class Math500(StreamTask):
    name = "math500"

    def parse(self, row: Row) -> Problem:
        solution = row.text("solution").strip()
        answer = row.text("answer").strip() if "answer" in row.values else last_boxed(solution)
        if not answer or len(answer) > MAX_ANSWER_CHARS:
            raise ValueError(
                f"{row.where}: found no answer of at most {MAX_ANSWER_CHARS} characters in 'answer' or in \\boxed{{}} of 'solution'"
            )
        return Problem(row.text("problem").strip() + INSTRUCTION, {"answer": answer}, f"{solution}\n{wrap_answer(answer)}")

    def reward(self, problem_truth: Mapping[str, Any], response: str) -> Reward:
        found = find_answer(response, MAX_ANSWER_CHARS)
        if found.answer is None:
            return make_reward(self.config.format_weight, False, False, found.reason)
        if not found.answer.replace("\n", "").isprintable():
            return make_reward(self.config.format_weight, False, False, f"{found.reason} has characters that cannot be printed")
        gold = problem_truth["answer"]
        correct = is_equal(gold, found.answer)
        said = f"answer {found.answer} from {found.reason}; {'equal to' if correct else 'expected'} {gold}"
        return make_reward(self.config.format_weight, True, correct, said)


def is_equal(gold: str, answer: str) -> bool:
    """Whether two LaTeX answers have the same meaning. The cheap comparison of texts comes first."""
    gold, answer = strip_wrapping(gold), strip_wrapping(answer)
    if normalize(gold) == normalize(answer):
        return True
    # A text that still has delimiters has several formulas, and math-verify would choose the one that fits.
    if not answer.isascii() or re.search(r"(?<!\\)\$|\\boxed|\\\(|\\\[", answer):
        return False
    return are_equivalent(gold, answer)


def strip_wrapping(answer: str) -> str:
    r"""Remove an outer ``\boxed{}``, ``**``, ``$``, ``\( \)`` or ``\[ \]``, in any nesting, and a final full stop."""
    answer, before = answer.strip(), None
    while answer != before:
        before = answer
        if answer.startswith(r"\boxed{") and last_boxed(answer) == answer[7:-1].strip():
            answer = answer[7:-1]
        for left, right in (("**", "**"), ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
            if answer.startswith(left) and answer.endswith(right) and not answer.endswith("\\" + right):
                inner = answer[len(left) : -len(right)]
                answer = inner if len(answer) > len(left) and left not in inner else answer
        answer = answer.strip().removesuffix(".")
    return answer


def normalize(answer: str) -> str:
    """Remove what only changes the look of LaTeX: spacing, sizes of brackets and fractions, currency signs."""
    return re.sub(r"\s+", "", _REPLACED.sub(lambda match: _SAME_LOOK[match[0]], answer))
