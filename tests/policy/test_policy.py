"""The policy against transformers and against itself, under every layout, with real processes over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ais_megatron.batch import Batch
from tests.helpers.policies import LAYOUTS, make_batch, make_config, make_policy, my_rows, reference_logprobs
from tests.helpers.ranks import RankPool


def policy_logprobs(rank: int, path: Path, **layout) -> tuple[Tensor, Tensor]:
    policy = make_policy(make_config(path, **layout), path)
    rows, index = my_rows(make_batch())
    return policy.logprobs(rows) * rows.loss_mask, index


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-4), pytest.param("bf16", 3e-2, marks=pytest.mark.slow)])
def test_logprobs_equal_transformers(ranks: RankPool, checkpoint: Path, layout: str, dtype: str, tolerance: float) -> None:
    world, tp, pp, sp = LAYOUTS[layout]
    expected = reference_logprobs(checkpoint, make_batch())
    for logprobs, index in ranks.run(world, policy_logprobs, path=checkpoint, tp=tp, pp=pp, sp=sp, dtype=dtype, budget=40):
        assert (logprobs - expected[index]).abs().max() < tolerance


def trained_weights(rank: int, path: Path, aggregation: str = "token", recompute: str = "none", updates: int = 1, **layout):
    """All weights after three optimizer steps, as exported, and the last step's metrics."""
    from ais_megatron.algorithm.scaler import LossScaler

    config = make_config(path, model={"recompute": recompute}, train={"updates_per_batch": updates}, **layout)
    policy = make_policy(config, path)
    rows, _ = my_rows(make_batch())
    rows = Batch(**{**vars(rows), "rollout_logprobs": (policy.logprobs(rows) - 0.2) * rows.loss_mask})
    for _ in range(3):
        old_logprobs = policy.logprobs(rows)
        metrics = policy.train_step(rows, old_logprobs, LossScaler(alpha=0.5, aggregation=aggregation))
    return {name: tensor.clone() for bucket in policy.export_buckets(20_000) for name, tensor in bucket}, metrics


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


def exported(rank: int, path: Path, out: Path | None = None, **layout):
    from ais_megatron.policy.hf_export import save_hf

    config = make_config(path, **layout)
    policy = make_policy(config, path)
    weights = {name: tensor.clone() for bucket in policy.export_buckets(30_000) for name, tensor in bucket}
    if out is not None:
        save_hf(policy.export_buckets(30_000), config.architecture, "fp32", out)
    return weights


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
    assert len(list(tmp_path.glob("*.safetensors"))) > 2, "the small bucket must have produced several shards"
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


def calibrated(rank: int, path: Path, **layout):
    policy = make_policy(make_config(path, **layout), path)
    rows, _ = my_rows(make_batch())
    _, first = policy.logprobs_and_calibration(rows)
    return torch.stack([first.scales.q_amax, first.scales.k_amax, first.scales.v_amax])


def reference_amax(path: Path, batch: Batch) -> Tensor:
    """Largest |Q|, |K|, |V| per layer over real tokens, caught at transformers' attention function."""
    from transformers import AutoModelForCausalLM
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa", dtype=torch.float32)
    original, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], {}

    def record(module, query, key, value, *args, **kwargs):  # noqa: ANN001, ANN202
        real = (torch.arange(query.shape[2]) < batch.lengths[:, None])[:, None, :, None]
        seen[module.layer_idx] = torch.stack([(x.abs() * real).amax() for x in (query, key, value)])
        return original(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = record
    try:
        with torch.no_grad():
            model(batch.tokens)
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original
    return torch.stack([seen[layer] for layer in sorted(seen)], dim=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_calibration_sees_global_ranges_of_real_tokens(ranks: RankPool, untied_checkpoint: Path, layout: str) -> None:
    world, tp, pp, sp = LAYOUTS[layout]
    expected = reference_amax(untied_checkpoint, make_batch())
    for amax in ranks.run(world, calibrated, path=untied_checkpoint, tp=tp, pp=pp, sp=sp):
        torch.testing.assert_close(amax, expected, rtol=1e-4, atol=1e-5)
