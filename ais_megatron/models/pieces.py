"""Rows of tables that several families share."""

from __future__ import annotations

from ais_megatron.models.family import Weight

INPUT_NORM = Weight(
    "input_layernorm.weight", ("hidden_size",), None, "input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"
)
QKV = (
    Weight("self_attn.q_proj.weight", ("query_size", "hidden_size"), 0, "self_attention.linear_qkv.weight", quantized=True),
    Weight("self_attn.k_proj.weight", ("kv_size", "hidden_size"), 0, "self_attention.linear_qkv.weight", quantized=True),
    Weight("self_attn.v_proj.weight", ("kv_size", "hidden_size"), 0, "self_attention.linear_qkv.weight", quantized=True),
)
QKV_BIAS = (
    Weight("self_attn.q_proj.bias", ("query_size",), 0, "self_attention.linear_qkv.bias"),
    Weight("self_attn.k_proj.bias", ("kv_size",), 0, "self_attention.linear_qkv.bias"),
    Weight("self_attn.v_proj.bias", ("kv_size",), 0, "self_attention.linear_qkv.bias"),
)
QK_NORMS = (
    Weight("self_attn.q_norm.weight", ("head_dim",), None, "self_attention.q_layernorm.weight"),
    Weight("self_attn.k_norm.weight", ("head_dim",), None, "self_attention.k_layernorm.weight"),
)
ATTENTION_OUTPUT = Weight("self_attn.o_proj.weight", ("hidden_size", "query_size"), 1, "self_attention.linear_proj.weight", quantized=True)
MLP_NORM = Weight("post_attention_layernorm.weight", ("hidden_size",), None, "pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
MLP = (
    Weight("mlp.gate_proj.weight", ("intermediate_size", "hidden_size"), 0, "mlp.linear_fc1.weight", quantized=True),
    Weight("mlp.up_proj.weight", ("intermediate_size", "hidden_size"), 0, "mlp.linear_fc1.weight", quantized=True),
    Weight("mlp.down_proj.weight", ("hidden_size", "intermediate_size"), 1, "mlp.linear_fc2.weight", quantized=True),
)
EXPERT_NORM = Weight("post_attention_layernorm.weight", ("hidden_size",), None, "pre_mlp_layernorm.weight")  # the router reads it too
ROUTER = Weight("mlp.gate.weight", ("num_experts", "hidden_size"), None, "mlp.router.weight")


def _of_expert(name: str, shape: tuple[str, str], tp_dim: int, linear: str) -> Weight:
    return Weight(
        f"mlp.experts.{{expert}}.{name}.weight",
        shape,
        tp_dim,
        f"mlp.experts.local_experts.{{slot}}.{linear}.weight",
        f"mlp.experts.{linear}.weight{{slot}}",  # Transformer Engine multiplies all experts of a rank in one grouped product
        quantized=True,
    )


EXPERTS = (
    _of_expert("gate_proj", ("moe_intermediate_size", "hidden_size"), 0, "linear_fc1"),
    _of_expert("up_proj", ("moe_intermediate_size", "hidden_size"), 0, "linear_fc1"),
    _of_expert("down_proj", ("hidden_size", "moe_intermediate_size"), 1, "linear_fc2"),
)
