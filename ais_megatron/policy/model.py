"""The policy as a Megatron-Core model that returns log-probabilities.

`build_model` builds this rank's part of the network. On CUDA with Transformer Engine it uses Megatron's Transformer Engine layers.
Otherwise it uses Megatron's local layers with two replacements: an `RMSNorm` that allows sequence parallelism, and `SDPAttention`,
which lets torch choose the kernel and does not store the attention scores.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, gather_from_sequence_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor, nn

from ais_megatron.algorithm.gradients import Sketch
from ais_megatron.cluster.cuda_environment import BLOCK_SCALES
from ais_megatron.config import Architecture, Config
from ais_megatron.config.architecture import LINEAR_KEYS, RopeScaling
from ais_megatron.config.policy import BLOCK_SCALING
from ais_megatron.distributed import device
from ais_megatron.policy.arranged import Arranged
from ais_megatron.policy.gated_delta_net import GatedDeltaNet, Projections
from ais_megatron.policy.logprobs import vocab_parallel_logprobs
from ais_megatron.policy.norm import chunked_rms_norm
from ais_megatron.policy.packing import Packed
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


def build_model(config: Config, temperature: float, transformer_engine: bool) -> PolicyModel:
    """This rank's pipeline stage with random weights, on its device and in the dtype of the configuration."""
    architecture = config.architecture
    transformer_config = transformer_config_of(config, transformer_engine)
    model = PolicyModel(
        config=transformer_config,
        transformer_layer_spec=_layer_specs(transformer_config, architecture, transformer_engine),
        vocab_size=padded_vocab_size(architecture, config.parallel.tp),
        max_sequence_length=architecture.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=architecture.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_percent=architecture.partial_rotary_factor,
        rotary_base=architecture.rope_theta,
    )
    model.true_vocab_size = architecture.vocab_size
    model.predicts_next = not architecture.family.is_diffusion
    model.temperature = temperature
    model.logprob_chunk_tokens = config.train.logprob_chunk_tokens
    model.entropy_gradient = config.objective.entropy_bonus > 0.0
    if model.post_process:
        if config.measures_gradients:
            model.sketch = Sketch.random(architecture.vocab_size, architecture.hidden_size, transformer_config.params_dtype, device())
        model.output_layer.register_forward_pre_hook(model.only_scored)
    model.rotary_pos_emb.register_forward_hook(model.rotate_by_position)
    model.rotary_pos_emb.cp_group = None  # the hook chooses a rank's angles; Megatron's way needs pinned memory, which a CPU does not have
    if architecture.rope_scaling is not None:
        rope = model.rotary_pos_emb
        rope.inv_freq = stretched_frequencies(rope.inv_freq, architecture.rope_scaling)
    if transformer_config.bf16 and bf16_products_are_slow():
        _multiply_in_float32(model)
    if transformer_engine:
        _accumulate_gradients_in_place(model)
        _count_all_experts(model)
    return model.to(device())


