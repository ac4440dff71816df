"""LLaDA, a masked diffusion model: a Llama layer whose attention sees both directions, with names of its own for weights and settings.

Source: arXiv 2502.09992, and the configuration of GSAI-ML/LLaDA-8B-Instruct. transformers has no class for it. Llama's model computes the
same, without the causal mask.
"""

from __future__ import annotations

from ais_megatron.models.family import EMBEDDING, FINAL_NORM, HEAD, Family
from ais_megatron.models.llama import LLAMA

_NAMES = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "q_proj.weight",
    "self_attn.k_proj.weight": "k_proj.weight",
    "self_attn.v_proj.weight": "v_proj.weight",
    "self_attn.o_proj.weight": "attn_out.weight",
    "post_attention_layernorm.weight": "ff_norm.weight",
    "mlp.gate_proj.weight": "ff_proj.weight",
    "mlp.up_proj.weight": "up_proj.weight",
    "mlp.down_proj.weight": "ff_out.weight",
}

LLADA = Family(
    model_type="llada",
    hf_class="LLaDAModelLM",
    layer=tuple(row._replace(name=_NAMES[row.name]) for row in LLAMA.layer),
    sglang_attention=None,
    layers="model.transformer.blocks.",
    embedding=EMBEDDING._replace(name="model.transformer.wte.weight"),
    final_norm=FINAL_NORM._replace(name="model.transformer.ln_f.weight"),
    head=HEAD._replace(name="model.transformer.ff_out.weight"),
    rope_theta=10_000.0,
    config_names={
        "hidden_size": "d_model",
        "intermediate_size": "mlp_hidden_size",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_sequence_length",
        "tie_word_embeddings": "weight_tying",
        "initializer_range": "init_std",
    },
    fixed={
        "activation_type": "silu",
        "alibi": False,
        "attention_layer_norm": False,
        "block_type": "llama",
        "include_bias": False,
        "include_qkv_bias": False,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "rope": True,
        "scale_logits": False,
        "weight_tying": False,
    },
    twin=LLAMA,
    is_diffusion=True,
)
