"""What Megatron builds the policy of: its configuration of a model and layout, and its specifications of the layers.

On CUDA with Transformer Engine these are Megatron's Transformer Engine layers. Otherwise they are Megatron's local layers with two
replacements: an `RMSNorm` that allows sequence parallelism, and `SDPAttention`. A layer of Qwen3.5 without attention has `GatedDeltaNet` in
its place, and the router of a MoE model is ours in both cases.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

from ais_megatron.cluster.cuda_environment import BLOCK_SCALES
from ais_megatron.config import Architecture, Config
from ais_megatron.config.architecture import LINEAR_KEYS
from ais_megatron.config.policy import BLOCK_SCALING
from ais_megatron.distributed import device
from ais_megatron.policy.attention import SDPAttention
from ais_megatron.policy.gated_delta_net import GatedDeltaNet, Projections
from ais_megatron.policy.norm import RMSNorm, ZeroCenteredRMSNorm
from ais_megatron.policy.routing import Router


def uses_transformer_engine(config: Config) -> bool:
    """Whether this job uses Transformer Engine's layers, from `model.transformer_impl` and the device.

    Raises:
        ValueError: they are requested but not available, or cannot compute in FP8 although `policy.forward_precision` asks for it.
    """
    wish, precision = config.model.transformer_impl, config.policy.forward_precision
    on_cuda, installed = device().type == "cuda", importlib.util.find_spec("transformer_engine") is not None
    missing = "Transformer Engine is not installed" if on_cuda else "this job runs on CPUs"
    if precision == "fp8_te" and (lacking := _lacking_of_fp8() if on_cuda and installed else missing):
        raise ValueError(
            f"policy.forward_precision=fp8_te: {lacking}; it needs Transformer Engine {BLOCK_SCALING[0]} on GPUs of compute capability "
            f"{BLOCK_SCALING[1]} with CUDA {BLOCK_SCALING[2]}, or newer ones; otherwise set it to bf16 or fp8_aligned"
        )
    if wish == "transformer_engine" and not (on_cuda and installed):
        raise ValueError(f"model.transformer_impl=transformer_engine: {missing}; set it to local or auto")
    return wish != "local" and on_cuda and installed and not config.policy.is_aligned


def _lacking_of_fp8() -> str | None:
    """Why Transformer Engine cannot use its blockwise recipe here, or None if it can."""
    from transformer_engine.common.recipe import Float8BlockScaling
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    possible, reason = FP8GlobalStateManager.is_fp8_block_scaling_available()
    if not possible:
        return str(reason)
    if Float8BlockScaling().fp8_quant_fwd_weight.power_2_scale:  # (read from the environment when Transformer Engine is imported)
        return f"scales are rounded to powers of two, unlike those of an FP8 engine; unset {BLOCK_SCALES}, or set it to 1"
    return None


def transformer_config_of(config: Config, transformer_engine: bool) -> TransformerConfig:
    """Megatron's configuration of the architecture and layout."""
    architecture, parallel = config.architecture, config.parallel
    dtype = torch.bfloat16 if config.model.dtype == "bf16" else torch.float32
    recompute = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    return TransformerConfig(
        num_layers=architecture.num_hidden_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.intermediate_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_key_value_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_norm_eps,
        qk_layernorm=architecture.family.qk_norm,
        add_qkv_bias=architecture.family.qkv_bias,
        attention_output_gate=architecture.family.gated_attention,
        layernorm_zero_centered_gamma=architecture.family.zero_centered_norms,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,  # Megatron's defaults are 0.1, but with dropout the policy would differ at every call
        attention_dropout=0.0,
        init_method_std=architecture.initializer_range,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        context_parallel_size=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        calculate_per_token_loss=True,
        variable_seq_lengths=True,  # microbatches differ in length; Megatron then requires alltoall, even for dense models
        moe_token_dispatcher_type="alltoall",
        use_cpu_initialization=device().type == "cpu",
        **_fusions(config, transformer_engine),
        **(dict(fp8="e4m3", fp8_recipe="blockwise") if config.policy.forward_precision == "fp8_te" else {}),
        **(recompute if config.model.recompute == "full" else {}),
        **(_moe_options(config, transformer_engine) if architecture.is_moe else {}),
        **(_recurrent_options(architecture) if architecture.family.is_recurrent else {}),
    )


