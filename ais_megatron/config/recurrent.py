"""What models with a recurrent state can and cannot do."""

from __future__ import annotations

from ais_megatron.config.architecture import Architecture
from ais_megatron.config.policy import PolicyConfig
from ais_megatron.config.rollout import RolloutConfig
from ais_megatron.config.settings import ParallelConfig, TrainConfig

PRECISIONS = ("bf16", "fp8_aligned", "fp8_weights_aligned", "int4_aligned")
"""What `policy.forward_precision` can be."""


def recurrent_problems(
    arch: Architecture | None, parallel: ParallelConfig, train: TrainConfig, policy: PolicyConfig, rollout: RolloutConfig
) -> list[str]:
    """Layouts that would cut a head of a gated delta rule or a row, through which its state runs, and what does not work with it."""
    if arch is None or not arch.family.is_recurrent:
        return []
    family, problems = f"model_type={arch.model_type}", []
    for key in ("linear_num_key_heads", "linear_num_value_heads"):
        if getattr(arch, key) % parallel.tp:
            sizes = (arch.num_attention_heads, arch.num_key_value_heads, arch.linear_num_key_heads, arch.linear_num_value_heads)
            allowed = [n for n in range(1, min(sizes) + 1) if all(size % n == 0 for size in sizes)]
            size = f"model.architecture.{key}={getattr(arch, key)}"
            problems.append(f"parallel.tp={parallel.tp}: does not divide {size}; use one of {allowed}")
    if parallel.cp > 1:
        problems.append(
            f"parallel.cp={parallel.cp}: {family} has layers with a recurrent state, which runs through a whole row; set parallel.cp=1 "
            "(for long sequences raise parallel.tp with parallel.sequence_parallel=true, or parallel.pp)"
        )
    if train.packing:
        problems.append(
            f"train.packing=true: {family} has layers with a recurrent state, which would run from one row into the next; set it to false"
        )
    if policy.forward_precision not in PRECISIONS:
        problems.append(
            f"policy.forward_precision={policy.forward_precision}: not supported for {family}; set it to one of {', '.join(PRECISIONS)}"
        )
    if rollout.engine_traits.has_servers:
        problems += _server_problems(arch, rollout)
    if rollout.lora_sync == "adapter":
        problems.append(f"rollout.lora_sync=adapter: not supported for {family}; set it to merged")
    return problems


def _server_problems(arch: Architecture, rollout: RolloutConfig) -> list[str]:
    """Heads of a gated delta rule that SGLang's tensor parallelism would cut, and shards that are not whole blocks of FP8 weights."""
    tp, block, problems = rollout.sglang.tp, rollout.weight_block, []
    for key in ("linear_num_key_heads", "linear_num_value_heads"):
        if getattr(arch, key) % tp:
            problems.append(f"rollout.sglang.tp={tp}: does not divide model.architecture.{key}={getattr(arch, key)}")
    sizes = {"linear_num_key_heads * linear_key_head_dim": arch.linear_key_size}
    sizes["linear_num_value_heads * linear_value_head_dim"] = arch.linear_value_size
    for name, size in sizes.items():
        if not problems and rollout.quantization != "none" and size % (tp * block):
            problems.append(
                f"rollout.sglang.tp={tp}: the shards of block-FP8 weights must be multiples of rollout.weight_block={block}, but {name} is "
                f"{size}; lower rollout.sglang.tp or rollout.weight_block, or set rollout.quantization=none"
            )
    return problems
