"""Training a diffusion model: masks and updates, estimates with several states, lagged AIS, LoRA, the KL reference, and whole runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ais_megatron.algorithm.correction import Correction
from ais_megatron.algorithm.gradients import GradientSums
from ais_megatron.algorithm.scaler import LossScaler
from ais_megatron.batch import Batch, Canvas, Prompt, Rollout, View, assemble
from ais_megatron.config import Config, build_config
from tests.helpers.llada import MASK, make_llada
from tests.helpers.policies import make_config, make_policy, weights_of
from tests.helpers.ranks import RankPool
from tests.helpers.runs import rows_of, small, trained

DIFFUSION = {"block_length": 20, "steps": 10}


@pytest.fixture(scope="module")
def llada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llada(tmp_path_factory.mktemp("llada"))


def make_rollout(number: int, views: int, repeats: int = 1) -> Rollout:
    """A prompt of three tokens and a canvas of four, of which three are the response; every view hides another token of the prompt."""
    prompt = Prompt(number, "", (5, 6, 7 + number), {})
    hidden = [torch.tensor([v == 0, v == 1, v == 2, True, True, True, True]) for v in range(views)]
    scored = torch.tensor([True, True, True, False])
    made = tuple(View(mask, scored, torch.where(scored, -1.0 - v, 0.0)) for v, mask in enumerate(hidden))
    canvas = Canvas((8 + number, 9, 1, 1), (0, 0, 1, 1), made, MASK, repeats)
    return Rollout(prompt, canvas.token_ids[:3], (-1.0,) * 3, "stop", 0, canvas=canvas)


def make_rows(views: int, repeats: int = 1) -> Batch:
    rollouts = [make_rollout(number, views, repeats) for number in range(4)]
    return assemble(rollouts, torch.zeros(4), torch.tensor([1.0, -1.0, 0.5, 2.0]))


def test_a_batch_has_a_row_for_every_view() -> None:
    from ais_megatron.collection import _by_view

    batch = make_rows(2)
    assert batch.tokens[:2].tolist() == [[5, 6, 7, 8, 9, 1, 1]] * 2
    assert batch.read[:2].tolist() == [[MASK, 6, 7, *[MASK] * 4], [5, MASK, 7, *[MASK] * 4]]
    assert batch.loss_mask[0].tolist() == [False] * 3 + [True] * 3 + [False] and batch.advantages[:4].tolist() == [1.0, 1.0, -1.0, -1.0]
    apart = _by_view(batch, 2)
    assert apart.advantages.tolist() == [1.0, -1.0, 0.5, 2.0] * 2
    assert (apart.read[:4, 0] == MASK).all() and (apart.read[4:, 1] == MASK).all() and apart.rollout_logprobs[4:, 3].tolist() == [-2.0] * 4


def test_the_loss_counts_a_row_as_often_as_it_says() -> None:
    """Two responses, the second three times: as if it were there three times."""
    old = torch.tensor([[0.0, -1.0], [0.0, -2.0]])
    rollout, mask = old - torch.tensor([[0.0, 0.5], [0.0, -0.5]]), torch.tensor([[False, True], [True, True]])
    scaler = LossScaler(alpha=1.0, correction=Correction())
    factors = scaler.factors(old, rollout, mask, torch.tensor([1, 3]))
    copies = scaler.factors(old[[0, 1, 1, 1]], rollout[[0, 1, 1, 1]], mask[[0, 1, 1, 1]])
    assert factors.counts.sum() == 7 == copies.counts.sum()
    for ours, theirs in ((factors.policy, copies.policy), (factors.shares, copies.shares)):
        torch.testing.assert_close(ours, torch.stack([theirs[0], theirs[1:].sum(0)]))


def steps_taken(rank: int, path: Path, views: int, updates: int, **sections: object) -> tuple[dict[str, Tensor], dict[str, float]]:
    from ais_megatron.collection import _by_view

    config = make_config(path, diffusion=DIFFUSION | {"masks": views}, train={"updates_per_batch": updates}, **sections)
    policy = make_policy(config, path, temperature=1.0)
    batch = _by_view(make_rows(views), views)
    old = policy.logprobs(batch)
    metrics = policy.train_step(batch, old, LossScaler(alpha=0.5), policy.reference_logprobs(batch))
    if updates == 1:  # (otherwise the reference is not the policy any more)
        assert metrics["policy_ratio_mean"] == pytest.approx(1.0, abs=1e-5)
    return weights_of(policy), metrics


def one_mask_after_the_other(rank: int, path: Path) -> dict[str, Tensor]:
    """Two updates by hand: with old log-probabilities of both masks from before the first one."""
    policy = make_policy(make_config(path, diffusion=DIFFUSION), path, temperature=1.0)
    batch = make_rows(2)
    parts = [batch.rows(torch.arange(view, 8, 2)) for view in range(2)]
    old = [policy.logprobs(part) for part in parts]
    for part, logprobs in zip(parts, old, strict=True):
        policy.train_step(part, logprobs, LossScaler(alpha=0.5))
    return weights_of(policy)


def test_every_update_has_all_responses_under_its_own_mask(ranks: RankPool, llada: Path) -> None:
    found, _ = ranks.run(1, steps_taken, path=llada, views=2, updates=2)[0]
    expected = ranks.run(1, one_mask_after_the_other, path=llada)[0]
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_the_reference_is_scored_under_the_same_masks(ranks: RankPool, llada: Path) -> None:
    """At the start the reference is the policy, so under equal masks their divergence is exactly 0; after an update it is not."""
    _, first = ranks.run(1, steps_taken, path=llada, views=2, updates=1, objective={"kl_coefficient": 0.04})[0]
    _, later = ranks.run(1, steps_taken, path=llada, views=2, updates=2, objective={"kl_coefficient": 0.04})[0]
    assert first["reference_kl"] == 0.0 and later["reference_kl"] > 1e-6


def test_lora_trains_the_projections_that_exist(ranks: RankPool, llada: Path) -> None:
    lora = {"rank": 4, "alpha": 8.0}
    found, _ = ranks.run(1, steps_taken, path=llada, views=1, updates=2, policy={"lora": lora})[0]
    spread, _ = ranks.run(2, steps_taken, path=llada, views=1, updates=2, policy={"lora": lora}, tp=2, sp=True)[0]
    start = ranks.run(1, exported_weights, path=llada)[0]
    changed = {name.split(".")[-2] for name, tensor in found.items() if not torch.equal(tensor, start[name])}
    assert changed == {"q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"}
    assert all((spread[name] - tensor).abs().max() < 2e-4 for name, tensor in found.items())


def exported_weights(rank: int, path: Path) -> dict[str, Tensor]:
    return weights_of(make_policy(make_config(path, diffusion=DIFFUSION), path))


def lagged(rank: int, path: Path) -> None:
    """The training pass of lagged AIS scores the same masks, so its old log-probabilities are those of a pass of their own."""
    policy = make_policy(make_config(path, diffusion=DIFFUSION, ais={"lag": 1}), path, temperature=1.0)
    batch = make_rows(2)
    expected = policy.logprobs(batch)
    *_, found = policy.lagged_train_step(batch, LossScaler(alpha=0.5), keep_logprobs=True)
    assert found is not None and (found - expected).abs().max() < 1e-6
    assert (policy.logprobs(batch) - expected).abs().max() > 1e-4


def gradient_sums(rank: int, path: Path, views: int, lag: int = 0) -> list[GradientSums]:
    """Of two groups, from their rows under all masks together; without `lag` also from those under each mask alone."""
    from ais_megatron.collection import _by_view
    from ais_megatron.policy.policy import Policy

    def config_of(masks: int) -> Config:
        return make_config(path, diffusion=DIFFUSION | {"masks": masks}, rollout={"group_size": 2}, ais={"lag": lag}, budget=20)

    policy, batch = make_policy(config_of(views), path, temperature=1.0), _by_view(make_rows(views), views)
    if lag:
        return [policy.lagged_train_step(batch, LossScaler(alpha=0.5))[2]]
    alone = Policy(config_of(1), policy.config.train.optimizer, 10, 1.0, str(path))
    found = []
    for owner, rows in ((policy, batch), *((alone, batch.rows(part)) for part in torch.arange(len(batch)).chunk(views))):
        gradients = owner.response_gradients(rows)
        owner.logprobs(rows, gradients)
        found.append(GradientSums.of(gradients.sums()))
    return found


def test_measured_gradients_of_a_response_are_sums_over_its_masks(ranks: RankPool, llada: Path) -> None:
    (both, first, second), [lagged] = (ranks.run(1, gradient_sums, path=llada, views=2, lag=lag)[0] for lag in (0, 1))
    assert both.groups == first.groups == second.groups == 2 and both.tokens == first.tokens + second.tokens == 24
    torch.testing.assert_close(both.sums, first.sums + second.sums)
    assert (both.products - first.products - second.products).abs().max() > 1e-3, "of a group the products of different masks count too"
    for ours, theirs in zip(lagged, both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_lagged_ais_is_exact(ranks: RankPool, llada: Path) -> None:
    ranks.run(1, lagged, path=llada)


def learned(rank: int, path: Path) -> None:
    """Weighted rows of a solution: masked tokens only, and weights L / n with mean 1 over all tokens."""
    from ais_megatron.sft import _masked

    config = make_config(path, diffusion=DIFFUSION)
    examples = [Rollout(Prompt(i, "", (3, 4), {}), (5, 6, 1), (0.0,) * 3, "stop", -1) for i in range(6)]
    batch = _masked(config, examples, eos_id=1)
    counts = batch.loss_mask.sum(1)
    assert batch.tokens.shape == (6, 22) and batch.tokens[0].tolist() == [3, 4, 5, 6] + [1] * 18
    assert torch.equal(batch.read == MASK, batch.loss_mask) and len(counts.unique()) > 2
    torch.testing.assert_close(batch.advantages * counts, counts.float().mean().expand(6))
    policy = make_policy(config, path, lr=1e-2, temperature=1.0)
    first, *_, last = [policy.sft_step(batch)["loss"] for _ in range(8)]
    assert last < 0.8 * first
    with pytest.raises(ValueError, match="the solution of problem 0 has 21 tokens, but rollout.max_response_tokens=20"):
        _masked(config, [replace(examples[0], token_ids=(5,) * 21)], eos_id=1)


def test_solutions_are_learned_by_masked_prediction(ranks: RankPool, llada: Path) -> None:
    ranks.run(1, learned, path=llada)


@pytest.mark.parametrize(
    "diffusion",
    [{"masks": 2}, {"likelihood": "trajectory", "states": 2}, {"remasking": "random"}],
    ids=["masks", "trajectory", "random"],
)
def test_a_run_from_the_warm_start_to_the_summary(ranks: RankPool, tmp_path: Path, diffusion: dict[str, object]) -> None:
    data = small(tmp_path)
    architecture = data["model"]["architecture"] | {"model_type": "llada", "vocab_size": 40, "mask_token_id": 39}
    updates = {"updates_per_batch": 2}
    data |= {
        "model": {"architecture": architecture},
        "diffusion": {"block_length": 6, "steps": 4, **diffusion},
        "train": data["train"] | updates,
        "objective": {"entropy_bonus": 0.1, "kl_coefficient": 0.01, "dynamic_sampling": "masks" in diffusion},
    }
    ranks.run(2, trained, config=build_config(data))
    rows = rows_of(tmp_path)
    assert len(rows) == 3 and all(row["grad_norm"] > 0.0 for row in rows)
    assert all(0.0 < row["divergence_severity"] < 0.2 and 0.0 <= row["alpha"] <= 1.0 for row in rows)
    assert all("weight_cap" in row for row in rows), "measured, also where a response has several rows"
    assert all(row["num_responses"] >= 8 and row["num_tokens"] > 0 for row in rows)
