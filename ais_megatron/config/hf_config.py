"""Reads and writes a model's config.json. An `Architecture` uses the same names as transformers, so little is converted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ais_megatron.config.architecture import LINEAR_KEYS, Architecture
from ais_megatron.config.errors import ConfigError, explain
from ais_megatron.models.family import Family
from ais_megatron.models.registry import FAMILIES, family_of

MOE_KEYS = {"num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"}
RECURRENT_KEYS = {*LINEAR_KEYS, "full_attention_interval"}
LLAMA3_KEYS = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rope_parameters(architecture: Architecture) -> dict[str, object]:
    """The ``rope_parameters`` of config.json, as transformers 5 writes them."""
    scaling = architecture.rope_scaling
    kind = {"rope_type": "default"} if scaling is None else {"rope_type": "llama3", **scaling.model_dump()}
    rope = {**kind, "rope_theta": architecture.rope_theta}
    if architecture.family.partial_rotary_factor == 1.0:
        return rope
    # A model that sees images gives shares of the frequencies to time, height and width. For text the three positions are the same.
    pairs = int(architecture.head_dim * architecture.partial_rotary_factor) // 2
    sections = [(pairs + 2) // 3, (pairs + 1) // 3, pairs // 3]
    return {**rope, "partial_rotary_factor": architecture.partial_rotary_factor, "mrope_section": sections, "mrope_interleaved": True}


def layer_types(architecture: Architecture) -> dict[str, object]:
    """The ``layer_types`` of config.json; nothing if all layers are alike. (SGLang reads `full_attention_interval` instead.)"""
    if not architecture.family.is_recurrent:
        return {}
    layers = range(architecture.num_hidden_layers)
    return {"layer_types": ["linear_attention" if architecture.is_recurrent(layer) else "full_attention" for layer in layers]}


def hf_config(architecture: Architecture, dtype: str, eos_ids: Sequence[int] = (), pad_id: int | None = None) -> dict[str, object]:
    """The content of config.json.

    Args:
        dtype: "bf16" or "fp32", the precision of the weights.
        eos_ids: the tokens that end a response, or none.
        pad_id: the tokenizer's, or None.
    """
    family = architecture.family
    unused = (set() if family.is_moe else MOE_KEYS) | (set() if family.is_recurrent else RECURRENT_KEYS)
    unused |= {"rope_scaling", "partial_rotary_factor"} | (set() if family.is_diffusion else {"mask_token_id"})
    sizes = {family.config_names.get(key, key): value for key, value in architecture.model_dump(exclude=unused).items()}
    return {
        **sizes,
        **layer_types(architecture),
        **family.fixed,
        "model_type": family.text_model_type or family.model_type,
        "architectures": [family.hf_class],
        "rope_parameters": rope_parameters(architecture),
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[dtype],
        **generation_config(eos_ids, pad_id),
    }


def fp8_config(block: int, architecture: Architecture) -> dict[str, object]:
    """The ``quantization_config`` of a checkpoint with E4M3 weights in blocks of `block` rows and columns, and inputs that are quantised at
    each call. transformers and SGLang both read it."""
    config: dict[str, object] = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    left_out = _unquantised_projections(architecture)
    return config | {"weight_block_size": [block, block]} | ({"modules_to_not_convert": left_out} if left_out else {})


def int4_config(group: int, architecture: Architecture) -> dict[str, object]:
    """The ``quantization_config`` of a checkpoint with packed INT4 weights, one scale per row and `group` columns. Inputs keep the model's
    dtype. The library compressed-tensors defines it."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group, "dynamic": False}
    routers = [f"{architecture.family.layers}{layer}.mlp.gate" for layer in range(architecture.num_hidden_layers) if architecture.is_moe]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head", *routers, *_unquantised_projections(architecture)],
    }


def _unquantised_projections(architecture: Architecture) -> list[str]:
    """Names of the linear layers of recurrent attention that no engine quantises."""
    return [
        f"{architecture.family.layers}{layer}.{weight.name.removesuffix('.weight')}"
        for layer in range(architecture.num_hidden_layers)
        if architecture.is_recurrent(layer)
        for weight in architecture.family.recurrent_layer
        if len(weight.shape) == 2 and not weight.quantized
    ]


def generation_config(eos_ids: Sequence[int], pad_id: int | None) -> dict[str, object]:
    """The content of generation_config.json. One end-of-sequence token is a number there, and several are a list."""
    return {"eos_token_id": list(eos_ids) if len(eos_ids) > 1 else next(iter(eos_ids), None), "pad_token_id": pad_id}


