"""Sketches of responses' gradients, and the coefficient that is chosen from them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ais_megatron.algorithm.ais import AISState, lagged_loss_scaler, loss_scaler, step
from ais_megatron.algorithm.correction import Correction
from ais_megatron.algorithm.gradients import SCORE_COLUMNS, SIZE, STATE_COLUMNS, GradientSums, ResponseGradients, Sketch
from ais_megatron.algorithm.measured import Choice, Evidence, best_alpha
from ais_megatron.config import AISConfig
from tests.helpers.batches import config_with, diagnostics_of

CAPS = [1.5, 2.0, 4.0]
LIMITS = [Correction("ais", weight_cap=cap) for cap in CAPS]
ROWS, SEQ, VOCAB, HIDDEN = 8, 5, 11, 6


def random_responses(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(ROWS, SEQ, generator=g) < 0.7
    mask[5] = False
    old = -torch.rand(ROWS, SEQ, generator=g)
    return dict(
        sketches=torch.randn(SCORE_COLUMNS + STATE_COLUMNS, ROWS, SEQ, generator=g),
        old_logprobs=old.masked_fill(~mask, float("nan")),
        rollout_logprobs=old + 0.6 * torch.randn(ROWS, SEQ, generator=g),
        advantages=torch.randn(ROWS, generator=g),
        loss_mask=mask,
    )


def sums_of(
    parts: dict[str, Tensor], pieces: list[Tensor] | None = None, group_size: int = 2, mean: bool = False, masks: int = 1
) -> GradientSums:
    gradients = ResponseGradients(LIMITS, ROWS, group_size, mean, masks)
    for index in pieces or [torch.arange(ROWS)]:
        gradients.add(index, parts["sketches"][:, index], *(parts[name][index] for name in list(parts)[1:]))
    return GradientSums.of(gradients.sums())


@pytest.mark.parametrize("mean", [False, True])
def test_sums_by_the_definition(mean: bool) -> None:
    """One token after the other, one group after the other, in float64."""
    parts = random_responses()
    phi = torch.zeros(ROWS, 1 + len(CAPS), SIZE, dtype=torch.float64)
    for i, t in parts["loss_mask"].nonzero().tolist():
        score, state = parts["sketches"][:, i, t].double().split([SCORE_COLUMNS, STATE_COLUMNS])
        w = (parts["old_logprobs"][i, t].double() - parts["rollout_logprobs"][i, t].double()).exp()
        share = parts["advantages"][i].double() / (parts["loss_mask"][i].sum() if mean else 1)
        for k, s in enumerate([1.0, *(min(float(w), cap) - 1.0 for cap in CAPS)]):
            phi[i, k] += s * share * torch.outer(score, state).flatten()
    groups = phi.view(4, 2, 1 + len(CAPS), SIZE).sum(1)
    found = sums_of(parts, mean=mean)
    assert (found.groups, found.tokens) == (4, parts["loss_mask"].sum())
    torch.testing.assert_close(found.sums, groups.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.products, sum(group @ group.T for group in groups), rtol=1e-5, atol=1e-5)


def test_rows_of_a_response_under_several_masks_add_up() -> None:
    """Four responses in two groups, each under two masks. Row 2 counts three times, as if its factor were as large."""
    parts = random_responses()
    found = sums_of(parts | {"repeats": torch.tensor([1, 1, 3, 1, 1, 1, 1, 1])}, masks=2)
    thrice = parts | {"advantages": parts["advantages"] * torch.tensor([1, 1, 3, 1, 1, 1, 1, 1])}
    single = [sums_of(thrice, [torch.tensor([row])], group_size=1).sums.double() for row in range(ROWS)]
    groups = torch.stack([sum(single[row] for row in rows) for rows in ((0, 1, 4, 5), (2, 3, 6, 7))])
    assert (found.groups, found.tokens) == (2, parts["loss_mask"].sum() + 2 * parts["loss_mask"][2].sum())
    torch.testing.assert_close(found.sums, groups.sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.products, sum(group @ group.T for group in groups), rtol=1e-5, atol=1e-5)


def test_no_split_changes_the_sums() -> None:
    parts = random_responses()
    whole = sums_of(parts).flat()
    order = torch.tensor([3, 0, 7, 5, 1, 2, 6, 4])
    torch.testing.assert_close(sums_of(parts, list(order.split([3, 1, 4]))).flat(), whole, rtol=1e-6, atol=1e-6)
    halves = [{name: x[:, rows] if name == "sketches" else x[rows] for name, x in parts.items()} for rows in (slice(0, 6), slice(6, 8))]
    ranks = [ResponseGradients(LIMITS, len(half["advantages"]), 2, False) for half in halves]
    for rank, half in zip(ranks, halves, strict=True):
        rank.add(torch.arange(len(half["advantages"])), **half)
    torch.testing.assert_close(ranks[0].sums() + ranks[1].sums(), whole, rtol=1e-6, atol=1e-6)


def test_inner_products_are_exact_in_expectation() -> None:
    """The gradients of two tokens with respect to the output layer, over many draws of R and Q."""
    g = torch.Generator().manual_seed(1)
    scores, states = torch.randn(2, VOCAB, generator=g), torch.randn(2, HIDDEN, generator=g)
    exact = (scores[0] @ scores[1]) * (states[0] @ states[1])
    draws = 4000
    r = (torch.randint(0, 2, (draws, VOCAB, SCORE_COLUMNS), generator=g) * 2 - 1) / SCORE_COLUMNS**0.5
    q = (torch.randint(0, 2, (draws, HIDDEN, STATE_COLUMNS), generator=g) * 2 - 1) / STATE_COLUMNS**0.5
    phi = [(scores[i] @ r)[:, :, None] * (states[i] @ q)[:, None, :] for i in range(2)]
    products = (phi[0] * phi[1]).sum((1, 2))
    assert abs(products.mean() - exact) < 3 * products.std() / draws**0.5
    drawn = Sketch.random(VOCAB, HIDDEN, torch.float32, torch.device("cpu"))
    assert drawn.signs.shape == (VOCAB, SCORE_COLUMNS) and set(drawn.signs.abs().unique().tolist()) == {float(r.abs().max())}
    assert drawn.directions.shape == (HIDDEN, STATE_COLUMNS) and set(drawn.directions.abs().unique().tolist()) == {0.25}


def stream(batches: int, groups: int, bias: Tensor, noise: float, seed: int = 0) -> tuple[list[GradientSums], Tensor]:
    """Batches of groups whose vectors have means `bias` ``[kinds, SIZE]`` and independent noise. Also returns all vectors."""
    g = torch.Generator().manual_seed(seed)
    phi = bias + noise * torch.randn(batches, groups, *bias.shape, generator=g, dtype=torch.float64)
    return [GradientSums(torch.tensor(float(groups)), torch.tensor(1.0), x.sum(0), torch.einsum("gks,gls->kl", x, x)) for x in phi], phi


def test_moments_are_unbiased_and_use_pairs_of_batches() -> None:
    bias = torch.zeros(2, SIZE, dtype=torch.float64)
    bias[1, :4] = 0.1
    found = []
    for seed in range(200):
        evidence = Evidence()
        for batch in stream(6, 5, bias, 0.3, seed)[0]:
            evidence = evidence.after(batch, memory=0.8)
        found.append(torch.stack(evidence.moments()))
    mean, error = torch.stack(found).mean(0), torch.stack(found).std(0) / 200**0.5
    squares = 25 * bias @ bias.T  # of the mean of a batch's sum of five groups
    noise = 5 * SIZE * 0.09 * torch.eye(2, dtype=torch.float64)
    assert ((mean - torch.stack([squares, noise])).abs() < 3.5 * error).all()
    one = torch.stack([torch.stack(Evidence().after(stream(1, 5, bias, 0.3, seed)[0][0], 0.8).moments()) for seed in range(200)])
    assert torch.stack(found).std(0)[0, 1, 1] < one.std(0)[0, 1, 1] / 3, "pairs of batches say more than pairs in one"


def test_moments_without_memory_are_those_of_the_latest_batch() -> None:
    batches, phi = stream(3, 4, torch.ones(2, SIZE, dtype=torch.float64), 1.0)
    evidence = Evidence()
    for batch in batches:
        evidence = evidence.after(batch, memory=0.0)
    x = phi[-1]
    pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
    torch.testing.assert_close(evidence.moments()[0], 16 * sum(x[i] @ x[j].T for i, j in pairs) / len(pairs))
    centred = x - x.mean(0)
    torch.testing.assert_close(evidence.moments()[1], 4 / 3 * torch.einsum("gks,gls->kl", centred, centred))


@pytest.mark.parametrize(("shift", "horizon"), [(0.02, 20.0), (0.5, 20.0), (0.8, 1.0), (0.8, 1000.0)])
def test_finds_the_optimum_of_a_bandit(shift: float, horizon: float) -> None:
    """Arms with two-dimensional scores, sampled from mu: the choice is nearly as good as the best (alpha, C) of a Monte-Carlo grid."""
    g = torch.Generator().manual_seed(2)
    pi = torch.tensor([0.55, 0.3, 0.1, 0.05]).double()
    mu = (pi.log() + shift * torch.tensor([0.5, 0.5, -1.0, -3.0]).double()).softmax(0)
    score = torch.eye(4).double() - pi
    reward = torch.tensor([1.0, -0.5, -1.0, 4.0]).double()
    signal = torch.zeros(4, SIZE, dtype=torch.float64)
    signal[:, :4] = reward[:, None] * score
    w = pi / mu
    weights = torch.stack([torch.ones(4).double(), *(w.clamp(max=cap) - 1.0 for cap in CAPS)], 1)
    batches, size = 300, 64
    arms = torch.multinomial(mu, batches * size, replacement=True, generator=g).view(batches, size)
    evidence, config = Evidence(), AISConfig(coefficient="measured", caps=CAPS, bands=[], horizon=horizon, memory=0.999)
    for drawn in arms:
        phi = weights[drawn][..., None] * signal[drawn][:, None]
        batch = GradientSums(torch.tensor(float(size)), torch.tensor(float(size)), phi.sum(0), torch.einsum("gks,gls->kl", phi, phi))
        evidence = evidence.after(batch, config.memory)

    def error(alpha: float, cap: float) -> float:
        """Exact, against the gradient with the largest cap, as the definition says."""
        s = 1.0 + alpha * (w.clamp(max=cap) - 1.0)
        mean, target = (mu * s) @ signal, (mu * w.clamp(max=CAPS[-1])) @ signal
        second = (mu * s**2) @ signal.square().sum(1)
        return float((mean - target).square().sum() + (second - mean.square().sum()) / size / horizon)

    best = min(error(alpha / 50, cap) for alpha in range(51) for cap in CAPS)
    found = evidence.choice(config)
    assert error(found.alpha, CAPS[found.limit]) <= 1.1 * best + 1e-6, (found, best)
    assert error(found.alpha, CAPS[found.limit]) < 0.9 * max(error(0.0, 2.0), error(1.0, CAPS[-1]))


def test_equal_precision_changes_nothing() -> None:
    parts = random_responses()
    parts["rollout_logprobs"] = parts["old_logprobs"].clone()
    sums = sums_of(parts)
    assert not sums.sums[1:].any() and not sums.products[1:].any() and sums.products[0, 0] > 0
    config = config_with(ais={"coefficient": "measured", "caps": CAPS, "bands": []})
    scaler, state = loss_scaler(diagnostics_of(), config, AISState(), sums)
    old = torch.log(torch.rand(3, 4, generator=torch.Generator().manual_seed(0)))
    everywhere = torch.ones(3, 4, dtype=torch.bool)
    for s in (scaler, lagged_loss_scaler(config, state), replace(scaler, alpha=0.7)):
        assert torch.equal(s.factors(old, old, everywhere).policy, torch.ones(3, 4))


def test_the_state_survives_json_to_the_last_bit() -> None:
    config = AISConfig(coefficient="measured", caps=CAPS, bands=[])
    state = AISState()
    for seed in range(3):
        _, state = step(state, diagnostics_of(), config, sums_of(random_responses(seed)))
    again = AISState.from_json(json.loads(json.dumps(state.to_json())))
    assert again == state and again.evidence.choice(config) == state.evidence.choice(config)
    assert AISState.from_json({"batches": 1, "divergence_sum": 0.5, "alpha": 0.3}).evidence == Evidence(), "of an older checkpoint"


def test_before_there_is_evidence() -> None:
    config = config_with(ais={"coefficient": "measured", "lag": 1, "alpha_max": 0.9})
    scaler = lagged_loss_scaler(config, AISState())
    assert (scaler.alpha, scaler.correction.weight_cap) == (0.9, 2.0)
    single = GradientSums(torch.tensor(1.0), torch.tensor(5.0), torch.ones(4, SIZE).double(), torch.ones(4, 4).double())
    assert Evidence().after(single, 0.9) == Evidence(), "one group has no covariance"
    assert Evidence().choice(config.ais) == Choice(0.9)


def test_what_is_assumed_before_a_bias_can_be_seen() -> None:
    """Four groups whose weights are noise, more of it with the larger C. The estimate alone leaves them out."""
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
    phi = torch.zeros(4, 3, SIZE).double()
    phi[:, 0, 0], phi[:, 1, 1], phi[:, 2, 1] = 1.0 + noise, noise, 2.0 * noise
    sums = GradientSums(torch.tensor(4.0), torch.tensor(4.0), phi.sum(0), torch.einsum("gks,gls->kl", phi, phi))
    evidence = Evidence().after(sums, memory=0.9)

    def choice(prior: float) -> Choice:
        return evidence.choice(AISConfig(caps=[1.5, 2.0], horizon=10.0, prior=prior))

    assert choice(0.0).alpha == 0.0 < choice(10.0).alpha < choice(100.0).alpha and choice(100.0).limit == 0
    first = choice(10.0).alpha
    for _ in range(40):  # batch after batch of it is evidence that there is no bias
        evidence = evidence.after(sums, memory=0.999)
    assert choice(10.0).alpha < first


def test_rounding_does_not_choose_between_limits_that_do_the_same() -> None:
    """No weight exceeds the smaller C, so both limits have the same gradient; rounding makes the second one's error the smaller."""
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
    phi = torch.zeros(4, 3, SIZE).double()
    phi[:, 0, 0], phi[:, 1:, 0] = 1.0 + noise, (2.0 - noise)[:, None]
    phi[:, 2] *= 1.0 - 1e-13
    sums = GradientSums(torch.tensor(4.0), torch.tensor(4.0), phi.sum(0), torch.einsum("gks,gls->kl", phi, phi))
    config = AISConfig(caps=[1.5, 2.0], prior=0.0)
    squares, spread = (evidence := Evidence().after(sums, memory=0.9)).moments()
    assert best_alpha(squares, spread, 2, config)[0] < best_alpha(squares, spread, 1, config)[0] < 0.0
    assert evidence.choice(config).limit == 0


