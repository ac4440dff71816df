"""The policy against transformers and against itself, under every layout, with real processes over gloo."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.policies import (
    LAYOUTS,
    calibrated,
    exported,
    make_batch,
    make_config,
    make_policy,
    my_rows,
    policy_logprobs,
    reference_amax,
    reference_logprobs,
    trained_weights,
)
from tests.helpers.ranks import RankPool


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), pytest.param("bf16", 3e-2, marks=pytest.mark.slow)])
def test_logprobs_equal_transformers(ranks: RankPool, checkpoint: Path, layout: str, dtype: str, tolerance: float) -> None:
    world, tp, pp, sp = LAYOUTS[layout]
    expected = reference_logprobs(checkpoint, make_batch())
    for logprobs, index in ranks.run(world, policy_logprobs, path=checkpoint, tp=tp, pp=pp, sp=sp, dtype=dtype, budget=40):
        assert (logprobs - expected[index]).abs().max() < tolerance


def scored_logprobs(rank: int, path: Path, **layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # noqa: ANN003
    """Log-probabilities with the whole mask, with every other token of it, and that smaller mask."""
    policy = make_policy(make_config(path, **layout), path)
    rows, _ = my_rows(make_batch())
    every_other = rows.loss_mask & (torch.arange(rows.tokens.shape[1]) % 2 == 0)
    every_other[0] = False  # a row without any scored token
    return policy.logprobs(rows), policy.logprobs(replace(rows, loss_mask=every_other)), every_other


@pytest.mark.parametrize("layout", ["TP1", "TP2", "TP2+SP", "PP2"])
@pytest.mark.parametrize("budget", [1, 40])
def test_only_scored_tokens_have_a_logprob_and_the_mask_changes_none(ranks: RankPool, checkpoint: Path, layout: str, budget: int) -> None:
    """The output layer sees only scored tokens. (With a budget of one token each row is a microbatch, one of them without any.)"""
    world, tp, pp, sp = LAYOUTS[layout]
    for whole, part, mask in ranks.run(world, scored_logprobs, path=checkpoint, tp=tp, pp=pp, sp=sp, budget=budget):
        assert (part[~mask] == 0).all()
        assert (part - whole)[mask].abs().max() < 1e-5


@pytest.fixture(scope="module")
def trained_alone(ranks: RankPool, untied_checkpoint: Path):  # noqa: ANN201
    """One process, one microbatch."""
    return {a: ranks.run(1, trained_weights, path=untied_checkpoint, aggregation=a)[0] for a in ("token", "sequence")}


@pytest.mark.parametrize("aggregation", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "TP1"])
def test_training_is_independent_of_layout(ranks: RankPool, untied_checkpoint: Path, trained_alone, layout: str, aggregation: str) -> None:
    world, tp, pp, sp = LAYOUTS[layout]
    results = ranks.run(world, trained_weights, path=untied_checkpoint, aggregation=aggregation, tp=tp, pp=pp, sp=sp, budget=40)
    for weights, metrics in results:
        assert_same_training((weights, metrics), trained_alone[aggregation])


@pytest.mark.parametrize("budget", [1, 24, 60])
@pytest.mark.parametrize("aggregation", ["token", pytest.param("sequence", marks=pytest.mark.slow)])
def test_training_is_independent_of_the_microbatch_split(
    ranks: RankPool, untied_checkpoint: Path, trained_alone, budget: int, aggregation: str
) -> None:
    result = ranks.run(1, trained_weights, path=untied_checkpoint, aggregation=aggregation, budget=budget)[0]
    assert_same_training(result, trained_alone[aggregation])


def test_recompute_changes_nothing(ranks: RankPool, untied_checkpoint: Path, trained_alone) -> None:
    result = ranks.run(1, trained_weights, path=untied_checkpoint, recompute="full")[0]
    assert_same_training(result, trained_alone["token"])


def assert_same_training(result, expected) -> None:
    """Three steps move weights by up to 3e-3; Adam turns rounding in a vanishing gradient into a step of any size below
    lr, hence the bound on the largest difference and the far tighter one on the mean."""
    (weights, metrics), (expected_weights, expected_metrics) = result, expected
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        difference = (tensor - expected_weights[name]).abs()
        assert difference.max() < 2e-4, name
        assert difference.mean() < 1e-6, name
    for name in ("loss", "entropy", "policy_ratio_mean", "clip_fraction", "grad_norm", "lr"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("layout", ["TP1", "TP2", "PP2", "TP2xPP2"])
def test_import_then_export_is_the_identity(ranks: RankPool, checkpoint: Path, layout: str) -> None:
    from safetensors.torch import load_file

    world, tp, pp, sp = LAYOUTS[layout]
    original = load_file(checkpoint / "model.safetensors")
    for weights in ranks.run(world, exported, path=checkpoint, tp=tp, pp=pp, sp=sp):
        assert weights.keys() == original.keys()
        assert all(torch.equal(weights[name], original[name]) for name in original)


def test_transformers_loads_the_export(ranks: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ranks.run(4, exported, path=checkpoint, out=tmp_path, tp=2, pp=2)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2, "the weights must lie in several shards"
    tokens = make_batch().tokens
    with torch.no_grad():
        ours, original = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens).logits for folder in (tmp_path, checkpoint)
        )
    assert torch.equal(ours, original)


def test_a_sharded_checkpoint_loads(ranks: RankPool, checkpoint: Path, tmp_path: Path) -> None:
    ranks.run(1, exported, path=checkpoint, out=tmp_path)
    expected = ranks.run(1, exported, path=checkpoint)[0]
    again = ranks.run(2, exported, path=tmp_path, tp=2)[0]
    assert all(torch.equal(again[name], expected[name]) for name in expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_calibration_sees_global_ranges_of_real_tokens(ranks: RankPool, untied_checkpoint: Path, layout: str) -> None:
    world, tp, pp, sp = LAYOUTS[layout]
    expected = reference_amax(untied_checkpoint, make_batch())
    for amax in ranks.run(world, calibrated, path=untied_checkpoint, tp=tp, pp=pp, sp=sp):
        torch.testing.assert_close(amax, expected, rtol=1e-4, atol=1e-5)


def logprobs_with(rank: int, path: Path, slow: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and a gradient of a BF16 policy on a machine on which BF16 products are slow, or are not."""
    from ais_megatron.policy import model

    original, model.bf16_products_are_slow = model.bf16_products_are_slow, lambda: slow
    try:
        policy = make_policy(make_config(path, dtype="bf16"), path)
    finally:
        model.bf16_products_are_slow = original
    seen = {}
    policy.optimizer.step = lambda: seen.update(policy.model.named_parameters())
    policy.sft_step(make_batch())
    return policy.logprobs(make_batch()), seen["decoder.layers.1.mlp.linear_fc2.weight"].main_grad.clone()


def test_products_in_float32_change_only_rounding(ranks: RankPool, untied_checkpoint: Path) -> None:
    (logprobs, gradient), (native, native_gradient) = (
        ranks.run(1, logprobs_with, path=untied_checkpoint, slow=slow)[0] for slow in (True, False)
    )
    assert (logprobs - native).abs().max() < 3e-2
    assert (gradient - native_gradient).norm() < 2e-2 * native_gradient.norm()
