"""Qwen3-MoE: Qwen3's attention, and experts in every layer."""

from __future__ import annotations

from ais_megatron.models.family import Family
from ais_megatron.models.pieces import ATTENTION_OUTPUT, EXPERT_NORM, EXPERTS, INPUT_NORM, QK_NORMS, QKV, ROUTER

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    hf_class="Qwen3MoeForCausalLM",
    layer=(INPUT_NORM, *QKV, *QK_NORMS, ATTENTION_OUTPUT, EXPERT_NORM, ROUTER),
    experts=EXPERTS,
    sglang_attention="sglang.srt.models.qwen3_moe.Qwen3MoeAttention",
    qk_norm=True,
    rope_theta=1_000_000.0,
    # A model with both dense and sparse layers would need a table for each kind.
    fixed={"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False, "decoder_sparse_step": 1, "mlp_only_layers": []},
    sglang_keeps_tied_head=True,
)