def test_a_band_is_chosen_where_it_is_best() -> None:
    """Of four groups alike the band leaves no noise and no bias, and truncation leaves both."""
    config = config_with(ais={"coefficient": "measured", "caps": [2.0], "bands": [[0.5, 3.0]]})
    noise = torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
    phi = torch.zeros(4, 3, SIZE).double()
    phi[:, 0, 0], phi[:, 2, 0] = 1.0 + noise, -noise
    sums = GradientSums(torch.tensor(4.0), torch.tensor(4.0), phi.sum(0), torch.einsum("gks,gls->kl", phi, phi))
    scaler, _ = loss_scaler(diagnostics_of(), config, AISState(), sums)
    assert scaler.alpha == pytest.approx(1.0) and (scaler.correction.low, scaler.correction.high) == (0.5, 3.0)
    old, rollout, mask = torch.tensor([[0.4, 1.0, 2.5, 4.0]]).log(), torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(scaler.factors(old, rollout, mask).policy, torch.tensor([[0.0, 1.0, 2.5, 0.0]]))


@pytest.mark.parametrize(
    ("sections", "measured"),
    [
        ({}, True),
        ({"ais": {"lag": 1}}, True),
        ({"ais": {"coefficient": "product"}}, False),
        ({"ais": {"level": "sequence"}}, False),
        ({"objective": {"name": "gspo"}}, False),
        ({"objective": {"name": "gspo"}, "ais": {"level": "token"}}, True),
        ({"correction_options": {"batch_normalise": True}}, False),
        ({"correction": "tis"}, False),
    ],
)
def test_where_gradients_are_measured_by_default(sections: dict[str, object], measured: bool) -> None:
    config = config_with(**sections)
    assert config.measures_gradients == measured
    if not measured and config.correction == "ais":
        assert loss_scaler(diagnostics_of(1.0, 1.0), config)[0].alpha == pytest.approx(1.0), "the product formula"


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"ais": {"coefficient": "measured", "caps": [2.0, 1.5]}}, r"ais\.caps|caps=\[2\.0, 1\.5\]: must be ascending"),
        ({"ais": {"bands": [[1.5, 2.0]]}}, r"bands=\[\[1\.5, 2\.0\]\]: each must be"),
        ({"ais": {"coefficient": "measured"}, "objective": {"name": "gspo"}}, r"ais\.coefficient=measured: weights single tokens"),
        (
            {"ais": {"coefficient": "measured"}, "correction_options": {"batch_normalise": True}},
            r"ais\.coefficient=measured: correction_options\.batch_normalise=true",
        ),
    ],
)
def test_settings_that_cannot_work(sections: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_with(**sections)
