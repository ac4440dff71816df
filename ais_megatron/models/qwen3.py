"""Qwen3, dense: norms on Q and K, no biases."""

from __future__ import annotations

from ais_megatron.models.family import Family
from ais_megatron.models.pieces import ATTENTION_OUTPUT, INPUT_NORM, MLP, MLP_NORM, QK_NORMS, QKV

QWEN3 = Family(
    model_type="qwen3",
    hf_class="Qwen3ForCausalLM",
    layer=(INPUT_NORM, *QKV, *QK_NORMS, ATTENTION_OUTPUT, MLP_NORM, *MLP),
    sglang_attention="sglang.srt.models.qwen3.Qwen3Attention",
    qk_norm=True,
    rope_theta=1_000_000.0,
    fixed={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    takes_mask_by_kind=True,
)
