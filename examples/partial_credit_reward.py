"""A reward of your own: a Sudoku earns something for every correct cell, and not only for the whole grid.

    ais-megatron train configs/tiny_sudoku.yaml run.dir=runs/cells task.reward=examples.partial_credit_reward:right_cells \\
        'task.options={most: 0.5}'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ais_megatron.tasks.sudoku import CELLS, solutions
from ais_megatron.tasks.task import Reward, extract_answer


def right_cells(truth: Mapping[str, Any], response: str, options: Mapping[str, Any]) -> Reward:
    """1.0 for the solution; otherwise the share of right cells times ``most``.

    Args:
        truth: what the task's problem carries, here ``{"puzzle": 16 digits, 0 for an empty cell}``.
        response: the model's text, which may be anything.
        options: `task.options`, here ``most``: the reward of a grid in which nearly all cells are right.
    """
    answer = extract_answer(response, CELLS)
    if answer is None or len(answer) != CELLS:
        return Reward(0.0, well_formed=False, correct=False)
    right = max(sum(a == b for a, b in zip(answer, grid, strict=True)) for grid in solutions(truth["puzzle"]))
    if right == CELLS:
        return Reward(1.0, well_formed=True, correct=True)
    return Reward(options.get("most", 0.5) * right / CELLS, well_formed=True, correct=False)
