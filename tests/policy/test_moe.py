"""Qwen3-MoE on Megatron: layouts against transformers, experts in and out, auxiliary losses that depend on nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ais_megatron.batch import Batch
from tests.helpers.policies import MOE_LAYOUTS, make_batch, make_policy, moe_config, my_rows, reference_logprobs
from tests.helpers.ranks import RankPool


def policy_logprobs(rank: int, path: Path, parallel: dict[str, object], **options) -> tuple[Tensor, Tensor]:
    policy = make_policy(moe_config(path, parallel, **options), path)
    rows, index = my_rows(make_batch())
    return policy.logprobs(rows) * rows.loss_mask, index


@pytest.mark.parametrize("layout", MOE_LAYOUTS)
def test_logprobs_equal_transformers(ranks: RankPool, moe_checkpoint: Path, layout: str) -> None:
    world, parallel = MOE_LAYOUTS[layout]
    expected = reference_logprobs(moe_checkpoint, make_batch())
    for logprobs, index in ranks.run(world, policy_logprobs, path=moe_checkpoint, parallel=parallel, budget=40):
        assert (logprobs - expected[index]).abs().max() < 1e-4


def exported(rank: int, path: Path, parallel: dict[str, object], out: Path | None = None) -> dict[str, Tensor]:
    from ais_megatron.policy.hf_export import save_hf

    config = moe_config(path, parallel)
    policy = make_policy(config, path)
    if out is not None:
        save_hf(policy.export_buckets(50_000), config.architecture, "fp32", out)
    return {name: tensor.clone() for bucket in policy.export_buckets(50_000) for name, tensor in bucket}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "EP2", "TP2+EP2", "TP2+ETP2+EP2", "PP2+EP2"])
def test_import_then_export_is_the_identity(ranks: RankPool, moe_checkpoint: Path, layout: str) -> None:
    from safetensors.torch import load_file

    world, parallel = MOE_LAYOUTS[layout]
    original = load_file(moe_checkpoint / "model.safetensors")
    for weights in ranks.run(world, exported, path=moe_checkpoint, parallel=parallel):
        assert weights.keys() == original.keys()
        assert all(torch.equal(weights[name], original[name]) for name in original)


@pytest.mark.slow
def test_transformers_loads_the_export(ranks: RankPool, moe_checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ranks.run(2, exported, path=moe_checkpoint, parallel={"ep": 2}, out=tmp_path)
    tokens = make_batch().tokens
    with torch.no_grad():
        ours, original = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits for folder in (tmp_path, moe_checkpoint)
        )
    assert torch.equal(ours, original)


def trained(rank: int, path: Path, parallel: dict[str, object], alpha: float = 0.5, steps: int = 2, signal: float = 1.0, **options):
    """Weights after `steps` updates; `signal` scales the advantages, so that 0 leaves the auxiliary losses alone."""
    from ais_megatron.algorithm.scaler import LossScaler

    policy = make_policy(moe_config(path, parallel, **options), path)
    rows, _ = my_rows(make_batch())
    old = policy.logprobs(rows)
    rows = Batch(**{**vars(rows), "rollout_logprobs": (old - 0.2) * rows.loss_mask, "advantages": rows.advantages * signal})
    for _ in range(steps):
        old, _ = policy.logprobs_and_calibration(rows)
        metrics = policy.train_step(rows, old, LossScaler(alpha, "token"))
    return {name: tensor.clone() for bucket in policy.export_buckets(50_000) for name, tensor in bucket}, metrics


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in MOE_LAYOUTS if name != "one"])
def test_training_is_independent_of_layout(ranks: RankPool, moe_checkpoint: Path, layout: str) -> None:
    options = dict(path=moe_checkpoint, aux_coefficient=0.02, z_coefficient=1e-3)
    [(expected, expected_metrics)] = ranks.run(1, trained, parallel={}, **options)
    world, parallel = MOE_LAYOUTS[layout]
    for weights, metrics in ranks.run(world, trained, parallel=parallel, budget=40, **options):
        for name, tensor in weights.items():
            difference = (tensor - expected[name]).abs()
            assert difference.max() < 3e-4 and difference.mean() < 2e-6, name
        for name in ("loss", "grad_norm", "entropy", "expert_load_max_over_mean"):
            assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-4, abs=1e-6), name


def gradients(rank: int, path: Path, parallel: dict[str, object], signal: float, alpha: float = 0.5, **options) -> Tensor:
    """Global gradient norm of one update, taken before Adam hides its scale."""
    from ais_megatron.algorithm.scaler import LossScaler

    policy = make_policy(moe_config(path, parallel, **options), path)
    rows, _ = my_rows(make_batch())
    old, _ = policy.logprobs_and_calibration(rows)
    rows = Batch(**{**vars(rows), "rollout_logprobs": (old - 0.2) * rows.loss_mask, "advantages": rows.advantages * signal})
    norm = policy.train_step(rows, old, LossScaler(alpha, "token"))["grad_norm"]
    return torch.tensor(norm)


AUX = dict(aux_coefficient=0.05, z_coefficient=1e-2)


@pytest.mark.slow
def test_auxiliary_gradient_depends_on_nothing_else(ranks: RankPool, moe_checkpoint: Path) -> None:
    """With zero advantages only the auxiliary losses are left: alpha, microbatches, DP, EP and TP must not move them."""
    [alone] = ranks.run(1, gradients, path=moe_checkpoint, parallel={}, signal=0.0, **AUX)
    assert alone > 1e-4
    for world, parallel, budget, alpha in (
        (1, {}, 10_000, 1.0),
        (1, {}, 20, 0.0),
        (2, {}, 10_000, 0.5),
        (2, {"ep": 2}, 40, 0.5),
        (4, {"ep": 4}, 20, 0.5),
        (4, {"tp": 2, "sequence_parallel": True, "ep": 4}, 40, 0.5),
    ):
        for norm in ranks.run(world, gradients, path=moe_checkpoint, parallel=parallel, signal=0.0, budget=budget, alpha=alpha, **AUX):
            assert norm.item() == pytest.approx(alone.item(), rel=2e-5), (world, parallel, budget, alpha)


def reference_aux_gradient(path: Path, batch: Batch, coefficient: float, z_coefficient: float) -> Tensor:
    """Gradient norm of the two losses written down plainly over transformers' router logits, all parameters."""
    from transformers import Qwen3MoeForCausalLM

    model = Qwen3MoeForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    real = (torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]).reshape(-1)
    total = torch.zeros(())
    for logits in model(batch.tokens, output_router_logits=True).router_logits:
        logits = logits.reshape(-1, 8)[real]
        probabilities = logits.softmax(-1)
        fractions = torch.zeros(8).index_add_(0, logits.topk(2).indices.reshape(-1), torch.ones(2 * len(logits)))
        total = total + coefficient * 8 * (fractions / fractions.sum() * probabilities.mean(0)).sum()
        total = total + z_coefficient * logits.logsumexp(-1).square().mean()
    total.backward()
    return torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()