def _fusions(config: Config, transformer_engine: bool) -> dict[str, bool]:
    """Fused kernels that are available, see `doctor`.

    gradient_accumulation_fusion needs NVIDIA Apex. Transformer Engine's layers do the same without Apex
    (`_accumulate_gradients_in_place`). It adds to the gradient of a parameter, and an aligned forward pass has quantised weights instead.
    """
    has_apex = importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
    return dict(
        gradient_accumulation_fusion=device().type == "cuda" and has_apex and not config.policy.is_aligned,
        apply_rope_fusion=transformer_engine,
        bias_activation_fusion=transformer_engine,
        bias_dropout_fusion=transformer_engine,
        masked_softmax_fusion=False,  # attention is Transformer Engine's or torch's, which have their own fusion
    )


def _moe_options(config: Config, transformer_engine: bool) -> dict[str, object]:
    architecture, parallel = config.architecture, config.parallel
    return dict(
        num_moe_experts=architecture.num_experts,
        moe_ffn_hidden_size=architecture.moe_intermediate_size,
        moe_router_topk=architecture.num_experts_per_tok,
        # A softmax over the chosen k equals the softmax over all, scaled to sum 1. Without this scaling the softmax comes first.
        moe_router_pre_softmax=not architecture.norm_topk_prob,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",  # routing.py has our own
        moe_grouped_gemm=transformer_engine,
        moe_permute_fusion=transformer_engine,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
    )


def _recurrent_options(architecture: Architecture) -> dict[str, object]:
    """For `GatedDeltaNet`, and for checkpoints, which then have a tensor for each layer and not one for all."""
    return dict(
        hetereogenous_dist_checkpoint=True,
        **{name: getattr(architecture, name) for name in LINEAR_KEYS},
    )


def layer_specs_of(
    config: TransformerConfig, architecture: Architecture, transformer_engine: bool
) -> ModuleSpec | TransformerBlockSubmodules:
    """The layers of this rank's pipeline stage."""
    layer = _layer_spec(config, transformer_engine, architecture.family.is_diffusion)
    if transformer_engine and not architecture.family.is_recurrent:
        return layer
    count = config.num_layers // config.pipeline_model_parallel_size
    first = parallel_state.get_pipeline_model_parallel_rank() * count
    recurrent = _recurrent_layer_spec(config, transformer_engine) if architecture.family.is_recurrent else layer
    layers = [recurrent if architecture.is_recurrent(number) else layer for number in range(first, first + count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=_parts(config, transformer_engine)[0])


def _layer_spec(config: TransformerConfig, transformer_engine: bool, bidirectional: bool) -> ModuleSpec:
    experts = dict(num_experts=config.num_moe_experts, moe_grouped_gemm=config.moe_grouped_gemm)
    if transformer_engine:
        layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm, **experts)
    else:
        layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm", **experts)
    if config.num_moe_experts:
        mlp = layer.submodules.mlp  # a ModuleSpec in Megatron 0.16, a partial of the layer's class in 0.19
        submodules = mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules
        submodules.router = Router
    if bidirectional:
        layer.submodules.self_attention.params["attn_mask_type"] = AttnMaskType.padding
    if transformer_engine:
        return layer
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = _norm(config)
    attention = layer.submodules.self_attention.submodules
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = _norm(config)
    attention.core_attention = SDPAttention
    return layer


def _recurrent_layer_spec(config: TransformerConfig, transformer_engine: bool) -> ModuleSpec:
    """A layer with a gated delta rule. Its input norm is a layer of its own, because two projections read what it returns."""
    layer = _layer_spec(config, transformer_engine, bidirectional=False)
    norm, projections = _parts(config, transformer_engine)
    layer.submodules.input_layernorm = norm
    layer.submodules.self_attention = ModuleSpec(module=GatedDeltaNet, submodules=projections)
    return layer


def _parts(config: TransformerConfig, transformer_engine: bool) -> tuple[Any, Projections]:
    """The norm and the linear layers that have no norm in them."""
    if transformer_engine:
        from megatron.core.extensions.transformer_engine import TEColumnParallelLinear, TENorm, TERowParallelLinear

        return TENorm, Projections(TEColumnParallelLinear, TERowParallelLinear)
    return _norm(config), Projections(ColumnParallelLinear, RowParallelLinear)


def _norm(config: TransformerConfig) -> type[RMSNorm]:
    return ZeroCenteredRMSNorm if config.layernorm_zero_centered_gamma else RMSNorm
