"""A layer with a gated delta rule in place of attention, for tensor, sequence and pipeline parallelism.

For every value head there is a state S, ``[key_dim, value_dim]``, zero before the first token. Token t decays it, replaces what it holds
for the key k by a mixture with the value v, and reads it with the query q:

    S' = exp(g) S,      S_t = S' + beta k (v - S'^T k)^T,      o_t = S_t^T q / sqrt(key_dim)

    g = -exp(A_log) softplus(a + dt_bias),      beta = sigmoid(b),      y = W_out (norm(o) silu(z))

q, k and v come from one projection, through a short causal convolution per channel and silu, and q and k are scaled to length 1. Source:
arXiv 2412.06464 (Gated Delta Networks), equation 10, and section 3.3 for the form in chunks.

The rule is causal, so padding on the right changes no real token. A state runs through a whole row, so rows can neither be packed nor
share a prefix. Tensor parallelism splits the heads. Megatron-Core has a layer like this one, which needs FLA, and which sums the gradient
of the norm over tensor-parallel ranks only under sequence parallelism.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor, nn

CHUNK = 64
"""Tokens that are computed together. Between chunks only the states are passed on."""


@dataclass
class Projections:
    """The classes of the linear layers."""

    column: Any
    """Column-parallel."""
    row: Any
    """Row-parallel."""


class GatedDeltaNet(MegatronModule):
    """Takes the place of attention in a Megatron layer: hidden states ``[seq, batch, hidden]`` in and out.

    The projections' outputs are split over tensor-parallel ranks section by section, so a rank has ``[q, k, v, z]`` and ``[b, a]`` of its
    heads. Under sequence parallelism the input has this rank's positions, and between the projections there are all.
    """

    def __init__(self, config: TransformerConfig, submodules: Projections, layer_number: int, **_: object) -> None:
        super().__init__(config)
        self.layer_number = layer_number
        self.tp = parallel_state.get_tensor_model_parallel_world_size()
        self.key_heads, self.key_dim = config.linear_num_key_heads // self.tp, config.linear_key_head_dim
        self.value_heads, self.value_dim = config.linear_num_value_heads // self.tp, config.linear_value_head_dim
        key, value = self.key_heads * self.key_dim, self.value_heads * self.value_dim
        self.qkv = [key, key, value]
        self.qkvz = [*self.qkv, value]
        column = dict(config=config, init_method=config.init_method, gather_output=False, bias=False, skip_bias_add=False, is_expert=False)
        row = dict(config=config, init_method=config.output_layer_init_method, bias=False, input_is_parallel=True, skip_bias_add=True)
        hidden, group = config.hidden_size, parallel_state.get_tensor_model_parallel_group()
        self.in_proj = submodules.column(hidden, sum(self.qkvz) * self.tp, tp_comm_buffer_name="fc1", tp_group=group, **column)
        self.in_proj_ba = submodules.column(hidden, 2 * self.value_heads * self.tp, tp_comm_buffer_name="fc1", tp_group=group, **column)
        self.out_proj = submodules.row(value * self.tp, hidden, tp_comm_buffer_name="fc2", tp_group=group, is_expert=False, **row)
        self.conv1d: Any = nn.Module()  # with the name that Megatron's own layer gives its weight
        bound = config.linear_conv_kernel_dim**-0.5
        self.conv1d.weight = self._split((torch.rand(sum(self.qkv) * self.tp, 1, config.linear_conv_kernel_dim) * 2 - 1) * bound, self.qkv)
        heads = [self.value_heads]
        self.dt_bias = self._split(torch.ones(self.value_heads * self.tp), heads)
        self.A_log = self._split(torch.empty(self.value_heads * self.tp).uniform_(0.01, 16.0).log(), heads)
        self.out_norm: Any = nn.Module()
        self.out_norm.weight = nn.Parameter(torch.ones(self.value_dim, dtype=config.params_dtype))

    def _split(self, whole: Tensor, local: list[int]) -> nn.Parameter:
        """This rank's part of each section of a tensor that is random, but the same on all ranks. local: rows of the parts."""
        rank = parallel_state.get_tensor_model_parallel_rank()
        sections = whole.split([size * self.tp for size in local])
        parameter: Any = nn.Parameter(torch.cat([part.chunk(self.tp)[rank] for part in sections]).to(self.config.params_dtype))
        parameter.tensor_model_parallel = True  # so that Megatron counts it on every rank in the norm of the gradient
        result: nn.Parameter = parameter
        return result

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, packed_seq_params: object = None, **_: object
    ) -> tuple[Tensor, None]:
        assert packed_seq_params is None, "a recurrent state would run from one packed row into the next"
        mixed, _no_bias = self.in_proj(hidden_states)
        gates, _no_bias = self.in_proj_ba(hidden_states)
        qkv, z = mixed.split([sum(self.qkv), self.qkv[-1]], dim=-1)
        b, a = gates.chunk(2, dim=-1)
        query, key, value = F.silu(causal_conv1d(qkv, self.conv1d.weight)).transpose(0, 1).split(self.qkv, dim=-1)
        group = self.value_heads // self.key_heads
        query, key = (unit_length(x.unflatten(-1, (-1, self.key_dim))).repeat_interleave(group, 2) for x in (query, key))
        decay = -self.A_log.float().exp() * F.softplus(a.float() + self.dt_bias.float())
        out = delta_rule(query, key, value.unflatten(-1, (-1, self.value_dim)), decay.transpose(0, 1), b.sigmoid().transpose(0, 1))
        gated = self._gated_norm(out.transpose(0, 1), z.unflatten(-1, (-1, self.value_dim)))
        result, _no_bias = self.out_proj(gated.flatten(-2))
        return result, None

    def _gated_norm(self, x: Tensor, gate: Tensor) -> Tensor:
        """Rounds where transformers' model does. Each rank has its own heads, so the gradient of the weight, which all heads share, is
        summed over the tensor-parallel ranks, with sequence parallelism and without."""
        weight = copy_to_tensor_model_parallel_region(self.out_norm.weight.float()).to(x.dtype)
        normed = F.rms_norm(x.float(), x.shape[-1:], None, self.config.layernorm_epsilon).to(x.dtype) * weight
        return (normed * F.silu(gate.float())).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None, **_: object
    ) -> dict[str, Any]:
        """For Megatron's distributed checkpoint. Where a rank has parts of several sections, each section is a tensor of its own, so that
        a checkpoint does not depend on the layout."""
        assert not sharded_offsets, "layers of several kinds are stored one by one"
        split = ("in_proj.weight", "in_proj_ba.weight", "conv1d.weight", "dt_bias", "A_log")
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, {**dict.fromkeys(split, 0), "out_proj.weight": 1}
        )
        for name, heights in (("in_proj", self.qkvz), ("in_proj_ba", [self.value_heads] * 2), ("conv1d", self.qkv)):
            key = f"{prefix}{name}.weight"
            state[key] = by_section(state[key], heights)
        return state