@pytest.mark.slow
def test_auxiliary_gradient_is_that_of_the_papers_formulas(ranks: RankPool, moe_checkpoint: Path) -> None:
    [norm] = ranks.run(1, gradients, path=moe_checkpoint, parallel={}, signal=0.0, **AUX)
    expected = reference_aux_gradient(moe_checkpoint, make_batch(), AUX["aux_coefficient"], AUX["z_coefficient"])
    assert norm.item() == pytest.approx(expected.item(), rel=1e-3)


def replayed(rank: int, path: Path, parallel: dict[str, object], replay: bool) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Log-probabilities when the "engine" sent every token to experts 0 and 7 (and said nothing about the last token)."""
    config = moe_config(path, parallel, budget=40)
    policy = make_policy(config.model_copy(update={"moe": config.moe.model_copy(update={"routing_replay": replay})}), path)
    batch = make_batch()
    experts = torch.tensor([0, 7], dtype=torch.int8).expand(6, 17, 4, 2).clone()
    experts[torch.arange(6), batch.lengths - 1] = -1
    rows, index = my_rows(Batch(**{**vars(batch), "routed_experts": experts}))
    logprobs, _ = policy.logprobs_and_calibration(rows)
    return logprobs * rows.loss_mask, index, policy.routing_metrics


def forced_reference(path: Path, batch: Batch) -> Tensor:
    """transformers with its top-k replaced by the choice (0, 7)."""
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    original = torch.topk

    def topk(scores: Tensor, k: int, dim: int = -1, **kwargs):  # noqa: ANN202
        if scores.shape[-1] != 8:
            return original(scores, k, dim=dim, **kwargs)
        chosen = torch.tensor([0, 7]).expand(*scores.shape[:-1], 2)
        return scores.gather(-1, chosen), chosen

    modeling_qwen3_moe.torch.topk = topk
    try:
        return reference_logprobs(path, batch)
    finally:
        torch.topk = original


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "TP2+EP2", "PP2+EP2"])
def test_replayed_routing_is_the_engines(ranks: RankPool, moe_checkpoint: Path, layout: str) -> None:
    world, parallel = MOE_LAYOUTS[layout]
    expected, own = forced_reference(moe_checkpoint, make_batch()), reference_logprobs(moe_checkpoint, make_batch())
    assert (expected - own).abs().max() > 0.1, "the forced choice must matter"
    for replay, reference in ((True, expected), (False, own)):
        for logprobs, index, metrics in ranks.run(world, replayed, path=moe_checkpoint, parallel=parallel, replay=replay):
            assert (logprobs - reference[index]).abs().max() < 1e-4
            assert 0.9 < metrics["routing_differs_fraction"] <= 1.0
            assert metrics["dropped_tokens_fraction"] == 0.0
            if replay:  # all but the last token of each row on 2 of 8 experts
                assert 3.6 < metrics["expert_load_max_over_mean"] <= 4.0
