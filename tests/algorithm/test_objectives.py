"""Every objective against numbers by hand and against autograd on a loop over responses, written down from the papers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ais_megatron.algorithm.advantages import advantages_of
from ais_megatron.algorithm.correction import Correction, response_mean
from ais_megatron.algorithm.loss import policy_loss
from ais_megatron.algorithm.objectives import kl_penalty, surrogate
from ais_megatron.algorithm.scaler import LossScaler
from ais_megatron.config.algorithm import OBJECTIVE_PRESETS, ObjectiveConfig
from tests.helpers.batches import config_with, random_rows


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.5, 0.5])
    assert advantages_of("group_mean", rewards, 2).tolist() == [0.5, -0.5, 0.0, 0.0]
    assert advantages_of("reward", rewards, 2).tolist() == rewards.tolist()
    assert advantages_of("group_std", rewards, 2, 0.0).tolist() == pytest.approx([0.5**0.5, -(0.5**0.5), 0.0, 0.0])


def evaluated(name: str, ratios: list[list[float]], advantages: list[float], low: float, high: float) -> tuple[Tensor, Tensor]:
    """(J of every token, d sum(J) / d logprobs) for whole rows of ratios at old logprobs of -1."""
    ratio = torch.tensor(ratios, dtype=torch.float64)
    old = torch.full_like(ratio, -1.0)
    logprobs = (old + ratio.log()).requires_grad_()
    j = surrogate(name, logprobs, old, torch.tensor(advantages, dtype=torch.float64), torch.ones_like(ratio, dtype=torch.bool), low, high)
    j.objective.sum().backward()
    return j.objective.detach(), logprobs.grad


def test_gspo_by_hand() -> None:
    """Geometric means 2 (clipped for A > 0, kept for A < 0), 1/2 (kept, clipped) and 1."""
    ratios = [[1.0, 4.0], [1.0, 4.0], [0.5, 0.5], [0.5, 0.5], [0.5, 2.0]]
    j, grad = evaluated("gspo", ratios, [3.0, -3.0, 3.0, -3.0, 3.0], 0.2, 0.3)
    expected = torch.tensor([1.3 * 3, 2 * -3, 0.5 * 3, 0.8 * -3, 3.0], dtype=torch.float64)
    torch.testing.assert_close(j, expected[:, None].expand(5, 2))
    # Two tokens hold the same J = R A, and dR/dlogprob_t = R / 2 for each of them.
    torch.testing.assert_close(grad[:, 0], torch.tensor([0.0, -6.0, 1.5, 0.0, 3.0], dtype=torch.float64))


def test_tbpo_by_hand() -> None:
    """As GSPO for A > 0; for A < 0 nothing pushes outside the band, on either side."""
    ratios = [[1.0, 4.0], [1.0, 4.0], [0.5, 0.5], [0.5, 0.5], [0.5, 2.0]]
    j, grad = evaluated("tbpo", ratios, [3.0, -3.0, 3.0, -3.0, -3.0], 0.2, 0.3)
    torch.testing.assert_close(j[:, 0], torch.tensor([1.3 * 3, 1.3 * -3, 0.5 * 3, 0.8 * -3, -3.0], dtype=torch.float64))
    torch.testing.assert_close(grad[:, 0], torch.tensor([0.0, 0.0, 1.5, 0.0, -3.0], dtype=torch.float64))


def test_cispo_by_hand() -> None:
    """The gradient never vanishes; the ratio only weighs it, and never by more than 1 + clip_high."""
    j, grad = evaluated("cispo", [[9.0, 2.0, 0.5]], [3.0], 1.0, 4.0)
    torch.testing.assert_close(grad, torch.tensor([[15.0, 6.0, 1.5]], dtype=torch.float64))
    logprobs = torch.tensor([[9.0, 2.0, 0.5]], dtype=torch.float64).log() - 1
    torch.testing.assert_close(j, grad * logprobs)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo"])
def test_token_objectives_by_hand(name: str) -> None:
    j, grad = evaluated(name, [[1.5, 0.5, 1.1], [1.5, 0.5, 1.1]], [2.0, -2.0], 0.2, 0.28)
    torch.testing.assert_close(j, torch.tensor([[1.28, 0.5, 1.1], [-1.5, -0.8, -1.1]], dtype=torch.float64) * 2)
    torch.testing.assert_close(grad, torch.tensor([[0.0, 0.5, 1.1], [-1.5, 0.0, -1.1]], dtype=torch.float64) * 2)


def test_kl_estimators_by_hand() -> None:
    d = torch.tensor([[0.1, -0.2, 5.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False]])
    for name, values, slopes in (
        ("k3", [math.exp(-0.1) - 1 + 0.1, math.exp(0.2) - 1 - 0.2], [1 - math.exp(-0.1), 1 - math.exp(0.2)]),
        ("k1", [0.1, -0.2], [0.1, -0.2]),
    ):
        logprobs = d.clone().requires_grad_()
        kl = kl_penalty(name, logprobs, torch.zeros_like(d), mask)
        kl.sum().backward()
        assert kl[0].tolist() == pytest.approx([*values, 0.0], abs=1e-15)
        assert logprobs.grad[0].tolist() == pytest.approx([*slopes, 0.0], abs=1e-15)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_kl_gradient_is_that_of_the_divergence(estimator: str) -> None:
    """A softmax over three actions: on policy, the expected gradient of the estimate is that of KL(pi || ref)."""
    logits = torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.1, 0.2, -0.4], dtype=torch.float64).log_softmax(0)
    logp = logits.log_softmax(0)
    (logp.exp() * (logp - reference)).sum().backward()
    exact, logits.grad = logits.grad, None
    logp = logits.log_softmax(0)
    estimate = kl_penalty(estimator, logp[None], reference[None], torch.ones(1, 3, dtype=torch.bool))[0]
    if estimator == "k1":
        (logp.detach().exp() * estimate).sum().backward()
        torch.testing.assert_close(logits.grad, exact)
    else:  # differentiated as it stands, k3 descends the reverse divergence KL(ref || pi): E_pi[1 - ref/pi] grad log pi
        (logp.detach().exp() * estimate).sum().backward()
        torch.testing.assert_close(logits.grad, logp.detach().exp() - reference.exp())


def straightforward(name: str, t: dict[str, Tensor], logprobs: Tensor, entropy: Tensor, alpha: float, objective: ObjectiveConfig) -> Tensor:
    """The whole loss, normalised, response by response."""
    clip, limit = objective.resolved, 48
    rows = [i for i in range(5) if t["mask"][i].any()]
    num_tokens = int(t["mask"].sum())
    total = torch.zeros((), dtype=torch.float64)
    for i in rows:
        m, a = t["mask"][i], t["advantages"][i]
        lp, old, mu = logprobs[i][m], t["old"][i][m], t["rollout"][i][m]
        s = 1 + alpha * (torch.clamp((old - mu).exp(), max=2.0) - 1)
        ratio = (lp - old).exp()
        if name in ("gspo", "tbpo"):
            ratio = (lp - old).mean().exp().expand(len(lp))
        bounded = torch.clamp(ratio, 1 - clip.clip_low, 1 + clip.clip_high)
        if name == "cispo":
            j = bounded.detach() * a * lp
        elif name == "tbpo" and a < 0:
            j = bounded * a
        else:
            j = torch.minimum(ratio * a, bounded * a)
        d = lp - t["reference"][i][m]
        per_token = -s * j + objective.kl_coefficient * ((-d).exp() - 1 + d) - objective.entropy_bonus * entropy[i][m]
        share = {"token": 1 / num_tokens, "sequence": 1 / len(lp) / len(rows), "constant": 1 / limit / len(rows)}
        total = total + share[clip.aggregation] * per_token.sum()
    return total


@pytest.mark.parametrize("name", OBJECTIVE_PRESETS)
@pytest.mark.parametrize("regularised", [False, True])
def test_losses_and_gradients_equal_a_straightforward_implementation(name: str, regularised: bool) -> None:
    t = random_rows()
    objective = ObjectiveConfig(name=name, **(dict(kl_coefficient=0.1, entropy_bonus=0.01) if regularised else {}))
    ours, theirs = ([t[key].clone().requires_grad_() for key in ("logprobs", "entropy")] for _ in range(2))
    num_tokens, num_sequences = int(t["mask"].sum()), int(t["mask"].any(1).sum())
    scaler = LossScaler(0.6, objective.resolved.aggregation, response_limit=48).for_update(num_tokens, num_sequences)
    loss = policy_loss(objective, *ours, t["old"], t["reference"], t["advantages"], scaler.factors(t["old"], t["rollout"], t["mask"]))
    (loss.total / num_tokens).backward()
    expected = straightforward(name, t, *theirs, 0.6, objective)
    expected.backward()
    assert (loss.total / num_tokens).item() == pytest.approx(expected.item(), rel=1e-6)  # float32 aggregation weights
    torch.testing.assert_close(ours[0].grad, theirs[0].grad, rtol=1e-5, atol=1e-9)
    if regularised:
        torch.testing.assert_close(ours[1].grad, theirs[1].grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", OBJECTIVE_PRESETS)
def test_padding_order_and_poison_outside_the_mask_change_nothing(name: str) -> None:
    t, objective = random_rows(1), ObjectiveConfig(name=name, kl_coefficient=0.1, entropy_bonus=0.01)
    order = torch.tensor([4, 2, 0, 1, 3])

    def gradient(rows: dict[str, Tensor]) -> tuple[float, Tensor]:
        scaler = LossScaler(0.6, objective.resolved.aggregation, Correction("tis", "sequence"), response_limit=9).for_update(20, 4)
        logprobs = rows["logprobs"].clone().requires_grad_()
        factors = scaler.factors(rows["old"], rows["rollout"], rows["mask"])
        loss = policy_loss(objective, logprobs, rows["entropy"], rows["old"], rows["reference"], rows["advantages"], factors)
        loss.total.backward()
        return loss.total.item(), logprobs.grad

    poisoned = {k: v[order] if v.dim() == 1 else torch.nn.functional.pad(v[order], (0, 2)) for k, v in t.items()}
    for key in ("old", "rollout", "reference", "entropy"):
        poisoned[key] = poisoned[key].masked_fill(~poisoned["mask"], -math.inf)
    (loss, grad), (other, permuted) = gradient(t), gradient(poisoned)
    assert other == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(permuted[:, :9], grad[order], rtol=1e-12, atol=1e-15)
    assert permuted[~poisoned["mask"]].abs().sum() == 0


@pytest.mark.parametrize(("name", "level"), [("grpo", "token"), ("gspo", "geometric"), ("tbpo", "geometric"), ("cispo", "token")])
def test_one_word_changes_what_belongs_to_it(name: str, level: str) -> None:
    config = config_with(objective={"name": name})
    assert config.objective.resolved == OBJECTIVE_PRESETS[name] and config.weight_level == level
    assert config_with(objective={"name": name, "clip_high": 0.5}).objective.resolved.clip_high == 0.5
    tis = config_with(objective={"name": name}, correction="tis")
    assert tis.weight_level == ("sequence" if level == "geometric" else "token")


def as_a_chain_of_conditions(
    name: str, logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The same formulas in one function, as they stood before every objective had its own."""
    advantages = advantages[:, None]
    log_ratio = (logprobs - old).masked_fill(~mask, 0.0)
    if name in ("gspo", "tbpo"):
        log_ratio = response_mean(log_ratio, mask)[:, None].expand_as(log_ratio)
    ratio = log_ratio.exp()
    inside = ratio.clamp(1.0 - low, 1.0 + high)
    if name == "cispo":
        return inside.detach() * advantages * logprobs.masked_fill(~mask, 0.0), ratio.detach(), (inside != ratio) & mask
    unclipped, clipped = ratio * advantages, inside * advantages
    objective = torch.minimum(unclipped, clipped)
    if name == "tbpo":
        objective = torch.where(advantages < 0, clipped, objective)
    return objective, ratio.detach(), ((objective != unclipped) & mask).detach()


@pytest.mark.parametrize("name", OBJECTIVE_PRESETS)
def test_functions_give_the_chains_results_to_the_last_bit(name: str) -> None:
    t = {key: value.float() if value.is_floating_point() else value for key, value in random_rows(2).items()}
    found = []
    for function in (surrogate, as_a_chain_of_conditions):
        logprobs = t["logprobs"].clone().requires_grad_()
        j, ratio, clipped = function(name, logprobs, t["old"], t["advantages"], t["mask"], 0.1, 0.2)
        (gradient,) = torch.autograd.grad((j * t["entropy"]).sum(), logprobs)
        found.append((j.detach(), ratio, clipped, gradient))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