def by_section(tensor: ShardedTensor, heights: list[int]) -> ShardedTensorFactory:
    """A sharded parameter as one sharded tensor for each of its sections. heights: rows of each section on this rank."""
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()

    def build(key: str, values: Tensor, replica_id: Any, flattened_range: slice | None) -> list[ShardedTensor]:
        assert flattened_range is None, "sections are rows"
        return [
            ShardedTensor.from_rank_offsets(f"{key}.{number}", part, (0, rank, tp), replica_id=replica_id)
            for number, part in enumerate(values.split(heights))
        ]

    return ShardedTensorFactory(tensor.key, tensor.data, build, torch.cat, tensor.replica_id)


def causal_conv1d(x: Tensor, weight: Tensor) -> Tensor:
    """Each channel's weighted sum over a token and those before it. x: ``[seq, batch, channels]``. weight: ``[channels, 1, width]``.

    Summed in float32. On a CPU torch's own convolution of single channels takes several times as long as these sums."""
    taps = weight.float()[:, 0]
    width = taps.shape[1]
    padded = F.pad(x.float(), (0, 0, 0, 0, width - 1, 0))
    return sum((padded[i : i + len(x)] * taps[:, i] for i in range(1, width)), padded[: len(x)] * taps[:, 0]).to(x.dtype)


def unit_length(x: Tensor) -> Tensor:
    """x divided by its length over the last dimension, float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def delta_rule(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor) -> Tensor:
    """o of every token, ``[batch, seq, heads, value_dim]`` in the dtype of `value`. On CUDA FLA's kernels compute it if they are installed.

    Args:
        query, key: float32 ``[batch, seq, heads, key_dim]`` of length 1.
        value: ``[batch, seq, heads, value_dim]``.
        decay: g, float32 ``[batch, seq, heads]``, not above 0.
        beta: ``[batch, seq, heads]``, between 0 and 1.
    """
    if value.is_cuda and importlib.util.find_spec("fla") is not None:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        q, k, v, b = (x.to(value.dtype).contiguous() for x in (query, key, value, beta))
        result: Tensor = chunk_gated_delta_rule(q, k, v, g=decay.contiguous(), beta=b)[0]
        return result
    return chunked_delta_rule(query, key, value.float(), decay, beta.float()).to(value.dtype)


def chunked_delta_rule(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, chunk: int = CHUNK) -> Tensor:
    """`delta_rule` in float32 with torch alone.

    With G_i the sum of g over a chunk up to its token i, and S the state before the chunk, the corrections u that its tokens write solve

        u_i + beta_i sum_{j<i} exp(G_i - G_j) (k_i . k_j) u_j = beta_i (v_i - exp(G_i) S^T k_i),

    a triangular system for all tokens at once. Its right side is linear in S, so all chunks are solved together, and S is put in later:

        o_i = (exp(G_i) S^T q_i + sum_{j<=i} exp(G_i - G_j) (q_i . k_j) u_j) / sqrt(key_dim)
        S <- exp(G) S + sum_j exp(G - G_j) k_j u_j^T
    """
    length, chunk = query.shape[1], min(chunk, query.shape[1])
    query = query * query.shape[-1] ** -0.5

    def chunks(x: Tensor) -> Tensor:
        """``[batch, seq, heads, ...]`` as ``[batch, heads, chunks, chunk, ...]``, padded with zeros."""
        x = x.transpose(1, 2)
        return F.pad(x, (0, 0) * (x.dim() - 3) + (0, -length % chunk)).unflatten(2, (-1, chunk))

    q, k, v, g, b = (chunks(x) for x in (query, key, value, decay, beta))
    total = g.cumsum(-1)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
    system = torch.tril(b[..., None] * (k @ k.mT) * between, -1)
    right = torch.cat([b[..., None] * v, (b * total.exp())[..., None] * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    of_values, of_state = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    scores = (q @ k.mT) * between
    reading = q * total.exp()[..., None]
    writing = (k * (total[..., -1:] - total).exp()[..., None]).mT
    kept = total[..., -1].exp()[..., None, None]
    state = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1])
    outputs = []
    for i in range(q.shape[2]):
        written = of_values[:, :, i] - of_state[:, :, i] @ state
        outputs.append(reading[:, :, i] @ state + scores[:, :, i] @ written)
        state = kept[:, :, i] * state + writing[:, :, i] @ written
    return torch.stack(outputs, 2).flatten(2, 3)[:, :, :length].transpose(1, 2)
