"""The colours and the style of all our images, and the moving average of their curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

# The colours of Okabe and Ito, which colour-blind readers can tell apart, and one more for the ninth phase.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
PHASE_COLOURS = (BLUE, "#E69F00", "#56B4E9", PURPLE, ORANGE, GREEN, "#F0E442", "#8C8C8C", "#6A3D9A")
STYLE: dict[Any, Any] = {  # (matplotlib would have its keys be a Literal of all its settings)
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "figure.dpi": 130,
}


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """The mean over the `window` (odd) points around each point. Near the ends fewer points exist."""
    assert window % 2 == 1
    half = window // 2
    around = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [math.fsum(part) / len(part) for part in around]
