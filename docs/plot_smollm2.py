"""Draws docs/smollm2.png from a finished run of configs/smollm2_gsm8k.yaml: ``python docs/plot_smollm2.py runs/smollm2_gsm8k``."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import numpy as np

from ais_megatron.runs.metrics import read_evaluations, read_metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

WINDOW = 8  # steps in a running mean


def main(run: Path) -> None:
    rows, evaluations = read_metrics(run), read_evaluations(run)
    steps = np.array([row["step"] for row in rows])
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for name, label in (("pass@1", "held-out pass@1"), ("pass@2", "held-out pass@2")):
        at, values, errors = zip(*((e["step"], e[name], e[f"{name}_se"]) for e in evaluations), strict=True)
        axes[0].errorbar(at, values, errors, marker="o", capsize=3, label=label)
    axes[0].plot(steps, _running_mean(rows, "reward_mean"), color="0.6", label=f"training reward, mean of {WINDOW} steps")
    axes[1].plot(steps, _running_mean(rows, "divergence_severity"), label="D [nats per token]")
    axes[1].plot(steps, [1 - value for value in _running_mean(rows, "weight_reliability_raw")], label="1 - ESS ratio of the raw weights")
    axes[1].set(yscale="log")
    for axis in axes:
        axis.set(xlabel="step")
        axis.grid(True, color="0.9")
        axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("smollm2.png"), dpi=110)


def _running_mean(rows: list[dict[str, float]], name: str) -> list[float]:
    """The mean of the last `WINDOW` steps at each step."""
    values = [row[name] for row in rows]
    return [float(np.mean(values[max(0, end - WINDOW) : end])) for end in range(1, len(values) + 1)]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
