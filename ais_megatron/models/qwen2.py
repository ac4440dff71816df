"""Qwen2 and Qwen2.5, dense: biases on Q, K and V, no norms on Q and K."""

from __future__ import annotations

from ais_megatron.models.family import Family
from ais_megatron.models.pieces import ATTENTION_OUTPUT, INPUT_NORM, MLP, MLP_NORM, QKV, QKV_BIAS

QWEN2 = Family(
    model_type="qwen2",
    hf_class="Qwen2ForCausalLM",
    layer=(INPUT_NORM, *QKV, *QKV_BIAS, ATTENTION_OUTPUT, MLP_NORM, *MLP),
    sglang_attention="sglang.srt.models.qwen2.Qwen2Attention",
    qkv_bias=True,
    fixed={"hidden_act": "silu", "use_sliding_window": False},
    takes_mask_by_kind=True,
)
