"""Arms as combinations of basic gradients, and the whole benchmark on a model of a few thousand parameters."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml

from ais_megatron.algorithm.ais import AISState, product_coefficient
from ais_megatron.algorithm.correction import Correction
from ais_megatron.algorithm.diagnostics import diagnose
from ais_megatron.algorithm.gradients import SCORE_COLUMNS, STATE_COLUMNS, ResponseGradients
from ais_megatron.algorithm.measured import limits
from ais_megatron.config import ConfigError, build_config, load_config
from tests.helpers.paths import ROOT
from tests.helpers.runs import small, write


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gradient_arms")


@pytest.fixture
def config(tmp_path):
    data = small(tmp_path)
    data["rollout"] |= {"quantization": "fp8_e4m3"}
    return build_config(data | {"ais": {"tau": 0.05}})


@pytest.fixture
def batches(module, config):
    torch.manual_seed(0)

    def seen(rollout):
        old, advantages, mask = rollout + 0.3 * torch.randn_like(rollout), torch.randn(4), torch.ones(4, 6, dtype=torch.bool)
        gradients = ResponseGradients(limits(config), 4, 2, mean_of_responses=False)
        gradients.add(torch.arange(4), torch.randn(SCORE_COLUMNS + STATE_COLUMNS, 4, 6), old, rollout, advantages, mask)
        return module.Seen(old, rollout, advantages, mask, gradients.sums())

    return [seen(rollout) for rollout in -torch.rand(3, 4, 6)]


def test_the_arms_need_few_gradients(module, config):
    vectors = module.basis(config, module.possible_arms(config, False)[0].values())
    caps = [v.correction.weight_cap for v in vectors if v.quantised and v.correction.name == "tis" and v.correction.level == "token"]
    assert sorted(caps) == config.ais.caps
    bands = {(v.correction.low, v.correction.high) for v in vectors if v.correction.name == "mis"}
    assert bands >= {tuple(band) for band in config.ais.bands} and len(caps) == len(set(caps))
    assert len(vectors) == len(caps) + len(bands) + len(["bf16 rollouts", "none", "geometric", "sequence"])
    for changes in module.ARMS.values():
        assert module.basic_gradient(module.changed(config, changes)) in vectors


def test_alpha_mixes_by_batch(module, config, batches):
    vectors = module.basis(config, module.possible_arms(config, False)[0].values())
    config = module.changed(config, {"ais": {"coefficient": "product"}})
    found = module.mixture(config, vectors, batches)
    full = module.basic_gradient(config)
    for row, alpha, seen in zip(found.coefficients, found.alphas, batches, strict=True):
        assert alpha == product_coefficient(diagnose(*seen[:4], Correction.of(config)), config.ais) and 0.0 < alpha < 1.0
        assert row[vectors.index(full)] == alpha and row[vectors.index(full.uncorrected)] == 1.0 - alpha
        assert row.count_nonzero() == 2
    assert found.limits == ["2"] * 3


def test_a_mixture_is_the_gradient_that_training_takes(module, config, batches):
    """If tokens' gradients are unit vectors, an arm's gradient is the factors of its loss scaler."""
    changes = [*module.ARMS.values(), {"correction": "ais", "correction_options": {"batch_normalise": True}}]
    vectors = module.basis(config, [module.changed(config, change) for change in changes])
    for change in changes:
        arm = module.changed(config, change)
        found, state = module.mixture(arm, vectors, batches), AISState()
        for row, seen in zip(found.coefficients, batches, strict=True):
            log_ratio = seen.old_logprobs - seen.rollout_logprobs
            basic = torch.stack([v.correction.weights(log_ratio, seen.loss_mask) for v in vectors])
            scaler, _, state = module.choose(arm, seen, state)
            wanted = scaler.factors(seen.old_logprobs, seen.rollout_logprobs, seen.loss_mask).policy
            torch.testing.assert_close(torch.einsum("k,kbs->bs", row.float(), basic), wanted)


@pytest.fixture
def llada(tmp_path):
    """A run of a masked diffusion model, a configuration file with its data."""
    data = small(tmp_path)
    data["model"]["architecture"] |= {"model_type": "llada", "vocab_size": 40, "mask_token_id": 39}
    data["rollout"] |= {"quantization": "fp8_e4m3", "max_response_tokens": 18}
    data["diffusion"] = {"block_length": 6, "steps": 6, "likelihood": "trajectory", "states": 2}
    (tmp_path / "llada.yaml").write_text(yaml.safe_dump(data))
    return tmp_path / "llada.yaml"


def test_arms_that_cannot_be_had_are_left_out_with_the_reason(module, llada):
    config = load_config(llada)
    arms, refused = module.possible_arms(config, with_aligned=False)
    assert (
        refused.keys() == {"tis, geometric", "tis, sequence", "ais, product, sequence"}
        and arms.keys() == module.ARMS.keys() - refused.keys()
    )
    assert all(why.startswith("diffusion.likelihood=trajectory: scores only some tokens") for why in refused.values())
    assert arms["bf16 rollouts"].rollout.kv_cache == "none" and arms["ais"].measures_gradients
    with pytest.raises(ConfigError, match="--trainer aligned: policy.forward_precision=fp8_aligned: not supported for model_type=llada"):
        module.possible_arms(config, with_aligned=True)


def test_a_reference_hidden_by_noise_is_said(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    error = importlib.import_module("gradient_error")
    alike, generator = torch.ones(8, 1, 6, dtype=torch.float64), torch.Generator().manual_seed(0)
    noise = torch.randn(8, 1, 6, generator=generator, dtype=torch.float64)
    target = SimpleNamespace(mixture=SimpleNamespace(coefficients=torch.ones(8, 1, dtype=torch.float64)))
    said = [
        error.hidden_by_noise(SimpleNamespace(gram=torch.einsum("bks,cls->bkcl", x, x)), target)
        for x in (alike + 0.1 * noise, 0.1 * alike + noise)
    ]
    assert said[0] is None and "noise hides the reference's gradient" in said[1] and "raise --batches" in said[1]


def test_a_cap_without_a_gradient_is_named(module, config, batches):
    vectors = module.basis(config, module.possible_arms(config, False)[0].values())
    with pytest.raises(KeyError, match="weight_cap=7.0.*ais.caps"):
        module.mixture(module.changed(config, {"ais": {"coefficient": "product", "weight_cap": 7.0}}), vectors, batches)


@pytest.mark.slow
def test_the_whole_benchmark_and_its_saved_record(tmp_path):
    rollout = {"prompts_per_step": 4, "group_size": 4, "max_response_tokens": 12, "quantization": "fp4_e2m1"}
    config = write(tmp_path, rollout=rollout)

    def figures(*options):
        out = tmp_path / "figures.json"
        command = [sys.executable, ROOT / "benchmarks" / "gradient_error.py", *options, "--json", out]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=540)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(out.read_text())

    record = tmp_path / "record.pt"
    measured = figures(config, "--batches", "4", "--trainer", "aligned", "--save", record, "--horizon", "30", "inf")
    assert figures("--from", record, "--horizon", "30", "inf") == measured
    assert measured["arms"]["bf16 rollouts"]["norm"] == 1.0 and measured["arms"]["bf16 rollouts"]["bias"] == 0.0
    against_aligned = figures("--from", record, "--reference", "aligned, tis")
    assert against_aligned["arms"]["aligned, tis"]["bias"] == 0.0
    judged = figures("--from", record, "--horizon", "30", "--against", "mis")["arms"]["mis"]["horizons"]["30"]
    assert judged["against"] == "mis" and judged["difference"] == [0.0, 0.0]


@pytest.mark.slow
def test_the_whole_benchmark_of_a_diffusion_model(llada):
    command = [sys.executable, ROOT / "benchmarks" / "gradient_error.py", llada, "--batches", "3"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "left out: tis, sequence: diffusion.likelihood=trajectory: scores only some tokens" in done.stdout
    assert "\nais " in done.stdout and "right answers:" in done.stdout