def read_eos_ids(*folders: str | Path | None) -> list[int]:
    """The tokens that end a response: ``eos_token_id`` of the first generation_config.json in `folders`, or of the first config.json if
    there is none, as in transformers. Empty if there is neither.

    Raises:
        ValueError: the file is not valid JSON, or its ``eos_token_id`` is neither an integer nor a list of integers.
    """
    places = [Path(folder) / name for name in ("generation_config.json", "config.json") for folder in folders if folder is not None]
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        return []
    try:
        raw = json.loads(path.read_text())
        found = raw.get("eos_token_id", (raw.get("text_config") or {}).get("eos_token_id"))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a valid JSON object ({error})") from error
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if any(type(i) is not int or i < 0 for i in ids):
        raise ValueError(f"{path}: eos_token_id={found!r} must be a token id, or a list of them")
    return ids


def read_architecture(folder: str | Path) -> Architecture:
    """The `Architecture` in the ``config.json`` of a Hugging Face checkpoint folder.

    Raises:
        ConfigError: the file is missing or not JSON, or the model's family or variant is not supported.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ConfigError(f"model.path={folder}: there is no {path.name} in it; give the folder of a Hugging Face checkpoint")
    try:
        raw = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"model.path={folder}: {path} is not valid JSON ({error})") from error
    family = family_of(raw.get("model_type"))
    if family is None:
        raise ConfigError(f"model.path={folder}: model_type={raw.get('model_type')!r} is not supported; allowed: {', '.join(FAMILIES)}")
    if family.text_model_type is not None:
        raw = raw | (raw.get("text_config") or {})  # beside which there may be a vision tower
    raw["model_type"] = family.model_type
    raw |= _layer_kinds(raw, family, folder)
    for key, value in family.fixed.items():
        if key in raw and raw[key] != value and not (raw[key] is None and not value):
            raise ConfigError(f"model.path={folder}: {key}={raw[key]!r} in its config.json is not supported; allowed: {value!r}")
    raw |= {ours: raw[theirs] for ours, theirs in family.config_names.items() if raw.get(theirs) is not None}
    raw |= _rope(raw, family, folder)
    raw.setdefault("num_experts", raw.get("num_local_experts", 0))  # how transformers 5 writes it
    raw.setdefault("num_key_value_heads", raw.get("num_attention_heads"))
    if raw.get("head_dim") is None and "hidden_size" in raw and raw.get("num_attention_heads"):
        raw["head_dim"] = raw["hidden_size"] // raw["num_attention_heads"]
    try:
        return Architecture(**{key: value for key, value in raw.items() if key in Architecture.model_fields})
    except ValidationError as error:
        raise ConfigError(
            f"model.path={folder}: {path} does not describe a {family.model_type} model\n" + explain(error, Architecture)
        ) from error


def _rope(raw: dict[str, Any], family: Family, folder: str | Path) -> dict[str, object]:
    """`rope_theta` and `rope_scaling`. transformers 5 writes both into ``rope_parameters``, earlier versions write two keys."""
    rope = (raw.get("rope_scaling") or {}) | (raw.get("rope_parameters") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in family.rope_types:
        allowed = ", ".join(family.rope_types)
        raise ConfigError(f"model.path={folder}: scaled RoPE ({rope}) is not supported for {family.model_type}; allowed: {allowed}")
    scaling = {key: rope[key] for key in LLAMA3_KEYS if key in rope} if kind == "llama3" else None
    found: dict[str, object] = {
        "rope_theta": raw.get("rope_theta", rope.get("rope_theta", family.rope_theta)),
        "rope_scaling": scaling,
    }
    if family.partial_rotary_factor != 1.0:
        found["partial_rotary_factor"] = raw.get("partial_rotary_factor", rope.get("partial_rotary_factor", family.partial_rotary_factor))
    return found


def _layer_kinds(raw: dict[str, Any], family: Family, folder: str | Path) -> dict[str, object]:
    """`full_attention_interval`, which transformers 5 drops in favour of a list of all layers' kinds."""
    kinds = raw.get("layer_types")
    if not family.is_recurrent or not kinds:
        return {"full_attention_interval": 4} if family.is_recurrent and "full_attention_interval" not in raw else {}
    interval = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
    regular = ["full_attention" if interval and number % interval == 0 else "linear_attention" for number in range(1, len(kinds) + 1)]
    if not interval or kinds != regular or len(kinds) != raw.get("num_hidden_layers"):
        raise ConfigError(
            f"model.path={folder}: layer_types={kinds} in its config.json is not supported; allowed: one kind for each of the "
            f"{raw.get('num_hidden_layers')} layers, full_attention at regular intervals and linear_attention elsewhere"
        )
    return {"full_attention_interval": interval}
