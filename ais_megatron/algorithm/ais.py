"""The coefficient of adaptive importance sampling.

    product    alpha = clip( rho (1 - exp(-D / tau)) / max(1, nu),  alpha_min, alpha_max )
    oracle     alpha = clip( (b2 + (V0 - C01) / N) / (b2 + (V0 + V1 - 2 C01) / N) ),  b2 = max(0, mean(g1 - g0)^2 - Var(g1 - g0) / N)
    constant   alpha = constant_alpha
    measured   alpha and the limit of the weights with the least estimated error of the gradient, see `measured`

The correction is stronger if the divergence D is large. It is weaker if few samples carry the importance weights (rho), or if the
weights amplify the variance of the signal (nu). The oracle minimises the mean-squared error of (1 - alpha) mean(g0) + alpha mean(g1)
under the assumption that g1 is unbiased. Source: AIS (arXiv 2605.13907), Proposition 1, in the form of docs/algorithm.md.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ais_megatron.algorithm.diagnostics import Diagnostics
from ais_megatron.algorithm.gradients import GradientSums
from ais_megatron.algorithm.measured import Choice, Evidence
from ais_megatron.algorithm.scaler import LossScaler
from ais_megatron.config import AISConfig, Config


@dataclass(frozen=True)
class AISState:
    """What alpha depends on besides the current batch. It is equal on every rank and saved in checkpoints."""

    batches: int = 0
    """Number of batches so far that determine an automatic tau."""
    divergence_sum: float = 0.0
    """The sum of their D."""
    alpha: float | None = None
    """Of the latest batch, smoothed by `ais.ema`; None before the first batch."""
    evidence: Evidence = Evidence()
    """Of the measured coefficient."""

    @staticmethod
    def from_json(raw: dict[str, Any]) -> AISState:
        """The reverse of `to_json`. Older states have no evidence."""
        return AISState(**raw | {"evidence": Evidence.from_json(raw.get("evidence", {}))})

    def to_json(self) -> dict[str, Any]:
        """Plain numbers. JSON preserves floats to the last bit."""
        return asdict(self)


def step(state: AISState, diagnostics: Diagnostics, ais: AISConfig, gradients: GradientSums | None = None) -> tuple[Choice, AISState]:
    """alpha and the limit for the batch with these diagnostics, and the state after it. A pure function, so it is the same on every rank.

    gradients: of the batch, if they are measured (`Config.measures_gradients`)."""
    batches, total, evidence = state.batches, state.divergence_sum, state.evidence
    if batches < ais.auto_batches:
        batches, total = batches + 1, total + diagnostics.divergence_severity
    if gradients is not None:
        evidence = evidence.after(gradients, ais.memory)
        choice = evidence.choice(ais)
    else:
        choice = Choice(coefficient(diagnostics, ais, tau=total / batches if ais.tau == "auto" else ais.tau))
    alpha = choice.alpha
    if state.alpha is not None:
        alpha = ais.ema * state.alpha + (1.0 - ais.ema) * alpha
    return choice._replace(alpha=alpha), AISState(batches, total, alpha, evidence)


def coefficient(diagnostics: Diagnostics, ais: AISConfig, tau: float) -> float:
    """alpha of one batch by `ais.coefficient`, in [alpha_min, alpha_max]. `auto` is `product` here. Where it is `measured`, gradients
    decide instead (`Config.measures_gradients`)."""
    if ais.coefficient == "constant":
        return _clip(ais.constant_alpha, ais)
    if ais.coefficient == "oracle":
        return oracle_coefficient(diagnostics, ais)
    return product_coefficient(diagnostics, ais, tau)


def product_coefficient(diagnostics: Diagnostics, ais: AISConfig, tau: float | None = None) -> float:
    """alpha of one batch from its global diagnostics.

    tau: used instead of `ais.tau`. It is 0 if there has been no divergence yet."""
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
    """Proposition 1 with estimates. It is alpha_min if the weights change no response's signal, or if there is only one response.

    With gap = g1 - g0: V0 - C01 = -Cov(g0, gap) and V0 + V1 - 2 C01 = Var(gap). These forms avoid cancellation if g1 is close to g0.
    """
    n = diagnostics.num_sequences
    if n < 2:
        return ais.alpha_min
    variance = diagnostics.signal_gap_variance / n
    bias_sq = max(0.0, diagnostics.signal_gap**2 - variance)
    if bias_sq + variance <= 0.0:
        return ais.alpha_min
    return _clip((bias_sq - diagnostics.signal_gap_covariance / n) / (bias_sq + variance), ais)


def loss_scaler(
    diagnostics: Diagnostics, config: Config, state: AISState | None = None, gradients: GradientSums | None = None
) -> tuple[LossScaler, AISState]:
    """The scaler of the batch with these diagnostics, and the state after it (`AISState()` before the first batch)."""
    assert (gradients is not None) == config.measures_gradients, "the measured coefficient needs the sums of the batch's gradients"
    choice, state = step(state or AISState(), diagnostics, config.ais, gradients)
    return _scaler(config, choice, diagnostics.mean_weight), state


def lagged_loss_scaler(config: Config, state: AISState) -> LossScaler:
    """The scaler of a batch that is not known yet: with the previous batch's choice. Before the first batch alpha is alpha_min, or
    what the measured coefficient chooses without evidence."""
    if config.measures_gradients:
        choice = state.evidence.choice(config.ais)
        return _scaler(config, choice if state.alpha is None else choice._replace(alpha=state.alpha))
    return _scaler(config, Choice(config.ais.alpha_min if state.alpha is None else state.alpha))


def _scaler(config: Config, choice: Choice, mean_full_weight: float = 1.0) -> LossScaler:
    """Only ais uses alpha. The other corrections have full strength (1), and none has 0."""
    correction = choice.correction(config)
    alpha = {"ais": choice.alpha, "none": 0.0}.get(config.correction, 1.0)
    return LossScaler(
        alpha=alpha,
        aggregation=config.objective.resolved.aggregation,
        correction=correction,
        mean_weight=_mean_weight(alpha, mean_full_weight) if correction.batch_normalise else 1.0,
        response_limit=config.rollout.max_response_tokens,
    )


def _mean_weight(alpha: float, mean_full_weight: float) -> float:
    """The global mean of s = 1 + alpha (w - 1). It is 1 if every weight is 0, because then every product is 0 for any divisor."""
    mean = 1.0 + alpha * (mean_full_weight - 1.0)
    return mean if mean > 0.0 else 1.0


def _clip(alpha: float, ais: AISConfig) -> float:
    return min(max(alpha, ais.alpha_min), ais.alpha_max)
