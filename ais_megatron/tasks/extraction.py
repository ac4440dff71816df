r"""Finds the answer in a response.

Two rules exist. `find_only_answer` is the strict one, for puzzles with a terse prompt: exactly one ``<answer>…</answer>``, and nothing
after it. A model that is trained from scratch on such a prompt has nothing else to say, and the strict rule keeps its responses short.

`find_answer` is for models that write in their own way:

- What is thought is not judged. Everything up to the last ``</think>`` is ignored. If a ``<think>`` after it is not closed, there is no
  answer, because the response never came to an end of its thoughts. (`response_text` restores a ``<think>`` that stands in the prompt.)
- A complete ``<answer>…</answer>`` and a ``\boxed{…}`` with balanced braces are both answers. The one that ends last counts. Text after
  it is allowed.
- Tags that only repeat the prompt ("within <answer> and </answer>") and empty ones are no answers, wherever they stand.
- If a response offers several answers, only the last one is judged. So a list of guesses earns no more than its last guess. Several
  values inside one answer are left to the judge of the task, which refuses them.

Both rules take time in proportion to the length of the response, whatever it contains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ais_megatron.tasks.task import CLOSE, OPEN, extract_answer, wrap_answer

THINK, THINK_END = "<think>", "</think>"
_TAGS = re.compile(f"{OPEN}|{CLOSE}")
# An escaped brace such as in \{1, 2\} is a character of the answer and opens or closes nothing.
_BRACES = re.compile(r"\\boxed\s{0,8}\{|\\.|[{}]", re.DOTALL)
_NO_ANSWERS = ("", "and")  # what stands between tags that only repeat the prompt
_AROUND = " \t\r\n.,;:…`'\"*_"


@dataclass(frozen=True)
class Found:
    """What was found in a response."""

    answer: str | None
    """The stripped text of the answer; None if there is none."""
    reason: str
    """Where the answer stands, such as "the last of 2 <answer> pairs", or why there is none."""


Finder = Callable[[str, int], Found]


def finder_of(prompt_style: str) -> Finder:
    """The rule for puzzles that are told in this style (`task.prompt_style`)."""
    return find_answer if prompt_style == "instruct" else find_only_answer


def find_answer(response: str, max_chars: int) -> Found:
    """The answer by the module's second rule. An answer of more than `max_chars` characters is None, which keeps long texts away from
    the parsers of the tasks."""
    response = response[response.rfind(THINK_END) + len(THINK_END) :] if THINK_END in response else response
    if THINK in response:
        return Found(None, "<think> is not closed")
    pairs, boxes = list(_pairs(response)), list(_boxes(response))
    if not pairs and not boxes:
        return Found(None, r"no <answer> pair and no \boxed{}")
    in_box = not pairs or bool(boxes) and boxes[-1][1] > pairs[-1][1]
    start, end = (boxes if in_box else pairs)[-1]
    answer = response[start:end].strip()
    if in_box and pairs and answer == wrap_answer(response[slice(*pairs[-1])]):
        answer = response[slice(*pairs[-1])].strip()
    if not 0 < len(answer) <= max_chars:
        return Found(None, f"the answer is longer than {max_chars} characters" if answer else "the answer is empty")
    number = len(boxes if in_box else pairs)
    where = r"\boxed{}" if in_box else "<answer> pair"
    return Found(answer, f"the {where}" if number == 1 else f"the last of {number} {where}" + "s" * (not in_box))


def find_only_answer(response: str, max_chars: int) -> Found:
    """The answer by the module's first rule, see `extract_answer`."""
    answer = extract_answer(response, max_chars)
    if answer is not None:
        return Found(answer, "the only <answer> pair")
    return Found(None, f"the response does not end with its only <answer> pair, of 1 to {max_chars} characters")


def last_boxed(text: str) -> str | None:
    r"""The stripped contents of the ``\boxed{…}`` with balanced braces that ends last, or None."""
    boxes = list(_boxes(text))
    return text[slice(*boxes[-1])].strip() if boxes else None


def _pairs(text: str) -> Iterator[tuple[int, int]]:
    """Start and end of what stands between each closing tag and the nearest opening tag before it. A tag belongs to one pair."""
    start = None
    for tag in _TAGS.finditer(text):
        if tag[0] == OPEN:
            start = tag.end()
        elif start is not None:
            if not _is_no_answer(text, start, tag.start()):
                yield start, tag.start()
            start = None


def _boxes(text: str) -> Iterator[tuple[int, int]]:
    r"""Start and end of the contents of each ``\boxed{…}``, in the order of their ends. Boxes may be nested."""
    first = text.find(r"\boxed")
    open_braces: list[int | None] = []  # where the contents of a box start; None for another brace
    for token in _BRACES.finditer(text, first) if first >= 0 else ():
        if token[0] == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and not _is_no_answer(text, start, token.start()):
                yield start, token.start()
        elif token[0][-1] == "{" and token[0] != r"\{":
            open_braces.append(None if token[0] == "{" else token.end())


def _is_no_answer(text: str, start: int, end: int) -> bool:
    # (Long texts are not looked at. Nested boxes share their contents, so that would take quadratic time.)
    return end - start <= 32 and text[start:end].strip(_AROUND).lower() in _NO_ANSWERS
