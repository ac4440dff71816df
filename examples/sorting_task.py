"""A task of your own: sort the digits of a number.

prompt    7415:
response  <answer>1457</answer>

ais-megatron train configs/tiny_countdown.yaml run.dir=runs/sorting task.name=examples.sorting_task:Sorting 'task.options={digits: 4}'
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from ais_megatron.config import TaskConfig
from ais_megatron.tasks.reading import Row
from ais_megatron.tasks.streams import StreamTask
from ais_megatron.tasks.task import Problem, Reward, extract_answer, make_reward, wrap_answer

MAX_DIGITS = 12


class Sorting(StreamTask):
    """`StreamTask` keeps training and held-out problems apart, reads files if there are any, and numbers the stream."""

    name = "sorting"
    alphabet = "0123456789:"

    def __init__(self, config: TaskConfig, seed: int) -> None:
        """task.options: ``digits``, how many digits a number has."""
        unknown = config.options.keys() - {"digits"}
        self.digits = config.options.get("digits", 4)
        if unknown or not isinstance(self.digits, int) or not 2 <= self.digits <= MAX_DIGITS:
            raise ValueError(f"task.options={config.options}: allowed: digits, from 2 to {MAX_DIGITS}")
        super().__init__(config, seed)

    def draw(self, rng: random.Random) -> Problem:
        """One random puzzle, for a run without files."""
        return _problem("".join(rng.choices("0123456789", k=self.digits)))

    def parse(self, row: Row) -> Problem:
        """A row of task.train_path or task.test_path."""
        number = row.text("number")
        if not number.isdecimal() or not number.isascii():
            raise ValueError(f"{row.where}: column 'number' must hold digits, got {number!r}")
        return _problem(number)

    def reward(self, problem_truth: Mapping[str, Any], response: str) -> Reward:
        """Judge any text at all. `extract_answer` gives None unless there is exactly one answer, of at most 12 characters."""
        answer = extract_answer(response, MAX_DIGITS)
        well_formed = answer is not None and answer.isdecimal()
        return make_reward(self.config.format_weight, well_formed, well_formed and answer == problem_truth["sorted"])


def _problem(number: str) -> Problem:
    in_order = "".join(sorted(number))
    return Problem(text=f"{number}:", truth={"sorted": in_order}, solution=wrap_answer(in_order))
