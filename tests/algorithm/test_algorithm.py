"""Advantages, diagnostics, coefficient, scaler and loss against numbers worked out by hand and plain autograd."""

from __future__ import annotations

import math

import pytest
import torch

from ais_megatron.algorithm.advantages import group_relative_advantages, num_zero_signal_groups
from ais_megatron.algorithm.ais import loss_scaler, product_coefficient
from ais_megatron.algorithm.correction import Correction, log_importance_ratio, mixed_weights
from ais_megatron.algorithm.diagnostics import Diagnostics, diagnose, from_statistics, statistics
from ais_megatron.algorithm.objectives import surrogate
from ais_megatron.algorithm.scaler import LossScaler
from ais_megatron.config import AISConfig
from tests.helpers.batches import config_with, diagnostics_of, hand_batch, random_parts
from tests.helpers.ranks import RankPool

AT_2 = Correction(weight_cap=2.0)  # truncated at C = 2


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.3, 0.3, 0.3, 0.3])
    advantages = group_relative_advantages(rewards, group_size=4, std_floor=0.0)
    half = 0.5 / math.sqrt(1.0 / 3.0)  # deviation 0.5 over the unbiased standard deviation
    torch.testing.assert_close(advantages[:4], torch.tensor([half, -half, -half, half]))
    assert torch.equal(advantages[4:], torch.zeros(4)), "a group of equal rewards carries exactly no signal"
    assert num_zero_signal_groups(rewards, 4) == 1


def test_diagnostics_by_hand() -> None:
    d = diagnose(*hand_batch(), AT_2)
    l2, l4 = math.log(2.0), math.log(4.0)
    assert (d.num_tokens, d.num_sequences) == (3, 2)
    assert d.weight_reliability == pytest.approx((2 + 0.5 + 2) ** 2 / (3 * (4 + 0.25 + 4)), abs=1e-14)
    assert d.weight_reliability_raw == pytest.approx((2 + 0.5 + 4) ** 2 / (3 * (4 + 0.25 + 16)), abs=1e-14)
    assert d.divergence_severity == pytest.approx(((2 - 1 - l2) + (0.5 - 1 + l2) + (4 - 1 - l4)) / 3, abs=1e-14)
    assert d.variance_amplification == pytest.approx((4 * 1 + 0.25 * 1 + 4 * 4) / (1 + 1 + 4), abs=1e-14)
    assert d.k1_kl == pytest.approx(-(l2 - l2 + l4) / 3, abs=1e-14)
    assert d.ppl_ratio == pytest.approx((1.0 + 0.25) / 2, abs=1e-14)
    assert d.chi2_token == pytest.approx((4 + 0.25 + 16) / 3 - 1, abs=1e-14)
    assert (d.is_weight_mean, d.is_weight_min, d.is_weight_max) == pytest.approx((6.5 / 3, 0.5, 4.0), abs=1e-14)
    assert d.fraction_truncated == pytest.approx(1 / 3)
    p = math.exp(-3.0)
    assert (d.prob_diff_mean, d.prob_diff_max) == pytest.approx((p * (1 + 0.5 + 3) / 3, 3 * p), abs=1e-14)


def test_divergence_by_position_by_hand() -> None:
    assert diagnose(*hand_batch(), AT_2).divergence_by_position == pytest.approx(
        [((2 - 1 - math.log(2)) + (4 - 1 - math.log(4))) / 2, 0.5 - 1 + math.log(2)], abs=1e-14
    )
    # Responses of 9 and 3 tokens after prompts of 2 and 5; l = 0.1, 0.2, ... from the first response token on.
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[0, 2:], mask[1, 5:8] = True, True
    log_ratio = mask.cumsum(1).double() * 0.1
    rollout = torch.full((2, 11), -1.0, dtype=torch.float64)
    k3 = [math.exp(0.1 * t) - 1 - 0.1 * t for t in range(1, 10)]
    expected = [k3[0], (k3[1] + k3[2]) / 2, sum(k3[3:7]) / 4, sum(k3[7:9]) / 2]
    d = diagnose(rollout + log_ratio, rollout, torch.ones(2), mask, AT_2)
    assert d.divergence_by_position == pytest.approx(expected, rel=1e-12)


