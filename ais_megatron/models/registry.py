"""All supported model families. A new one is a table in a new file of this folder, and a line here (docs/extending.md)."""

from __future__ import annotations

import re

from ais_megatron.models.family import Family
from ais_megatron.models.llada import LLADA
from ais_megatron.models.llama import LLAMA
from ais_megatron.models.qwen2 import QWEN2
from ais_megatron.models.qwen3 import QWEN3
from ais_megatron.models.qwen3_5 import QWEN3_5
from ais_megatron.models.qwen3_moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {family.model_type: family for family in (QWEN3, QWEN3_5, QWEN3_MOE, QWEN2, LLAMA, LLADA)}

_LAYER = re.compile(r"(.*?\.)\d+\.")
_EXPERT = re.compile(r"(?<=\.experts\.)\d+")


def family_of(model_type: str | None) -> Family | None:
    """The family with this ``model_type`` in config.json, of a whole model or of the language model in it. None: not supported."""
    texts = {family.text_model_type: family for family in FAMILIES.values() if family.text_model_type is not None}
    return None if model_type is None else FAMILIES.get(model_type, texts.get(model_type))


def is_quantized_weight(hf_name: str) -> bool:
    """Whether FP8 and FP4 rollouts quantise the tensor with this Hugging Face name, in any family.

    Whole names are compared, so a router (``mlp.gate.weight``), a norm, a bias, an embedding or a head never matches by accident.
    """
    in_layer = _LAYER.match(hf_name)
    if in_layer is None:
        return False
    name = _EXPERT.sub("{expert}", hf_name[in_layer.end() :])
    return any(in_layer[1] == family.layers and name in family.quantized for family in FAMILIES.values())