def stretched_frequencies(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3's rotary frequencies for a longer context than the original one, float32 ``[head_dim / 2]`` in radians per token.

    High frequencies do not change, and low ones are divided by the factor. Between the two bounds the result changes linearly with the
    number of periods that fit into the original context. In Megatron's own version only the factor can be set.
    Source: transformers, `rope_type` llama3.
    """
    periods = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = ((periods - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def bf16_products_are_slow() -> bool:
    """Whether this is a job on CPUs without instructions for BF16, where a BF16 product takes several times as long as a float32 one."""
    return device().type == "cpu" and not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _multiply_in_float32(model: PolicyModel) -> None:
    """Let linear layers multiply BF16 values in float32 and round the result to BF16. BF16 kernels add in float32 too, so only the order
    of sums differs."""

    def in_float32(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(input: Tensor, weight: Tensor, **options: Any) -> Tensor:
            return product(input=input.float(), weight=weight.float(), **options).to(input.dtype)

        return forward

    for module in model.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
            layer: Any = module  # its product is an attribute without a type
            layer._forward_impl = in_float32(layer._forward_impl)


def _accumulate_gradients_in_place(model: PolicyModel) -> None:
    """Let Transformer Engine's matrix products add weight gradients directly to DDP's FP32 buffer.

    Megatron's own switch, `gradient_accumulation_fusion`, also applies to the output layer. That is a Megatron layer and cannot be built
    this way without NVIDIA Apex. So this sets the switch in every layer that supports it.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _count_all_experts(model: PolicyModel) -> None:
    """Mark expert weights as this rank's own. Megatron's layers do this, but not the Transformer Engine layers of Megatron 0.16. Without
    the mark, the norm of the gradient includes only the experts of the first tensor-parallel rank."""
    for parameter in model.parameters():
        if not getattr(parameter, "allreduce", True):  # Megatron's mark of an expert's weight
            parameter.tensor_model_parallel = True


class PolicyModel(GPTModel):
    """A `GPTModel` whose "loss" is the pair (log-probability, entropy) of every scored token.

    Called with ``labels`` (int64 ``[batch, seq]``, the rows) and ``loss_mask`` (bool ``[batch, seq]``, the scored tokens), the last
    pipeline stage returns float32 ``[2, batch, seq]``. If it is `sketched`, it returns ``[2 + a + b, batch, seq]``, where a and b numbers
    without grad are the sketches of the token's score and of its hidden state. Index t describes token t. Other tokens have 0, as has
    column 0 of a causal model, because no token predicts it. The input are the tokens of `arranged`. With context parallelism all ranks
    return the same. A diffusion model gets rows in which some tokens are masked, and predicts a token from the state at its own position.

    The output layer gets only the hidden states that predict a scored token. Prompts are not scored, and with a large vocabulary their
    logits would cost a good part of a step. Under sequence parallelism each rank has other positions, so there all go through it.
    """

    true_vocab_size: int
    predicts_next: bool
    """A token is predicted by the state before it, as in a causal model, and not by the state at its own position."""
    temperature: float
    logprob_chunk_tokens: int
    entropy_gradient: bool
    sketch: Sketch | None = None
    """Given to models whose gradients are measured."""
    _sketch: Sketch | None  # in this forward pass
    _states: Tensor  # sketches of the hidden states that predict a scored token, [scored, b]
    _scored: tuple[Tensor, Tensor]  # rows and columns of the scored tokens that this rank's states predict
    _predicting: Tensor  # for each of them, where the state that predicts it is among the hidden states
    _arranged: Arranged

    def forward(self, tokens: Tensor, *, loss_mask: Tensor, arranged: Arranged, sketched: bool = False, **kwargs: Any) -> Tensor:
        self._sketch = self.sketch if sketched else None
        first = int(self.predicts_next)  # the first column that may be scored
        row, column = loss_mask[:, first:].t().nonzero().flip(1).unbind(1)  # in the order of the hidden states, [seq, batch, hidden]
        here, self._predicting = arranged.on_this_rank(row, column)
        self._scored = row[here], column[here] + first
        self._arranged = arranged
        return super().forward(tokens, None, arranged.padding, packed_seq_params=arranged.packed, **kwargs)

    def rotate_by_position(self, rotary: torch.nn.Module, inputs: tuple[Any, ...], angles: Tensor) -> Tensor:
        """A hook after the rotary embedding, whose angles ``[seq, 1, 1, head_dim]`` are those of one row."""
        positions, packed = self._arranged.positions, self._arranged.packed
        if positions is None or (packed is not None and packed.qkv_format == "thd"):  # Megatron then finds them by itself
            return angles
        return angles[positions]

    def only_scored(self, output_layer: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """A hook before the output layer, which replaces ``[seq, batch, hidden]`` by the scored states, ``[scored, 1, hidden]``."""
        hidden, *rest = inputs
        if self._sketch is not None:
            self._states = self._sketched(hidden, self._sketch)
        if self.config.sequence_parallel:
            return None
        return hidden.flatten(0, 1)[self._predicting][:, None], *rest

    @torch.no_grad()
    def _sketched(self, hidden: Tensor, sketch: Sketch) -> Tensor:
        """float32 ``[scored, b]``, from hidden states ``[seq, batch, hidden]``, or under sequence parallelism this rank's positions."""
        states = hidden @ sketch.directions
        if self.config.sequence_parallel:
            states = gather_from_sequence_parallel_region(states)
        return states.flatten(0, 1)[self._predicting].float()

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        if self.config.sequence_parallel:
            logits = logits.flatten(0, 1)[self._predicting]
        logprobs, entropy, scores = vocab_parallel_logprobs(
            logits.flatten(0, -2),
            labels[self._scored],
            vocab_size=self.true_vocab_size,
            temperature=self.temperature,
            group=parallel_state.get_tensor_model_parallel_group(),
            chunk_tokens=self.logprob_chunk_tokens,
            entropy_gradient=self.entropy_gradient,
            signs=None if self._sketch is None else self._sketch.signs,
        )
        values = torch.stack([logprobs, entropy])
        if self._sketch is not None:
            values = torch.cat([values, scores.t(), self._states.t()])
        everywhere = logits.new_zeros(len(values), *labels.shape, dtype=torch.float32)
        own = everywhere.index_put((torch.arange(len(values), device=labels.device)[:, None], *self._scored), values)
        return self._arranged.context.total(own)


def padded_vocab_size(architecture: Architecture, tp: int) -> int:
    """The vocabulary size rounded up to a multiple of tp. The additional columns are never part of a softmax."""
    return -(-architecture.vocab_size // tp) * tp


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


def _layer_specs(
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


class RMSNorm(nn.Module):
    """Root-mean-square norm. Megatron's `WrappedTorchNorm` refuses sequence parallelism. This norm marks its weight, so that
    `finalize_model_grads` sums its gradient over the tensor-parallel group."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        weight: Any = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        weight.sequence_parallel = config.sequence_parallel  # an attribute that Megatron reads; torch's type does not have it
        self.weight: nn.Parameter = weight
        self.eps = eps
        self.rounds_first = False
        """Round the normed values to their dtype before they are multiplied by the weight, as transformers' models do."""

    def forward(self, x: Tensor) -> Tensor:
        if self.rounds_first:
            return F.rms_norm(x, self.weight.shape, None, self.eps) * self.weight
        if x.device.type == "cpu":
            return chunked_rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class ZeroCenteredRMSNorm(RMSNorm):
    """An `RMSNorm` that multiplies by 1 + weight, in float32, and rounds once."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__(config, hidden_size, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = 1.0 + self.weight.float()
        if x.device.type == "cpu":
            return chunked_rms_norm(x, weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, weight, self.eps).to(x.dtype)


class SDPAttention(nn.Module):
    """Attention over ``[seq, batch, heads/tp, head_dim]`` through torch's scaled_dot_product_attention.

    It is causal, unless its layer was built with `AttnMaskType.padding`. Rows are padded on the right, so with the causal mask no real
    token attends to padding. Otherwise `attention_mask`, bool ``[batch, 1, 1, seq]``, says where padding is. With `packed_seq_params` there
    is one sequence, and attention is within the rows that are packed in it.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: object) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale  # None: 1 / sqrt(head_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        packed_seq_params: Packed | None = None,
        **_: object,
    ) -> Tensor:
        """Returns ``[seq, batch, heads/tp * head_dim]``."""
        # torch's CPU kernel computes in float32 anyway, and its backward pass is up to 4 times faster with float32 inputs.
        kernel_dtype = torch.float32 if query.device.type == "cpu" else query.dtype
        q, k, v = (x.to(kernel_dtype) for x in (query, key, value))
        if packed_seq_params is not None:
            return packed_seq_params.attend(self._attend, q[:, 0], k[:, 0], v[:, 0]).to(query.dtype)[:, None]
        mask = None
        if attn_mask_type == AttnMaskType.padding:
            assert attention_mask is not None
            mask = torch.zeros(attention_mask.shape, device=query.device).masked_fill_(attention_mask, -torch.inf)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        context = self._attend(q, k, v, mask)
        return context.to(query.dtype).permute(2, 0, 1, 3).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[batch, heads, seq, head_dim]`` each; without a mask it is causal."""
        mask = None if mask is None else mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True)