def test_small_divergences_survive() -> None:
    """exp(l) - 1 - l at l = 1e-3 is 5.0017e-7; float32 is off by 12 %."""
    rollout = torch.full((1, 4), -2.0, dtype=torch.float64)
    d = diagnose(rollout + 1e-3, rollout, torch.ones(1), torch.ones(1, 4, dtype=torch.bool), AT_2)
    assert d.divergence_severity == pytest.approx(5.0016670834e-7, rel=1e-9)


def test_equal_logprobs_are_exactly_neutral() -> None:
    logprobs = torch.randn(3, 5)
    mask = torch.ones(3, 5, dtype=torch.bool)
    d = diagnose(logprobs, logprobs, torch.randn(3), mask, AT_2)
    assert (d.weight_reliability, d.divergence_severity, d.variance_amplification) == (1.0, 0.0, 1.0)
    assert product_coefficient(d, AISConfig()) == 0.0
    weights = LossScaler(alpha=0.7, aggregation="token").factors(logprobs, logprobs, mask).policy
    assert torch.equal(weights, torch.ones(3, 5)), "s is 1.0 to the last bit, whatever alpha"


def test_advantages_of_zero_leave_variance_amplification_at_one() -> None:
    old, rollout, _, mask = hand_batch()
    assert diagnose(old, rollout, torch.zeros(2), mask, AT_2).variance_amplification == 1.0


def test_a_part_without_tokens_and_a_batch_without_tokens() -> None:
    old, rollout, advantages, mask = hand_batch()
    nothing = statistics(old, rollout, advantages, torch.zeros_like(mask), AT_2)
    something = statistics(old, rollout, advantages, mask, AT_2)
    joined = from_statistics(nothing[0] + something[0], torch.maximum(nothing[1], something[1]))
    assert joined == from_statistics(*something)
    assert from_statistics(*nothing).weight_reliability == 1.0


def test_logprobs_that_are_not_finite_are_named() -> None:
    old, rollout, advantages, mask = hand_batch()
    with pytest.raises(ValueError, match="not finite.*w_trunc"):
        diagnose(old * float("nan"), rollout, advantages, mask, AT_2)


def diagnose_part(rank: int, shares: list[list[int]], correction: Correction) -> Diagnostics:
    import torch.distributed as dist

    rows = torch.tensor(shares[rank], dtype=torch.int64)
    return diagnose(*(tensor[rows] for tensor in random_parts(0)), correction=correction, group=dist.group.WORLD)


@pytest.mark.parametrize(
    "shares",
    [
        [list(range(24))],
        [list(range(10)), list(range(10, 24))],
        [list(range(0, 24, 2)), list(range(1, 24, 2))],
        [[], [3, 5], list(range(12, 24)), [0, 1, 2, 4, *range(6, 12)]],
    ],
)
@pytest.mark.parametrize("level", ["token", "geometric"])
def test_diagnostics_are_those_of_the_joined_batch(ranks: RankPool, shares: list[list[int]], level: str) -> None:
    correction = Correction("ais", level)
    expected = vars(diagnose(*random_parts(0), correction))
    results = ranks.run(len(shares), diagnose_part, shares=shares, correction=correction)
    assert all(result == results[0] for result in results), "every rank must compute the same alpha"
    for name, value in vars(results[0]).items():
        assert value == pytest.approx(expected[name], abs=1e-12, rel=1e-12), name


def test_any_split_into_microbatches_adds_up() -> None:
    parts = random_parts(3)
    whole = statistics(*parts, AT_2)
    for cuts in ([7], [1, 2, 20], list(range(1, 24))):
        pieces = [statistics(*rows, AT_2) for rows in zip(*(torch.tensor_split(t, cuts) for t in parts), strict=True)]
        torch.testing.assert_close(sum(p[0] for p in pieces), whole[0], rtol=1e-13, atol=1e-12)
        assert torch.equal(torch.stack([p[1] for p in pieces]).amax(0), whole[1])


