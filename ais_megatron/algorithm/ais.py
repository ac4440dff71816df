"""The coefficient of adaptive importance sampling.

    alpha = clip( rho (1 - exp(-D / tau)) / max(1, nu),  alpha_min, alpha_max )

Correct more when the divergence D is severe; trust the weights less when few samples carry them (rho) or when they
amplify the variance of the signal (nu). Source: AIS (arXiv 2605.13907), in the form of docs/algorithm.md.
"""

from __future__ import annotations

import math

from ais_megatron.algorithm.diagnostics import Diagnostics
from ais_megatron.algorithm.scaler import AISLossScaler
from ais_megatron.config import AISConfig, Config


def product_coefficient(diagnostics: Diagnostics, ais: AISConfig) -> float:
    """alpha of one batch, from its global diagnostics; the same on every rank because they are."""
    rho = diagnostics.weight_reliability if ais.reliability == "truncated" else diagnostics.weight_reliability_raw
    severity = -math.expm1(-diagnostics.divergence_severity / ais.tau)
    alpha = rho * severity / max(1.0, diagnostics.variance_amplification)
    return min(max(alpha, ais.alpha_min), ais.alpha_max)


def loss_scaler(diagnostics: Diagnostics, config: Config) -> AISLossScaler:
    """The scaler of this batch: `correction` none is alpha = 0, tis is alpha = 1, ais measures it."""
    alpha = {"none": 0.0, "tis": 1.0}.get(config.correction)
    if alpha is None:
        alpha = product_coefficient(diagnostics, config.ais)
    return AISLossScaler(alpha=alpha, weight_cap=config.ais.weight_cap, aggregation=config.objective.aggregation)
