"""A model's config.json, read and written. transformers' names are ours, so an `Architecture` needs little added to become one."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from ais_megatron.config.architecture import Architecture
from ais_megatron.config.errors import ConfigError, explain

SUPPORTED_MODEL_TYPES = ("qwen3", "qwen3_moe")
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


def read_architecture(folder: str | Path) -> Architecture:
    """The `Architecture` in a Hugging Face checkpoint folder's ``config.json``; `ConfigError` if it is missing or another model's."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"model.path={folder}: there is no {path.name} in it; give the folder of a Hugging Face checkpoint")
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"model.path={folder}: {path} is not valid JSON ({error})") from error
    if raw.get("model_type") not in SUPPORTED_MODEL_TYPES:
        raise ConfigError(
            f"model.path={folder}: model_type={raw.get('model_type')!r} is not supported; allowed: {', '.join(SUPPORTED_MODEL_TYPES)}"
        )
    rope = raw.get("rope_parameters") or {}
    raw.setdefault("rope_theta", rope.get("rope_theta", 1_000_000.0))
    if rope.get("rope_type", "default") != "default" or raw.get("rope_scaling"):
        raise ConfigError(f"model.path={folder}: scaled RoPE ({rope or raw['rope_scaling']}) is not supported; allowed: default")
    raw.setdefault("num_experts", raw.get("num_local_experts", 0))  # how transformers 5 writes it
    if raw["model_type"] == "qwen3_moe" and (raw.get("mlp_only_layers") or raw.get("decoder_sparse_step", 1) != 1):
        raise ConfigError(f"model.path={folder}: a MoE model with dense layers among its sparse ones is not supported")
    try:
        return Architecture(**{k: v for k, v in raw.items() if k in Architecture.model_fields})
    except ValidationError as error:
        raise ConfigError(f"model.path={folder}: {path} does not describe a Qwen3 model\n" + explain(error, Architecture)) from error
