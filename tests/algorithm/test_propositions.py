"""The three propositions of AIS (arXiv 2605.13907), measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ais_megatron.algorithm.ais import oracle_coefficient
from ais_megatron.algorithm.correction import Correction, log_importance_ratio, mixed_weights
from ais_megatron.algorithm.diagnostics import diagnose
from ais_megatron.algorithm.loss import policy_loss
from ais_megatron.algorithm.scaler import LossScaler
from ais_megatron.config import AISConfig
from ais_megatron.config.algorithm import OBJECTIVE_PRESETS, ObjectiveConfig
from tests.helpers.batches import random_rows

PI = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
SIGNAL = torch.tensor([1.0, -0.5, -2.0], dtype=torch.float64)  # the advantage-weighted score of each arm


def bandit(shift: float, batches: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """(old, rollout, signal), ``[batches, size]`` each: arms drawn from mu, which differs from pi by `shift`."""
    mu = (PI.log() + shift * torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64)).softmax(0)
    arms = torch.multinomial(mu, batches * size, replacement=True, generator=torch.Generator().manual_seed(1)).view(batches, size)
    return PI.log()[arms], mu.log()[arms], SIGNAL[arms]


def truncated_weights(old: Tensor, rollout: Tensor, cap: float) -> Tensor:
    return Correction("tis", weight_cap=cap).limited(log_importance_ratio(old, rollout).exp())


@pytest.mark.parametrize(("shift", "size"), [(-0.6, 8), (-0.3, 40), (0.5, 40), (0.3, 200)])
def test_1_the_oracle_coefficient_minimises_the_measured_error(shift: float, size: int) -> None:
    """Mean-squared error of (1 - alpha) g0 + alpha g1 around the known gradient E_pi[signal], over a grid of alpha."""
    old, rollout, signal = bandit(shift, batches=40_000, size=size)
    truth = (PI * SIGNAL).sum()
    w = truncated_weights(old, rollout, cap=100.0)
    grid = torch.linspace(0.0, 1.0, 21)
    errors = torch.stack([((mixed_weights(w, float(alpha)) * signal).mean(1) - truth).square().mean() for alpha in grid])
    best = float(grid[errors.argmin()])
    # The plug-in from all draws knows bias and variances almost exactly; only N, the size of one batch, is not theirs.
    d = diagnose(
        old.reshape(-1, 1),
        rollout.reshape(-1, 1),
        signal.reshape(-1),
        torch.ones(old.numel(), 1, dtype=torch.bool),
        Correction(weight_cap=100.0),
    )
    alpha = oracle_coefficient(type(d)(**{**vars(d), "num_sequences": float(size)}), AISConfig())
    bias_sq = d.signal_gap**2
    exact = (bias_sq - d.signal_gap_covariance / size) / (bias_sq + d.signal_gap_variance / size)
    assert abs(min(max(exact, 0.0), 1.0) - best) <= 0.05 + 1e-9, "the formula's minimum is the grid's, within its resolution"
    at = ((mixed_weights(w, alpha) * signal).mean(1) - truth).square().mean()
    assert at <= min(errors[0], errors[-1]) * 1.001, "and the plug-in is never worse than no correction or all of it"


@pytest.mark.parametrize("cap", [1.5, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8, 1.0])
def test_2_the_second_moment_is_bounded(cap: float, alpha: float) -> None:
    """E |s g|^2 <= C^2 E |g|^2 for whatever mismatch, per token and in the sum; without truncation it is not."""
    g = torch.Generator().manual_seed(0)
    old, rollout, gradient = (torch.randn(1000, 8, generator=g, dtype=torch.float64) * scale for scale in (3.0, 3.0, 1.0))
    s = mixed_weights(truncated_weights(old, rollout, cap), alpha)
    assert s.max() <= cap and s.min() >= 0.0
    assert (s * gradient).square().sum() <= cap**2 * gradient.square().sum()
    assert ((old - rollout).exp() * gradient).square().sum() > cap**2 * gradient.square().sum()


@pytest.mark.parametrize("objective", OBJECTIVE_PRESETS)
@pytest.mark.parametrize(
    ("name", "level"), [("ais", "token"), ("ais", "geometric"), ("tis", "sequence"), ("mis", "token"), ("geo_rs", "token")]
)
def test_3_without_mismatch_nothing_changes(objective: str, name: str, level: str) -> None:
    """rollout_logprobs == old_logprobs: the gradient equals that of correction none to the last bit, whatever alpha."""
    t = {key: value.float() if value.is_floating_point() else value for key, value in random_rows().items()}

    def gradient(alpha: float, correction: Correction) -> Tensor:
        mean = diagnose(t["old"], t["old"], t["advantages"], t["mask"], correction).mean_weight
        aggregation = OBJECTIVE_PRESETS[objective].aggregation
        scaler = LossScaler(alpha, aggregation, correction, mean_weight=mean, response_limit=9).for_update(20, 4)
        logprobs = t["logprobs"].clone().requires_grad_()
        factors = scaler.factors(t["old"], t["old"], t["mask"])
        policy_loss(ObjectiveConfig(name=objective), logprobs, t["entropy"], t["old"], None, t["advantages"], factors).total.backward()
        return logprobs.grad

    plain = gradient(0.0, Correction("none"))
    assert plain.abs().sum() > 0
    for alpha in (0.0, 0.123, 0.7, 1.0):
        assert torch.equal(gradient(alpha, Correction(name, level, low=0.99, high=1.01, batch_normalise=True)), plain)
