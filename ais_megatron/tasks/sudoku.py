"""4x4 Sudoku: fill the zeros so that every row, column and 2x2 box contains 1, 2, 3 and 4.

    prompt    3102200002100320:
    response  <answer>3142243142131324</answer>

Together they have 36 tokens, including the final end-of-sequence. The file format is that of dllm-reasoning/d1 (arXiv:2504.12216): a CSV
file with the columns ``Puzzle`` and ``Solution``, each with 16 digits, row by row, where 0 is an empty cell.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ais_megatron.config import TaskConfig
from ais_megatron.tasks.extraction import finder_of
from ais_megatron.tasks.reading import Row
from ais_megatron.tasks.streams import StreamTask
from ais_megatron.tasks.task import Problem, Reward, make_reward, wrap_answer

CELLS = 16
INSTRUCT = """\
Solve this 4x4 Sudoku. Each line below is a row of the grid, and 0 is an empty cell.
{grid}
Put a digit from 1 to 4 into every empty cell. Each row, each column and each of the four 2x2 boxes must contain 1, 2, 3 and 4.
Think first. Then write all 16 digits of the solved grid, row by row and without spaces, within <answer> and </answer>. As a single line the
puzzle is {puzzle}, and your answer has the same form without zeros."""
MAX_EMPTY_CELLS = 12  # a 4x4 grid needs at least four givens for a unique solution


def _all_grids() -> tuple[str, ...]:
    """The 288 complete grids, sorted. Rows are permutations, and columns and boxes are checked."""
    rows = [("".join(p)) for p in itertools.permutations("1234")]
    bands = [r + s for r in rows for s in rows if _differ(r, s) and len({*r[:2], *s[:2]}) == 4]
    return tuple(u + d for u in bands for d in bands if all(_differ(r, s) for r in (u[:4], u[4:]) for s in (d[:4], d[4:])))


def _differ(row: str, other: str) -> bool:
    return all(x != y for x, y in zip(row, other, strict=True))


_GRIDS = _all_grids()
# Bit g of _HOLDS[cell][digit] means that grid g has this digit in this cell. Digit "0" excludes nothing. Solving takes 16 ANDs.
_HOLDS = [{d: sum(1 << g for g, grid in enumerate(_GRIDS) if d in ("0", grid[cell])) for d in "01234"} for cell in range(CELLS)]


class Sudoku(StreamTask):
    name = "sudoku"
    alphabet = "0123456789:"

    def __init__(self, config: TaskConfig, seed: int) -> None:
        if config.empty_cells > MAX_EMPTY_CELLS:
            raise ValueError(
                f"task.empty_cells={config.empty_cells}: no such 4x4 Sudoku has a unique solution; allowed: 1 to {MAX_EMPTY_CELLS}"
            )
        super().__init__(config, seed)

    def parse(self, row: Row) -> Problem:
        puzzle, solution = (row.text(column).strip() for column in ("Puzzle", "Solution"))
        if not re.fullmatch("[0-4]{16}", puzzle):
            raise ValueError(f"{row.where}: column 'Puzzle' must be 16 digits from 0 to 4, got {puzzle!r}")
        if not is_solution(puzzle, solution):
            raise ValueError(f"{row.where}: column 'Solution' {solution!r} does not solve the puzzle {puzzle!r}")
        return _make_problem(puzzle, solution)

    def draw(self, rng: random.Random) -> Problem | None:
        """A random grid with `task.empty_cells` random cells emptied, or None unless its solution is unique."""
        grid = rng.choice(_GRIDS)
        empty = frozenset(rng.sample(range(CELLS), self.config.empty_cells))
        puzzle = "".join("0" if cell in empty else digit for cell, digit in enumerate(grid))
        return _make_problem(puzzle, grid) if len(solutions(puzzle)) == 1 else None

    def present(self, problem: Problem) -> Problem:
        if self.config.prompt_style == "terse":
            return problem
        puzzle = problem.truth["puzzle"]
        return replace(problem, text=INSTRUCT.format(puzzle=puzzle, grid="\n".join(puzzle[i : i + 4] for i in range(0, CELLS, 4))))

    def reward(self, problem_truth: Mapping[str, Any], response: str) -> Reward:
        found = finder_of(self.config.prompt_style)(response, CELLS)
        if found.answer is None:
            return make_reward(self.config.format_weight, False, False, found.reason)
        said = f"answer {found.answer} from {found.reason}"
        if re.fullmatch("[1-4]{16}", found.answer) is None:
            return make_reward(self.config.format_weight, False, False, f"{said}; expected 16 digits from 1 to 4")
        solved = is_solution(problem_truth["puzzle"], found.answer)
        return make_reward(self.config.format_weight, True, solved, f"{said}; it {'solves' if solved else 'does not solve'} the puzzle")


def is_solution(puzzle: str, answer: str) -> bool:
    """Whether `answer` is a complete valid grid with the givens of the puzzle. Any such grid counts."""
    return answer in solutions(puzzle)


def solutions(puzzle: str) -> list[str]:
    """All completions of a 16-digit puzzle, sorted."""
    left = -1
    for cell, digit in enumerate(puzzle):
        left &= _HOLDS[cell][digit]
    found = []
    while left:
        lowest = left & -left
        found.append(_GRIDS[lowest.bit_length() - 1])
        left ^= lowest
    return found


def _make_problem(puzzle: str, solution: str) -> Problem:
    return Problem(f"{puzzle}:", {"puzzle": puzzle}, wrap_answer(solution))
