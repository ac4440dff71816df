"""Every correction against hand-computed factors, and the state of alpha."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ais_megatron.algorithm import ais
from ais_megatron.algorithm.ais import AISState, lagged_loss_scaler, loss_scaler, oracle_coefficient
from ais_megatron.algorithm.correction import METHODS, Correction, importance_weights, log_importance_ratio, response_mean
from ais_megatron.algorithm.diagnostics import Diagnostics, RunningStatistics, diagnose, split, statistics
from ais_megatron.algorithm.scaler import LossScaler, TokenFactors
from ais_megatron.config import AISConfig
from tests.helpers.batches import config_with, diagnostics_of, hand_batch, random_parts

# hand_batch: response 0 has weights 2 and 1/2, response 1 the single weight 4; tokens outside the mask would give 9.
SECOND, THIRD = (0, 1), (0, 2)
ONLY = (1, 1)


def factors(correction: Correction, alpha: float = 1.0, **scaler: object) -> TokenFactors:
    old, rollout, _, mask = hand_batch()
    return LossScaler(alpha, correction=correction, **scaler).factors(old, rollout, mask)


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        (Correction("none"), (1.0, 1.0, 1.0)),
        (Correction("tis", weight_cap=3.0), (2.0, 0.5, 3.0)),
        (Correction("tis", weight_cap=1.6, two_sided=True), (1.6, 0.625, 1.6)),
        (Correction("tis", "sequence", weight_cap=3.0), (1.0, 1.0, 3.0)),
        (Correction("tis", "geometric", weight_cap=3.0), (1.0, 1.0, 3.0)),
        (Correction("mis", low=0.4, high=2.5), (2.0, 0.5, 0.0)),
        (Correction("mis", "sequence", low=1.5, high=5.0), (0.0, 0.0, 4.0)),
        (Correction("mis", "geometric", low=0.5, high=2.0), (1.0, 1.0, 0.0)),
        (Correction("icepop", low=0.6, high=5.0), (2.0, 0.0, 4.0)),
        (Correction("geo_rs", low=0.5, high=5.0), (1.0, 1.0, 1.0)),
    ],
)
def test_weights_by_hand(correction: Correction, expected: tuple[float, ...]) -> None:
    result = factors(correction)
    assert [result.policy[i].item() for i in (SECOND, THIRD, ONLY)] == pytest.approx(expected, abs=1e-12)
    assert result.kept.tolist() == hand_batch()[3].tolist(), "zero weights leave the mask, and so the normaliser, alone"
    assert result.policy[~result.kept].abs().sum() == 0


def test_levels_differ_by_sum_and_mean() -> None:
    log_ratio = torch.tensor([[7.0, 0.1, 0.3], [7.0, -15.0, -15.0]], dtype=torch.float64)
    mask = torch.tensor([[False, True, True]] * 2)
    sequence, geometric = (importance_weights(log_ratio, mask, level)[:, 1] for level in ("sequence", "geometric"))
    torch.testing.assert_close(sequence.log(), torch.tensor([0.4, -20.0], dtype=torch.float64))  # the sum is clamped too
    torch.testing.assert_close(geometric.log(), torch.tensor([0.2, -15.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("correction", "kept"),
    [
        (Correction("geo_rs", low=0.9, high=1.1), (True, False)),  # geometric means 1 and 4
        (Correction("geo_rs", low=1.1, high=5.0), (False, True)),
        (Correction("k3_rs", k3_limit=0.5), (True, False)),  # k3: mean of 2-1-log2 and 1/2-1+log2 is 1/4; 4-1-log4 is 1.61
        (Correction("k3_rs", k3_limit=0.24), (False, False)),
    ],
)
def test_rejected_responses_leave_mask_and_normaliser(correction: Correction, kept: tuple[bool, bool]) -> None:
    mask, result = hand_batch()[3], factors(correction)
    assert torch.equal(result.kept, mask & torch.tensor(kept)[:, None])
    assert torch.equal(result.policy, result.kept.double()), "what is kept weighs 1"
    d = diagnose(*hand_batch(), correction)
    assert d.fraction_rejected == pytest.approx(1 - result.kept.sum().item() / 3)


def test_aggregation_counts_only_what_is_left() -> None:
    """Response 1 is rejected: T = 2, N = 1; divided by T, the two tokens of response 0 weigh 1/2 each, or 1/L each."""
    correction = Correction("geo_rs", low=0.9, high=1.1)
    old, rollout, _, mask = hand_batch()
    for aggregation, expected in (("token", 1 / 2), ("sequence", 1 / 2), ("constant", 1 / 10)):
        scaler = LossScaler(1.0, aggregation, correction, response_limit=10).for_update(num_tokens=2, num_sequences=1)
        assert (scaler.factors(old, rollout, mask).policy / 2)[0, 1:].tolist() == pytest.approx([expected] * 2, rel=1e-6)


@pytest.mark.parametrize(
    ("correction", "mean"),
    [
        (Correction("tis", weight_cap=3.0), (2 + 0.5 + 3) / 3),
        (Correction("tis", "sequence", weight_cap=3.0), (1 + 3) / 2),  # over the two responses, although one has two tokens
        (Correction("tis", "geometric", weight_cap=3.0), (1 + 3) / 2),
        (Correction("mis", "sequence", low=1.5, high=5.0), (0 + 4) / 2),  # a weight of 0 counts
        (Correction("ais", "geometric", weight_cap=2.0), (1 + 2) / 2),
        (Correction("mis", low=0.4, high=2.5), (2 + 0.5 + 0) / 3),
        (Correction("geo_rs", low=0.9, high=1.1), 1.0),
    ],
)
def test_mean_weight_is_after_truncation_and_over_what_is_kept(correction: Correction, mean: float) -> None:
    assert diagnose(*hand_batch(), correction).mean_weight == pytest.approx(mean, rel=1e-14)


@pytest.mark.parametrize("correction", ["none", "tis", "mis", "icepop", "geo_rs", "k3_rs", "ais"])
def test_normalised_weights_have_mean_one(correction: str) -> None:
    old, rollout, advantages, mask = random_parts(2)
    config = config_with(correction=correction, correction_options={"batch_normalise": True, "low": 0.8, "high": 1.2, "k3_limit": 0.05})
    rule = Correction.of(config)
    scaler, _ = loss_scaler(diagnose(old, rollout, advantages, mask, rule), config)
    result = scaler.factors(old, rollout, mask)
    assert result.policy.double().sum().item() / result.kept.sum().item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("sections", [{"correction": "tis"}, {"correction": "mis"}, {"correction": "ais", "ais": {"level": "sequence"}}])
def test_normalised_weights_of_responses_have_mean_one_over_responses(sections: dict) -> None:
    """As verl divides them: a long response counts no more than a short one, and one without tokens not at all."""
    old, rollout, advantages, mask = random_parts(2)
    config = config_with(objective={"name": "gspo"}, correction_options={"batch_normalise": True}, **sections)
    rule = Correction.of(config)
    assert rule.level in ("sequence", "geometric")
    scaler, _ = loss_scaler(diagnose(old, rollout, advantages, mask, rule), config)
    # The weight of a response, without the aggregation's share of its tokens.
    weights = replace(scaler, aggregation="token").factors(old, rollout, mask).policy.double()
    of_responses = weights.sum(1)[mask.any(1)] / mask.sum(1)[mask.any(1)]
    assert len(of_responses) == 23 and of_responses.std() > 0.01
    assert of_responses.mean().item() == pytest.approx(1.0, rel=1e-6)


def test_ais_at_sequence_level_uses_the_geometric_mean() -> None:
    config = config_with(ais={"level": "sequence", "coefficient": "constant", "constant_alpha": 0.5})
    old, rollout, advantages, mask = hand_batch()
    d = diagnose(old, rollout, advantages, mask, Correction.of(config))
    assert d.weight_reliability == pytest.approx((1 + 1 + 2) ** 2 / (3 * (1 + 1 + 4)), rel=1e-14)
    assert d.variance_amplification == pytest.approx((1 + 1 + 4 * 4) / (1 + 1 + 4), rel=1e-14)
    scaler, _ = loss_scaler(d, config)
    weights = scaler.factors(old, rollout, mask).policy
    assert [weights[i].item() for i in (SECOND, THIRD, ONLY)] == pytest.approx([1.0, 1.0, 1.5], abs=1e-12)


def test_padding_and_order_change_nothing() -> None:
    old, rollout, advantages, mask = random_parts(4)
    order = torch.randperm(len(old), generator=torch.Generator().manual_seed(0))
    padded = [torch.nn.functional.pad(x, (0, 3), value=v) for x, v in ((old, math.nan), (rollout, -math.inf), (mask, False))]
    for name, level in (("tis", "sequence"), ("mis", "geometric"), ("geo_rs", "token"), ("k3_rs", "token"), ("ais", "geometric")):
        rule = Correction(name, level, low=0.9, high=1.1, k3_limit=0.04)
        sums, extremes = statistics(old, rollout, advantages, mask, rule)
        again, same = statistics(padded[0][order], padded[1][order], advantages[order], padded[2][order], rule)
        torch.testing.assert_close(again, sums, rtol=1e-12, atol=1e-12)
        assert torch.equal(same, extremes)
        scaler = LossScaler(0.7, "sequence", rule).for_update(100, 10)
        expected = scaler.factors(old, rollout, mask).policy[order]
        torch.testing.assert_close(scaler.factors(padded[0][order], padded[1][order], padded[2][order]).policy[:, :19], expected)


def test_running_statistics_are_those_of_the_whole() -> None:
    parts = random_parts(5)
    for level in ("token", "sequence", "geometric"):
        rule = Correction("tis", level)
        running = RunningStatistics(rule)
        for rows in zip(*(torch.tensor_split(t, [1, 2, 20]) for t in parts), strict=True):
            running.add(*rows, torch.zeros(0), torch.zeros(0))
        whole = vars(diagnose(*parts, rule))
        for name, value in vars(split(running.joined(None))).items():
            assert value == pytest.approx(whole[name], rel=1e-12, abs=1e-12), name


def oracle_by_formula(old: Tensor, rollout: Tensor, advantages: Tensor, mask: Tensor, cap: float) -> float:
    """The formula of the design as it stands, from per-response means."""
    w = log_importance_ratio(old.double(), rollout.double()).exp().clamp(max=cap)
    rows = [i for i in range(len(mask)) if mask[i].any()]
    g0 = torch.stack([advantages[i].double() for i in rows])
    g1 = torch.stack([(w[i][mask[i]] * advantages[i].double()).mean() for i in rows])
    n, cov = len(rows), torch.cov(torch.stack([g0, g1]))
    v0, v1, c01 = cov[0, 0], cov[1, 1], cov[0, 1]
    b2 = ((g1.mean() - g0.mean()) ** 2 - (g1 - g0).var() / n).clamp(min=0.0)
    return float(((b2 + (v0 - c01) / n) / (b2 + (v0 + v1 - 2 * c01) / n)).clamp(0.0, 1.0))


@pytest.mark.parametrize("seed", range(4))
def test_oracle_equals_its_formula(seed: int) -> None:
    old, rollout, advantages, mask = random_parts(seed)
    advantages = advantages + 0.2 * seed  # with a bias, so that alpha is inside (0, 1) for some
    alpha = oracle_coefficient(diagnose(old, rollout, advantages, mask, Correction(weight_cap=2.0)), AISConfig())
    assert alpha == pytest.approx(oracle_by_formula(old, rollout, advantages, mask, 2.0), abs=1e-9)


def test_oracle_where_nothing_can_be_said() -> None:
    old, rollout, advantages, mask = hand_batch()
    assert oracle_coefficient(diagnose(old, old, advantages, mask, Correction()), AISConfig(alpha_min=0.1)) == 0.1
    assert oracle_coefficient(diagnose(old[:1], rollout[:1], advantages[:1], mask[:1], Correction()), AISConfig(alpha_min=0.1)) == 0.1


def severe(divergence: float) -> Diagnostics:
    return diagnostics_of(1.0, divergence)


def test_smoothing_by_hand() -> None:
    config = AISConfig(ema=0.75, tau=1.0)
    (first, _), state = ais.step(AISState(), severe(1.0), config)
    assert first == pytest.approx(1 - math.exp(-1)), "nothing to average with yet"
    (second, _), state = ais.step(state, severe(0.0), config)
    assert second == pytest.approx(0.75 * first) and state.alpha == second


def test_automatic_tau_is_the_mean_of_the_first_batches() -> None:
    config, state = AISConfig(tau="auto", auto_batches=2), AISState()
    for divergence, tau in ((2e-3, 2e-3), (4e-3, 3e-3), (30e-3, 3e-3), (3e-3, 3e-3)):
        (alpha, _), state = ais.step(state, severe(divergence), config)
        assert alpha == pytest.approx(1 - math.exp(-divergence / tau), rel=1e-12)
    assert state.batches == 2
    assert ais.step(AISState(), severe(0.0), config)[0].alpha == 0.0, "a first batch without divergence needs no division by tau = 0"


def test_state_survives_json_to_the_last_bit() -> None:
    config = AISConfig(tau="auto", ema=0.3)
    _, state = ais.step(AISState(), severe(1 / 3e3), config)
    again = AISState.from_json(json.loads(json.dumps(state.to_json())))
    assert again == state and ais.step(again, severe(1e-3), config) == ais.step(state, severe(1e-3), config)


def test_constant_and_lagged_alpha() -> None:
    config = config_with(ais={"coefficient": "constant", "constant_alpha": 0.3, "alpha_min": 0.1, "lag": 1})
    assert lagged_loss_scaler(config, AISState()).alpha == 0.1, "before the first batch nothing is known"
    (alpha, _), state = ais.step(AISState(), severe(1.0), config.ais)
    assert alpha == 0.3 and lagged_loss_scaler(config, state).alpha == 0.3
    assert lagged_loss_scaler(config_with(correction="tis"), state).alpha == 1.0
    assert lagged_loss_scaler(config_with(correction="none"), state).alpha == 0.0


@pytest.mark.parametrize("name", METHODS)
def test_the_table_gives_the_chains_results_to_the_last_bit(name: str) -> None:
    """The conditions in one place, as they stood before every correction had its own functions."""
    generator = torch.Generator().manual_seed(3)
    log_ratio = 0.4 * torch.randn(6, 11, generator=generator)
    mask = torch.rand(6, 11, generator=generator) < 0.8
    for level in ("token", "sequence", "geometric"):
        correction = Correction(name, level, weight_cap=1.5, low=0.8, high=1.2, k3_limit=0.07)
        w = importance_weights(log_ratio, mask, level)
        limited = w.masked_fill((w < 0.8) | (w > 1.2), 0.0) if name in ("mis", "icepop") else w.clamp(max=1.5)
        weights = torch.ones_like(w) if name in ("none", "geo_rs", "k3_rs") else limited
        kept = mask
        if name == "geo_rs":
            mean_weight = response_mean(log_ratio, mask).exp()
            kept = mask & ((mean_weight >= 0.8) & (mean_weight <= 1.2))[:, None]
        if name == "k3_rs":
            kept = mask & (response_mean(torch.special.expm1(log_ratio.double()) - log_ratio.double(), mask) <= 0.07)[:, None]
        assert torch.equal(correction.limited(w), limited) and torch.equal(correction.weights(log_ratio, mask), weights)
        assert torch.equal(correction.kept(log_ratio, mask), kept)
        assert correction.acts_on_tokens == (level == "token" and name in ("tis", "ais", "mis", "icepop"))


def test_tbpo_limits_weights_on_both_sides() -> None:
    """QaRL, arXiv 2604.07853. For other objectives the option switches it on."""
    assert Correction.of(config_with(objective={"name": "tbpo"})).two_sided
    assert not Correction.of(config_with(objective={"name": "tbpo"}, correction_options={"two_sided": False})).two_sided
    assert not Correction.of(config_with()).two_sided
    assert Correction.of(config_with(correction_options={"two_sided": True})).two_sided
