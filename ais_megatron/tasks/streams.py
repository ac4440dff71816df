"""Where problems come from, the same for all tasks: rows of files, or puzzles drawn from a seed.

Training and held-out problems are disjoint by construction, judged by the prompt's text: generated ones by a hash of it
(`is_held_out`), and every problem of the test file is taken out of the generator's reach. A training row that is also a
test row is an error, not a warning.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from ais_megatron.config import TaskConfig
from ais_megatron.tasks.reading import Row, read_rows
from ais_megatron.tasks.task import CLOSE, OPEN, Problem, Reward, is_held_out

MAX_DRAWS = 20_000  # then the space of puzzles is too small, and the user hears of it


class StreamTask(ABC):
    """A `Task` whose subclass says what a row means (`parse`), how an answer is judged (`reward`), and, for puzzles, how one
    is drawn (`draw`)."""

    name: str
    special_pieces: tuple[str, ...] = (OPEN, CLOSE)
    alphabet = ""  # characters that the tokenizer must know even if a small corpus happens not to show them

    def __init__(self, config: TaskConfig, seed: int) -> None:
        """Reads the files that `config` names. Raises ValueError on unreadable, malformed or overlapping ones."""
        self.config, self.seed = config, seed
        self._test = [self.parse(row) for row in read_rows(config.test_path, "test")] if config.test_path else None
        self._test_texts = frozenset(problem.text for problem in self._test or ())
        self._train = self._read_train(config.train_path) if config.train_path else None
        self._train_texts = frozenset(problem.text for problem in self._train or ())

    @abstractmethod
    def parse(self, row: Row) -> Problem:
        """A row of the task's file as a problem; ValueError naming the row's file and line if it is malformed."""

    @abstractmethod
    def reward(self, problem_truth: Mapping[str, Any], response: str) -> Reward: ...

    def draw(self, rng: random.Random) -> Problem | None:
        """One random puzzle, or None where this draw gave none. Tasks with written questions cannot draw."""
        raise ValueError(f"task.train_path: task.name={self.name} cannot generate its questions; set task.train_path to a file of them")

    def train_problem(self, index: int) -> Problem:
        if self._train is not None:
            epoch, position = divmod(index, len(self._train))
            return self._train[_permutation(f"{self.name}:{self.seed}:epoch{epoch}", len(self._train))[position]]
        rng = random.Random(f"{self.name}:{self.seed}:{index}")
        for _ in range(MAX_DRAWS):
            problem = self.draw(rng)
            if problem is not None and not is_held_out(problem.text) and problem.text not in self._test_texts:
                return problem
        raise self._too_few_puzzles("training")

    def test_problems(self, num: int) -> list[Problem]:
        if self._test is not None:
            return self._test[:num]
        # No seed in this stream: runs with different seeds are then measured on the same puzzles.
        rng = random.Random(f"{self.name}:test")
        found: dict[str, Problem] = {}
        for _ in range(MAX_DRAWS + 100 * num):
            if len(found) == num:
                break
            problem = self.draw(rng)
            if problem is not None and is_held_out(problem.text) and problem.text not in self._train_texts:
                found[problem.text] = problem
        if not found and num:
            raise self._too_few_puzzles("held-out")
        return list(found.values())

    def tokenizer_corpus(self, num_lines: int) -> list[str]:
        problems = (self.train_problem(index) for index in range(num_lines - bool(self.alphabet)))
        return [self.alphabet] * bool(self.alphabet) + [problem.text + (problem.solution or "") for problem in problems]

    def _read_train(self, path: str) -> Sequence[Problem]:
        problems = []
        for row in read_rows(path, "train"):
            problems.append(self.parse(row))
            if problems[-1].text in self._test_texts:
                raise ValueError(f"{row.where}: this problem is also in task.test_path={self.config.test_path}; remove it from one of them")
        return problems

    def _too_few_puzzles(self, side: str) -> ValueError:
        settings = f"task.max_number={self.config.max_number}, task.empty_cells={self.config.empty_cells}"
        return ValueError(f"task.name={self.name}: no {side} puzzle in {MAX_DRAWS} draws with {settings}; allow more of them")


@lru_cache(maxsize=4)
def _permutation(key: str, length: int) -> tuple[int, ...]:
    """A shuffle of range(length) that depends on nothing but `key`."""
    order = list(range(length))
    random.Random(key).shuffle(order)
    return tuple(order)
