"""A model's config.json: transformers' names are ours, so an `Architecture` needs little added to become one."""

from __future__ import annotations

from ais_megatron.config import Architecture

CLASS_NAMES = {"qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM"}

MOE_KEYS = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}


def hf_config(architecture: Architecture, dtype: str, eos_id: int | None = None, pad_id: int | None = None) -> dict[str, object]:
    """The content of config.json; `rope_parameters` is where transformers 5 looks for rope_theta.

    Args:
        dtype: "bf16" or "fp32", of the weights.
    """
    return {
        **architecture.model_dump(exclude=None if architecture.is_moe else MOE_KEYS),
        **({"decoder_sparse_step": 1, "mlp_only_layers": []} if architecture.is_moe else {}),
        "architectures": [CLASS_NAMES[architecture.model_type]],
        "rope_parameters": {"rope_type": "default", "rope_theta": architecture.rope_theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype],
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }
