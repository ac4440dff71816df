"""Qwen3.5, dense, its language model alone: three layers with a gated delta rule, then one with gated attention, and so on.

Real checkpoints also have a vision tower (``model.visual.``) and a head for several tokens (``mtp.``), which are left aside.
"""

from __future__ import annotations

from ais_megatron.models.family import Family, Weight
from ais_megatron.models.pieces import ATTENTION_OUTPUT, INPUT_NORM, MLP, MLP_NORM, QK_NORMS, QKV

_SECTIONS = ("linear_key_size", "linear_key_size", "linear_value_size")  # Q, K and V of the gated delta rule
_IN, _GATES = "self_attention.in_proj.weight", "self_attention.in_proj_ba.weight"

GATED_DELTA_NET = (
    Weight("linear_attn.in_proj_qkv.weight", ("linear_qkv_size", "hidden_size"), 0, _IN, quantized=True, sections=_SECTIONS),
    Weight("linear_attn.in_proj_z.weight", ("linear_value_size", "hidden_size"), 0, _IN, quantized=True),
    # These two decide how much the state keeps and takes, one number for each head. They are small, and engines keep them in BF16.
    Weight("linear_attn.in_proj_b.weight", ("linear_num_value_heads", "hidden_size"), 0, _GATES),
    Weight("linear_attn.in_proj_a.weight", ("linear_num_value_heads", "hidden_size"), 0, _GATES),
    Weight(
        "linear_attn.conv1d.weight",
        ("linear_qkv_size", 1, "linear_conv_kernel_dim"),
        0,
        "self_attention.conv1d.weight",
        sections=_SECTIONS,
    ),
    Weight("linear_attn.dt_bias", ("linear_num_value_heads",), 0, "self_attention.dt_bias"),
    Weight("linear_attn.A_log", ("linear_num_value_heads",), 0, "self_attention.A_log"),
    Weight("linear_attn.norm.weight", ("linear_value_head_dim",), None, "self_attention.out_norm.weight"),
    Weight("linear_attn.out_proj.weight", ("hidden_size", "linear_value_size"), 1, "self_attention.out_proj.weight", quantized=True),
)

QWEN3_5 = Family(
    model_type="qwen3_5",
    text_model_type="qwen3_5_text",
    hf_class="Qwen3_5ForCausalLM",
    layer=(INPUT_NORM, QKV[0]._replace(shape=("gated_query_size", "hidden_size")), *QKV[1:], *QK_NORMS, ATTENTION_OUTPUT, MLP_NORM, *MLP),
    recurrent_layer=(INPUT_NORM._replace(transformer_engine=None), *GATED_DELTA_NET, MLP_NORM, *MLP),
    sglang_attention="sglang.srt.models.qwen3_5.Qwen3_5AttentionDecoderLayer",
    qk_norm=True,
    gated_attention=True,
    zero_centered_norms=True,
    rope_theta=10_000_000.0,
    partial_rotary_factor=0.25,
    fixed={"hidden_act": "silu", "attention_bias": False, "attn_output_gate": True},
    takes_mask_by_kind=True,
)
