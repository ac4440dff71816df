"""A reward for questions whose answer is measured or estimated: full marks close to the answer, and less further away.

ais-megatron train configs/tiny_own_data.yaml task.reward=examples.close_enough_reward:close_enough 'task.options={tolerance: 0.1}'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ais_megatron.tasks import Reward
from ais_megatron.tasks.extraction import find_answer


def close_enough(truth: Mapping[str, Any], response: str, options: Mapping[str, Any]) -> Reward:
    """1 up to a relative error of `options.tolerance`, then falling to 0 at ten times as much. `truth["answer"]` is the answer column."""
    found = find_answer(response, max_chars=64)
    try:
        expected, given = float(truth["answer"]), float(found.answer or "")
    except (TypeError, ValueError):  # this row's answer or the model's is no single number
        return Reward(0.0, well_formed=False, correct=False, reason=f"no number: {found.reason}")
    tolerance = float(options.get("tolerance", 0.01))
    error = abs(given - expected) / max(abs(expected), 1e-9)
    value = min(1.0, max(0.0, 1.0 - (error - tolerance) / (9 * tolerance)))
    return Reward(value, well_formed=True, correct=error <= tolerance, reason=f"relative error {error:.3g}")
