"""Assumptions of the plan that `benchmarks/plan_calibration.py` has measured, instead of their defaults."""

from __future__ import annotations

import json
from pathlib import Path

from ais_megatron.config import ConfigError

MEASURED = ("train_ratio", "recompute_ratio", "quantize_passes", "request_us")
"""Fields of `cost.Assumptions` that a CPU can measure. All others are properties of GPUs and networks."""


def read_calibration(path: Path) -> dict[str, float]:
    """The measured assumptions in a file of `benchmarks/plan_calibration.py`: its object "assumptions".

    Raises:
        ConfigError: the file is missing, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["assumptions"]
        unknown = sorted(set(values) - set(MEASURED))
        numbers = {name: float(value) for name, value in values.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--calibration {path}: cannot be used ({error}); give the file that benchmarks/plan_calibration.py --out wrote"
        ) from error
    if unknown:
        raise ConfigError(f"--calibration {path}: unknown assumptions {', '.join(unknown)}; allowed: {', '.join(MEASURED)}")
    return numbers
