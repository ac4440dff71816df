"""Policies on the ranks of a pool, their layouts, a batch for them, and what transformers computes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ais_megatron.batch import Batch
from ais_megatron.config import Config, OptimizerConfig, build_config

TEMPERATURE = 1.3
# (ranks, tp, pp, sequence_parallel); what is left of the ranks is data parallel
LAYOUTS = {
    "TP1": (1, 1, 1, False),
    "DP2": (2, 1, 1, False),
    "TP2": (2, 2, 1, False),
    "TP2+SP": (2, 2, 1, True),
    "PP2": (2, 1, 2, False),
    "TP2xPP2": (4, 2, 2, False),
}


def make_config(
    path: Path, tp: int = 1, pp: int = 1, sp: bool = False, cp: int = 1, dtype: str = "fp32", budget: int = 10_000, **sections
) -> Config:
    return build_config(
        {
            "model": {"path": str(path), "dtype": dtype, **sections.pop("model", {})},
            "parallel": {"tp": tp, "pp": pp, "cp": cp, "sequence_parallel": sp},
            "rollout": {"max_response_tokens": 20, "temperature": TEMPERATURE, **sections.pop("rollout", {})},
            "train": {"tokens_per_microbatch": budget, "logprob_chunk_tokens": 7, **sections.pop("train", {})},
            **sections,
        }
    )


def make_batch() -> Batch:
    """Six rows of different lengths; rollout_logprobs are filled in by the tests."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([17, 9, 12, 17, 5, 14])
    columns = torch.arange(17)
    real = columns < lengths[:, None]
    tokens = torch.randint(0, 71, (6, 17), generator=generator) * real
    return Batch(
        tokens=tokens,
        loss_mask=real & (columns >= 3),
        lengths=lengths,
        rollout_logprobs=torch.zeros(6, 17),
        advantages=torch.randn(6, generator=generator),
        rewards=torch.zeros(6),
    )


def make_policy(config: Config, path: Path, lr: float = 1e-3, temperature: float = TEMPERATURE):  # noqa: ANN201
    from ais_megatron.policy.parallel import initialize_parallel
    from ais_megatron.policy.policy import Policy

    initialize_parallel(config)
    return Policy(config, OptimizerConfig(lr=lr, warmup_steps=1), 10, temperature, str(path))


def my_rows(batch: Batch) -> tuple[Batch, Tensor]:
    """This data-parallel rank's rows, interleaved so that ranks get rows of different lengths."""
    import torch.distributed as dist

    from ais_megatron.policy.parallel import data_parallel_group

    group = data_parallel_group()
    index = torch.arange(dist.get_rank(group), len(batch), dist.get_world_size(group))
    return batch.rows(index), index


def reference_logprobs(path: Path, batch: Batch) -> Tensor:
    """transformers in float32, its own attention code; dense or MoE, as the checkpoint says."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", dtype=torch.float32)
    with torch.no_grad():
        logits = model(batch.tokens).logits.float() / TEMPERATURE
    result = torch.zeros(batch.tokens.shape)
    result[:, 1:] = logits.log_softmax(-1)[:, :-1].gather(2, batch.tokens[:, 1:, None]).squeeze(2)
    return result * batch.loss_mask


# ranks and what `parallel` gets; what is left of the ranks is data parallel
MOE_LAYOUTS = {
    "one": (1, {}),
    "EP2": (2, {"ep": 2}),
    "PP2": (2, {"pp": 2}),
    "TP2+EP2": (2, {"tp": 2, "sequence_parallel": True, "ep": 2}),
    "ETP2": (2, {"tp": 2, "sequence_parallel": True, "etp": 2}),
    "EP4": (4, {"ep": 4}),
    "TP2+ETP2+EP2": (4, {"tp": 2, "sequence_parallel": True, "etp": 2, "ep": 2}),
    "PP2+EP2": (4, {"pp": 2, "ep": 2}),
}


def moe_config(path: Path, parallel: dict[str, object], dtype: str = "fp32", budget: int = 10_000, **moe: object):  # noqa: ANN201
    config = make_config(path, dtype=dtype, budget=budget, moe=moe)
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})


def weights_of(policy) -> dict[str, torch.Tensor]:  # noqa: ANN001
    return {name: tensor.clone() for bucket in policy.export_buckets(20_000) for name, tensor in bucket}


def policy_logprobs(rank: int, path: Path, **layout) -> tuple[Tensor, Tensor]:
    policy = make_policy(make_config(path, **layout), path)
    rows, index = my_rows(make_batch())
    return policy.logprobs(rows) * rows.loss_mask, index


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


def exported(rank: int, path: Path, out: Path | None = None, **layout):
    from ais_megatron.policy.hf_export import save_hf

    config = make_config(path, **layout)
    policy = make_policy(config, path)
    weights = {name: tensor.clone() for bucket in policy.export_buckets(30_000) for name, tensor in bucket}
    if out is not None:
        save_hf(policy.export_buckets(30_000), config.architecture, "fp32", out, shard_bytes=30_000)
    return weights


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
