"""The shortcuts of the gradient benchmark give the gradients that training takes: of a real policy, of all parameters."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ais_megatron.algorithm.ais import AISState
from ais_megatron.batch import Batch
from ais_megatron.config import Config
from tests.helpers.llada import make_llada, masked_batch
from tests.helpers.paths import ROOT
from tests.helpers.policies import make_batch, make_config, make_policy, moe_config
from tests.helpers.ranks import RankPool

OBJECTIVES = {"token mean": {"aggregation": "token"}, "sequence mean": {"aggregation": "sequence"}, "entropy": {"entropy_bonus": 0.1}}


def uneven_batch(batch: Batch, old_logprobs: torch.Tensor) -> Batch:
    """Some answers have large importance weights and others none above 1.5, and two have no advantage."""
    generator = torch.Generator().manual_seed(2)
    log_ratio = torch.randn(old_logprobs.shape, generator=generator).clamp(-1.0, 3.0) * torch.tensor([1, 0.1, 2, 0.1, 0.1, 1])[:, None]
    advantages = batch.advantages * torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 1.0])
    return replace(batch, rollout_logprobs=(old_logprobs - log_ratio) * batch.loss_mask, advantages=advantages)


def differences(rank: int, path: Path, config: Config, rows: Batch) -> dict[str, float]:
    """By arm, how far its mixture is from the gradient that training would take, relative to that."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from gradient_arms import TARGET, Seen, basis, changed, choose, mixture, possible_arms
    from gradient_basis import Taker, basic_gradients
    from gradient_sketch import Sketcher

    policy = make_policy(changed(config, {"ais": {"coefficient": "measured"}}), path)
    take = Taker(policy, Sketcher([p.numel() for p in policy.model.parameters()], 2**30))
    batch = uneven_batch(rows, policy.logprobs(rows))
    gradients = policy.response_gradients(batch)
    old = policy.logprobs(batch, gradients)
    arms = {name: arm for name, arm in possible_arms(config, with_aligned=False)[0].items() if name != TARGET}
    vectors = basis(config, arms.values())
    sketches = basic_gradients(vectors, batch, old, take)
    basic = torch.stack([sketches[vector] for vector in vectors])
    seen = Seen(old, batch.rollout_logprobs, batch.advantages, batch.loss_mask, gradients.sums())
    result = {}
    for name, arm in arms.items():
        scaler, _, _ = choose(arm, seen, AISState())
        policy.train_step(batch, old, scaler)
        wanted = take._sketch  # of the whole batch
        found = mixture(arm, vectors, [seen]).coefficients[0].float() @ basic
        result[name] = float((found - wanted).norm() / wanted.norm())
    assert float((basic[0] - basic[-1]).norm() / basic[0].norm()) > 0.01, "these corrections differ"
    return result


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_mixtures_are_the_gradients_of_training(ranks: RankPool, checkpoint: Path, objective: str) -> None:
    config = make_config(checkpoint, budget=40, objective=OBJECTIVES[objective])
    [found] = ranks.run(1, differences, path=checkpoint, config=quantised(config), rows=make_batch())
    assert len(found) > 15 and max(found.values()) < 1e-5, found


def test_rows_of_a_diffusion_model_count_as_often_as_they_say(ranks: RankPool, tmp_path: Path) -> None:
    path, rows = make_llada(tmp_path), replace(masked_batch(), repeats=torch.tensor([3, 2, 5, 1, 2, 4]))
    config = make_config(path, budget=40, diffusion={"block_length": 20, "likelihood": "trajectory", "states": 1})
    [found] = ranks.run(1, differences, path=path, config=quantised(config), rows=rows)
    assert "tis" in found and "tis, sequence" not in found and max(found.values()) < 1e-5, found


@pytest.mark.slow
def test_auxiliary_losses_of_experts_count_once(ranks: RankPool, moe_checkpoint: Path) -> None:
    config = moe_config(moe_checkpoint, {}, budget=40, aux_coefficient=0.02, z_coefficient=1e-3)
    [found] = ranks.run(1, differences, path=moe_checkpoint, config=quantised(config), rows=make_batch())
    assert max(found.values()) < 1e-5, found


def quantised(config: Config) -> Config:
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"quantization": "fp8_e4m3", "group_size": 2})})
