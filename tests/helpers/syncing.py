"""What ranks do to show that policy and embedded engine agree."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from ais_megatron.algorithm.ais import product_coefficient
from ais_megatron.algorithm.correction import Correction
from ais_megatron.algorithm.diagnostics import diagnose
from ais_megatron.algorithm.scaler import LossScaler
from ais_megatron.batch import Prompt, assemble
from ais_megatron.config import AISConfig
from ais_megatron.quantization.kv_scales import kv_scale_name
from tests.helpers.policies import make_batch, make_config, make_policy, moe_config, my_rows

PROMPTS = [Prompt(i, "", tuple(range(3 + i, 3 + i + length)), {}) for i, length in enumerate((4, 9, 1))]


def make_engine(config, dtype: torch.dtype):  # noqa: ANN001, ANN201
    from ais_megatron.rollout.local.engine import LocalEngine

    return LocalEngine(config.architecture, config.rollout, eos_ids=(1,), pad_id=0, device="cpu", dtype=dtype)


def pushed_state(  # noqa: ANN201
    rank: int, path: Path, quantization: str, parallel: dict[str, object] | None = None, layers: Iterable[int] = range(4), **layout
):
    from ais_megatron.weight_sync import WeightSync

    rollout = {"quantization": quantization, "sync_bucket_mb": 0.02, "max_response_tokens": 20}
    config = moe_config(path, parallel, dtype="bf16") if parallel else make_config(path, dtype="bf16", **layout)
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update=rollout)})
    policy, engine = make_policy(config, path), make_engine(config, torch.bfloat16)
    calibration = policy.calibrate(my_rows(make_batch())[0])
    WeightSync(policy, engine, config.rollout).push(calibration.scales, version=5)
    assert engine.version == 5
    scales = {kv_scale_name(layer, kind): getattr(calibration.scales, f"{kind}_scale")[layer] for layer in layers for kind in "kv"}
    return {name: tensor.clone() for name, tensor in engine.state_tensors().items()}, scales if quantization != "none" else {}


def agreement(rank: int, path: Path) -> None:
    """float32 without FP8: engine and trainer are the same policy, so AIS must leave every token's weight at exactly 1."""
    from ais_megatron.rollout.engine import SamplingParams
    from ais_megatron.weight_sync import WeightSync

    config = make_config(path)
    config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"quantization": "none"})})
    policy, engine = make_policy(config, path), make_engine(config, torch.float32)
    WeightSync(policy, engine, config.rollout).push(None, version=0)
    sampling = SamplingParams(num_samples=4, max_tokens=20, temperature=config.rollout.temperature)
    rollouts = engine.generate(PROMPTS, sampling)
    batch = assemble(rollouts, torch.zeros(12), torch.linspace(-1, 1, 12))
    old_logprobs = policy.logprobs(batch)
    assert ((old_logprobs - batch.rollout_logprobs) * batch.loss_mask).abs().max() < 1e-5
    diagnostics = diagnose(old_logprobs, batch.rollout_logprobs, batch.advantages, batch.loss_mask, Correction())
    alpha = product_coefficient(diagnostics, AISConfig())
    assert 0.0 <= alpha < 1e-6
    weights = LossScaler(alpha, "token").factors(old_logprobs, batch.rollout_logprobs, batch.loss_mask).policy
    assert torch.equal(weights, batch.loss_mask.float())
