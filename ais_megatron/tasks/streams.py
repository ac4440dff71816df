"""The base class of all tasks. Problems are rows of files, or puzzles drawn from a seed.

Training and held-out problems never overlap, judged by the prompt's text. A hash of the text decides the side of a generated puzzle
(`is_held_out`), and problems of the test file are never generated. A training row that is also a test row is an error.
"""

from __future__ import annotations

import copy
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any, Self

from ais_megatron.config import TaskConfig
from ais_megatron.tasks.reading import Row, read_rows
from ais_megatron.tasks.task import CLOSE, OPEN, Problem, Reward, is_held_out

MAX_DRAWS = 20_000  # after this many draws the space of puzzles is too small, which is an error


class StreamTask(ABC):
    """A `Task`. Its subclass says what a row means (`parse`), how an answer is judged (`reward`) and, for puzzles, how one is drawn
    (`draw`)."""

    name: str = ""  # of messages and random streams; a subclass without one goes by its own name
    special_pieces: tuple[str, ...] = (OPEN, CLOSE)
    alphabet = ""  # characters that the tokenizer must know even if a small corpus does not contain them

    def __init__(self, config: TaskConfig, seed: int) -> None:
        """Read the files of `config`. Raises ValueError if they cannot be read, are malformed or overlap."""
        self.config, self.seed = config, seed
        self.name = self.name or type(self).__name__
        self._test = [self._problem(row) for row in read_rows(config.test_path, "test")] if config.test_path else None
        self._test_texts = frozenset(problem.text for problem in self._test or ())
        self._train = self._read_train(config.train_path) if config.train_path else None
        self._train_texts = frozenset(problem.text for problem in self._train or ())

    @abstractmethod
    def parse(self, row: Row) -> Problem:
        """The problem in a row of the task's file. If the row is malformed, a ValueError names its file and line."""

    @abstractmethod
    def reward(self, problem_truth: Mapping[str, Any], response: str) -> Reward: ...

    def present(self, problem: Problem) -> Problem:
        """The problem with the prompt that the model gets. What is held out is decided before, so it does not depend on the wording."""
        return problem

    def draw(self, rng: random.Random) -> Problem | None:
        """One random puzzle, or None if this draw gave none. Tasks with problems from files cannot draw."""
        raise ValueError(f"task.train_path: task.name={self.name} cannot generate problems; set task.train_path to a file of them")

    def train_problem(self, index: int) -> Problem:
        if self._train is not None:
            epoch, position = divmod(index, len(self._train))
            order = _permutation(f"{self.name}:{self.seed}:epoch{epoch}", len(self._train))
            return self.present(self._train[order[position]])
        rng = random.Random(f"{self.name}:{self.seed}:{index}")
        for _ in range(MAX_DRAWS):
            problem = self.draw(rng)
            if problem is not None and not is_held_out(problem.text) and problem.text not in self._test_texts:
                return self.present(problem)
        raise self._too_few_puzzles("training")

    def test_problems(self, num: int) -> list[Problem]:
        if self._test is not None:
            return [self.present(problem) for problem in self._test[:num]]
        # This stream has no seed, so runs with different seeds are evaluated on the same puzzles.
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
        return [self.present(problem) for problem in found.values()]

    def tokenizer_corpus(self, num_lines: int) -> list[str]:
        problems = (self.train_problem(index) for index in range(num_lines - bool(self.alphabet)))
        return [self.alphabet] * bool(self.alphabet) + [problem.text + (problem.solution or "") for problem in problems]

    def filtered(self, keep: Callable[[str, list[Problem]], list[Problem]]) -> Self:
        """This task with a part of the problems from its files. `keep` gets "train" or "test" and all problems of that file, and returns
        the part. Generated puzzles stay as they are."""
        chosen = copy.copy(self)
        for split in ("train", "test"):
            problems = getattr(self, f"_{split}")
            if problems is not None:
                setattr(chosen, f"_{split}", keep(split, [self.present(problem) for problem in problems]))
        return chosen

    def _problem(self, row: Row) -> Problem:
        return replace(self.parse(row), where=row.where)

    def _read_train(self, path: str) -> list[Problem]:
        problems = []
        for row in read_rows(path, "train"):
            problems.append(self._problem(row))
            if problems[-1].text in self._test_texts:
                raise ValueError(
                    f"{row.where}: this problem is also in task.test_path={self.config.test_path}; remove it from one of the two files"
                )
        return problems

    def _too_few_puzzles(self, side: str) -> ValueError:
        settings = f"task.max_number={self.config.max_number}, task.empty_cells={self.config.empty_cells}"
        return ValueError(
            f"task.name={self.name}: found no {side} puzzle in {MAX_DRAWS} draws with {settings}; choose settings that allow more puzzles"
        )


@lru_cache(maxsize=4)
def _permutation(key: str, length: int) -> tuple[int, ...]:
    """A shuffle of range(length) that depends only on `key`."""
    order = list(range(length))
    random.Random(key).shuffle(order)
    return tuple(order)
