"""The coefficient of adaptive importance sampling.

    product    alpha = clip( rho (1 - exp(-D / tau)) / max(1, nu),  alpha_min, alpha_max )
    oracle     alpha = clip( (b2 + (V0 - C01) / N) / (b2 + (V0 + V1 - 2 C01) / N) ),  b2 = max(0, mean(g1 - g0)^2 - Var(g1 - g0) / N)
    constant   alpha = constant_alpha

Correct more when the divergence D is severe; trust the weights less when few samples carry them (rho) or when they
amplify the variance of the signal (nu). The oracle minimises the mean-squared error of (1 - alpha) mean(g0) + alpha mean(g1)
under the surrogate that g1 is unbiased. Source: AIS (arXiv 2605.13907), Proposition 1, in the form of docs/algorithm.md.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ais_megatron.algorithm.correction import Correction
from ais_megatron.algorithm.diagnostics import Diagnostics
from ais_megatron.algorithm.scaler import LossScaler
from ais_megatron.config import AISConfig, Config


@dataclass(frozen=True)
class AISState:
    """All that alpha remembers, equal on every rank and saved with a checkpoint.

    batches, divergence_sum: the batches that make up an automatic tau, and the sum of their D. alpha: of the latest batch,
    smoothed if `ais.ema` says so; None before the first.
    """

    batches: int = 0
    divergence_sum: float = 0.0
    alpha: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; JSON writes floats so that they come back to the last bit."""
        return asdict(self)


def step(state: AISState, diagnostics: Diagnostics, ais: AISConfig) -> tuple[float, AISState]:
    """alpha of the batch with these diagnostics, and what to remember of it. Pure, the same on every rank."""
    batches, total = state.batches, state.divergence_sum
    if batches < ais.auto_batches:
        batches, total = batches + 1, total + diagnostics.divergence_severity
    alpha = coefficient(diagnostics, ais, tau=total / batches if ais.tau == "auto" else ais.tau)
    if state.alpha is not None:
        alpha = ais.ema * state.alpha + (1.0 - ais.ema) * alpha
    return alpha, AISState(batches, total, alpha)


def coefficient(diagnostics: Diagnostics, ais: AISConfig, tau: float) -> float:
    """alpha of one batch by the configured rule, in [alpha_min, alpha_max]."""
    if ais.coefficient == "constant":
        return _clip(ais.constant_alpha, ais)
    if ais.coefficient == "oracle":
        return oracle_coefficient(diagnostics, ais)
    return product_coefficient(diagnostics, ais, tau)


def product_coefficient(diagnostics: Diagnostics, ais: AISConfig, tau: float | None = None) -> float:
    """alpha of one batch, from its global diagnostics; tau: in place of `ais.tau`, 0 where no divergence was ever seen."""
    if tau is None:
        assert ais.tau != "auto", "an automatic tau comes from the batches so far (`step`): pass it"
        tau = ais.tau
    divergence = diagnostics.divergence_severity
    factors = {
        "reliability": diagnostics.weight_reliability if ais.reliability == "truncated" else diagnostics.weight_reliability_raw,
        "severity": -math.expm1(-divergence / tau) if divergence > 0.0 else 0.0,
        "amplification": 1.0 / max(1.0, diagnostics.variance_amplification),
    }
    return _clip(math.prod(factors[name] for name in ais.factors), ais)


def oracle_coefficient(diagnostics: Diagnostics, ais: AISConfig) -> float:
    """The plug-in of Proposition 1; alpha_min where the weights move no response's signal (or there is only one).

    With gap = g1 - g0: V0 - C01 = -Cov(g0, gap) and V0 + V1 - 2 C01 = Var(gap), which do not cancel where g1 is close to g0.
    """
    n = diagnostics.num_sequences
    if n < 2:
        return ais.alpha_min
    variance = diagnostics.signal_gap_variance / n
    bias_sq = max(0.0, diagnostics.signal_gap**2 - variance)
    if bias_sq + variance <= 0.0:
        return ais.alpha_min
    return _clip((bias_sq - diagnostics.signal_gap_covariance / n) / (bias_sq + variance), ais)


def loss_scaler(diagnostics: Diagnostics, config: Config, state: AISState | None = None) -> tuple[LossScaler, AISState]:
    """The scaler of the batch with these diagnostics, and the state after it (`AISState()` before the first batch)."""
    alpha, state = step(state or AISState(), diagnostics, config.ais)
    return _scaler(config, alpha, diagnostics.mean_weight), state


def lagged_loss_scaler(config: Config, state: AISState) -> LossScaler:
    """The scaler of a batch that is not yet known: the alpha of the one before, alpha_min at the start."""
    return _scaler(config, config.ais.alpha_min if state.alpha is None else state.alpha)


def _scaler(config: Config, alpha: float, mean_full_weight: float = 1.0) -> LossScaler:
    """Only ais mixes; the other corrections act at full strength, and none at no strength."""
    correction = Correction.of(config)
    alpha = {"ais": alpha, "none": 0.0}.get(correction.name, 1.0)
    return LossScaler(
        alpha=alpha,
        aggregation=config.objective.resolved.aggregation,
        correction=correction,
        mean_weight=_mean_weight(alpha, mean_full_weight) if correction.batch_normalise else 1.0,
        response_limit=config.rollout.max_response_tokens,
    )


def _mean_weight(alpha: float, mean_full_weight: float) -> float:
    """The global mean of s = 1 + alpha (w - 1); 1 where every weight is 0, and so every product is 0 whatever divides it."""
    mean = 1.0 + alpha * (mean_full_weight - 1.0)
    return mean if mean > 0.0 else 1.0


def _clip(alpha: float, ais: AISConfig) -> float:
    return min(max(alpha, ais.alpha_min), ais.alpha_max)
