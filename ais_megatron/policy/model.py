"""The policy as a Megatron-Core model that returns log-probabilities.

`build_model` builds this rank's part of the network from the layers of `layers`. `PolicyModel` says what it returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, gather_from_sequence_parallel_region
from torch import Tensor

from ais_megatron.algorithm.gradients import Sketch
from ais_megatron.config import Architecture, Config
from ais_megatron.config.architecture import RopeScaling
from ais_megatron.distributed import device
from ais_megatron.policy.arranged import Arranged
from ais_megatron.policy.layers import layer_specs_of, transformer_config_of
from ais_megatron.policy.logprobs import vocab_parallel_logprobs


def build_model(config: Config, temperature: float, transformer_engine: bool) -> PolicyModel:
    """This rank's pipeline stage with random weights, on its device and in the dtype of the configuration."""
    architecture = config.architecture
    transformer_config = transformer_config_of(config, transformer_engine)
    model = PolicyModel(
        config=transformer_config,
        transformer_layer_spec=layer_specs_of(transformer_config, architecture, transformer_engine),
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