def test_product_coefficient_by_hand() -> None:
    ais = AISConfig(tau=2e-3)
    assert product_coefficient(diagnostics_of(0.9, 2e-3, 1.25), ais) == pytest.approx(0.9 * (1 - math.exp(-1)) / 1.25, rel=1e-14)
    assert product_coefficient(diagnostics_of(0.9, 2e-3, 0.5), ais) == pytest.approx(0.9 * (1 - math.exp(-1)), rel=1e-14)
    assert product_coefficient(diagnostics_of(0.9, 1.0), AISConfig(alpha_max=0.6)) == 0.6
    assert product_coefficient(diagnostics_of(1.0, 0.0), AISConfig(alpha_min=0.2)) == 0.2
    assert product_coefficient(diagnostics_of(0.9, 1.0, rho_raw=0.25), AISConfig(reliability="raw")) == pytest.approx(0.25)


def test_factors_left_out_of_the_product() -> None:
    d = diagnostics_of(0.9, 2e-3, 1.25)
    alone = {"reliability": 0.9, "severity": 1 - math.exp(-4), "amplification": 0.8}
    for name, value in alone.items():
        assert product_coefficient(d, AISConfig(factors=[name])) == pytest.approx(value, rel=1e-14)
        others = [other for other in alone if other != name]
        assert product_coefficient(d, AISConfig(factors=others)) == pytest.approx(math.prod(alone[o] for o in others), rel=1e-14)
    with pytest.raises(ValueError, match="factors"):
        AISConfig(factors=["reliability", "divergence"])


@pytest.mark.parametrize(("correction", "alpha"), [("none", 0.0), ("tis", 1.0), ("ais", 1 - math.exp(-4))])
def test_correction_names_an_alpha(correction: str, alpha: float) -> None:
    assert loss_scaler(diagnostics_of(1.0, 2e-3), config_with(correction=correction, ais={"coefficient": "product"}))[
        0
    ].alpha == pytest.approx(alpha, rel=1e-14)


def test_mixing_between_none_and_tis() -> None:
    old, rollout, _, _ = hand_batch()
    truncated = AT_2.limited(log_importance_ratio(old, rollout).exp())
    torch.testing.assert_close(truncated, torch.tensor([[2.0, 2.0, 0.5], [2.0, 2.0, 2.0]], dtype=torch.float64))
    assert torch.equal(mixed_weights(truncated, 0.0), torch.ones_like(truncated))
    torch.testing.assert_close(mixed_weights(truncated, 1.0), truncated)
    torch.testing.assert_close(mixed_weights(truncated, 0.25), 0.75 + 0.25 * truncated)


def test_sequence_aggregation_is_the_mean_of_means() -> None:
    old, rollout, advantages, mask = hand_batch()
    scaler = LossScaler(alpha=0.0, aggregation="sequence").for_update(num_tokens=3, num_sequences=2)
    weights = scaler.factors(old, rollout, mask).policy
    values = torch.tensor([[7.0, 1.0, 2.0], [7.0, 5.0, 7.0]], dtype=torch.float64)
    assert (weights * values).sum() / 3 == pytest.approx(((1 + 2) / 2 + 5) / 2)


def test_clipped_loss_and_its_gradient_by_hand() -> None:
    """One row each: clipped above with A > 0 (no gradient), kept above with A < 0, inside, and a masked NaN trap."""
    ratio = torch.tensor([[9.0, 1.5], [9.0, 1.5], [9.0, 1.1]])
    old = torch.full((3, 2), -1.0)
    logprobs = (old + ratio.log()).requires_grad_()
    mask = torch.tensor([[False, True]] * 3)
    advantages, weights = torch.tensor([2.0, -1.0, 3.0]), torch.tensor([[0.0, 0.5], [0.0, 1.0], [0.0, 2.0]])
    poisoned = old.clone()
    poisoned[:, 0] = -float("inf")
    objective, _, clipped = surrogate("grpo", logprobs, poisoned, advantages, mask, 0.2, 0.2)
    loss = -(weights * objective).sum()
    loss.backward()
    assert loss.item() == pytest.approx(-(0.5 * 1.2 * 2.0 + 1.0 * 1.5 * -1.0 + 2.0 * 1.1 * 3.0))
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 0.0], [0.0, 1.5], [0.0, -6.6]]))
    assert clipped.tolist() == [[False, True], [False, False], [False, False]]
