"""Draws docs/alpha.png with the code that training uses: ``python docs/plot_alpha.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

from ais_megatron.algorithm.ais import product_coefficient
from ais_megatron.algorithm.diagnostics import Diagnostics
from ais_megatron.config import AISConfig

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def alpha(divergence: float, rho: float = 1.0, nu: float = 1.0) -> float:
    measured = Diagnostics(divergence_severity=divergence, weight_reliability=rho, variance_amplification=nu)
    return product_coefficient(measured, AISConfig())


def main() -> None:
    divergences = np.logspace(-5, -1, 200)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for rho in (1.0, 0.9, 0.7, 0.5):
        axes[0].plot(divergences, [alpha(d, rho=rho) for d in divergences], label=f"rho = {rho}")
    for nu in (1.0, 1.2, 1.5, 2.0):
        axes[1].plot(divergences, [alpha(d, nu=nu) for d in divergences], label=f"nu = {nu}")
    for axis, title in zip(axes, ("weight reliability rho (nu = 1)", "variance amplification nu (rho = 1)"), strict=True):
        axis.axvspan(1e-3, 3e-3, color="0.92", label="FP8 rollouts of an 8B model")
        axis.set(xscale="log", xlabel="divergence severity D [nats per token]", title=title)
        axis.grid(True, color="0.9")
        axis.legend(frameon=False)
    axes[0].set_ylabel("alpha")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("alpha.png"), dpi=110)


if __name__ == "__main__":
    main()
