"""Llama 2 and 3, SmolLM2 and other models with this architecture: no biases, no norms on Q and K, scaled RoPE from Llama 3.1 on."""

from __future__ import annotations

from ais_megatron.models.family import Family
from ais_megatron.models.pieces import ATTENTION_OUTPUT, INPUT_NORM, MLP, MLP_NORM, QKV

LLAMA = Family(
    model_type="llama",
    hf_class="LlamaForCausalLM",
    layer=(INPUT_NORM, *QKV, ATTENTION_OUTPUT, MLP_NORM, *MLP),
    sglang_attention="sglang.srt.models.llama.LlamaAttention",
    rope_types=("default", "llama3"),
    fixed={"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
)
