"""The cache of the embedded engine, and the attention that reads it.

In FP8 a layer keeps round_E4M3(k / k_scale) and round_E4M3(v / v_scale), saturating at 448. Attention reads these values directly.
k_scale becomes part of the softmax's scale, and v_scale multiplies the output, as in a kernel with descale factors. The cache stores
the values in a wider dtype, because it emulates the precision of FP8 and not its memory. E4M3 values are exact in BF16 and float32. On
a CPU the dtype is float32 even for BF16 models, because attention over float32 takes about half the time there (0.3 against 0.65 ms
for 128 rows of 68 tokens) and rounds less. Elsewhere it is the model's dtype.

A layer with a gated delta rule has no keys and values. For each row it keeps the inputs that its convolution still sees, in the model's
dtype, and one float32 state, whatever the length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ais_megatron.config import Architecture
from ais_megatron.quantization.fp8 import round_to_e4m3

ATTENTION = "ais_megatron_local"


def container_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else dtype


class KVCache(Cache):
    """Keys and values of all layers with attention in one tensor. It is filled from the left, and all rows have the same length.

    Args:
        data: ``[attention layers, 2 (k, v), rows, kv_heads, max_len, head_dim]`` in `container_dtype`; may be uninitialised.
        scales: float32 ``[num_layers, 2]`` on the same device for an FP8 cache; None for a cache that is not quantised.
        layers: the numbers of the layers with attention; None: all layers have it.
    """

    def __init__(self, data: Tensor, scales: Tensor | None, length: int = 0, layers: Sequence[int] | None = None) -> None:
        super().__init__(layers=[])  # transformers' own cache layers are not used, because its models call only these methods
        self.data = data
        self.scales = scales
        self.length = length
        self.inputs: dict[int, Tensor] = {}
        """By the number of a layer, ``[rows, channels, width of the convolution - 1]``, those of the latest tokens."""
        self.states: dict[int, Tensor] = {}
        """By the number of a layer, float32 ``[rows, value_heads, key_dim, value_dim]``."""
        self._layers = range(len(data)) if layers is None else layers
        self._places = {layer: place for place, layer in enumerate(self._layers)}

    @classmethod
    def empty(
        cls, architecture: Architecture, rows: int, max_len: int, dtype: torch.dtype, device: torch.device, scales: Tensor | None
    ) -> KVCache:
        """A cache with room for `max_len` tokens in each of `rows` rows, for a model that computes in `dtype`."""
        shape = (len(architecture.attention_layers), 2, rows, architecture.num_key_value_heads, max_len, architecture.head_dim)
        data = torch.empty(shape, dtype=container_dtype(dtype, device), device=device)
        return cls(data, scales, layers=architecture.attention_layers)

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Write `key_states` and `value_states`, ``[rows, kv_heads, new, head_dim]``, after the first `length` columns.

        Returns:
            k and v as stored, ``[rows, kv_heads, length + new, head_dim]``. The caller calls `advance` after all layers have
            written.
        """
        end = self.length + key_states.shape[2]
        layer = self.data[self._places[layer_idx]]
        if self.scales is None:
            layer[0, :, :, self.length : end] = key_states
            layer[1, :, :, self.length : end] = value_states
        else:
            new = torch.stack((key_states, value_states)).float()
            layer[:, :, :, self.length : end] = round_to_e4m3(new.div_(self.scales[layer_idx].view(2, 1, 1, 1, 1)))
        return layer[0, :, :, :end], layer[1, :, :, :end]

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The inputs that the convolution of a layer still sees, which the model updates in place; None before the first token."""
        return self.inputs.get(layer_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        """The state of a layer; None before the first token."""
        return self.states.get(layer_idx)

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, conv_kernel_size: int, **kwargs: object) -> Tensor:
        """Keep the latest of several inputs ``[rows, channels, new]``, and return all of them. There were none before: after the
        prompts, tokens come one by one."""
        assert layer_idx not in self.inputs, "only prompts have several tokens"
        width = conv_kernel_size - 1
        self.inputs[layer_idx] = F.pad(conv_states, (width, 0))[..., -width:].clone()
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, **kwargs: object) -> Tensor:
        self.states[layer_idx] = recurrent_states
        return recurrent_states

    def advance(self, columns: int) -> None:
        self.length += columns

    def repeat_rows(self, source: Tensor, max_len: int) -> KVCache:
        """A new cache with room for `max_len` tokens, whose row i is a copy of row ``source[i]``."""
        layers, two, _, heads, _, head_dim = self.data.shape
        data = self.data.new_empty(layers, two, len(source), heads, max_len, head_dim)
        data[..., : self.length, :] = self.data[:, :, source, :, : self.length]
        cache = KVCache(data, self.scales, self.length, self._layers)
        cache.inputs, cache.states = self._recurrent_rows(source)
        return cache

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows except the given ones (increasing), in place. The rest is a view of the same memory."""
        kept = self.data[:, :, rows, :, : self.length]
        self.data = self.data[:, :, : len(rows)]
        self.data[..., : self.length, :] = kept
        self.inputs, self.states = self._recurrent_rows(rows)

    def _recurrent_rows(self, rows: Tensor) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Copies of these rows of all recurrent layers."""
        return {layer: x[rows] for layer, x in self.inputs.items()}, {layer: x[rows] for layer, x in self.states.items()}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length


def set_kv_scales(model: PreTrainedModel, scales: Tensor) -> None:
    """Give each attention layer its scales. scales: float32 ``[num_layers, 2]``; read as floats once per update."""
    for layer, (k_scale, v_scale) in zip(model.model.layers, scales.tolist(), strict=True):
        if hasattr(layer, "self_attn"):
            layer.self_attn.k_scale, layer.self_attn.v_scale = k_scale, v_scale


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *, scaling: float, **kwargs: object
) -> tuple[Tensor, None]:
    """Attention over a `KVCache`, under transformers' interface.

    Args:
        module: the model's attention layer, with the two scales of `set_kv_scales`.
        query: ``[rows, heads, new, head_dim]``. key, value: ``[rows, kv_heads, length, head_dim]`` from a cache.
        attention_mask: additive, ``[rows, 1, new, length]``, in the dtype of the cache.
    Returns:
        ``[rows, new, heads, head_dim]`` in query's dtype.
    """
    rows, heads, new, head_dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    group = heads // kv_heads
    scale = scaling * module.k_scale
    q = query.to(key.dtype)
    if new == 1 and key.device.type == "cpu":
        # With one query, heads that share keys become the rows of one small matmul. SDPA's kernel goes over (row, head)
        # pairs, which takes twice as long as these batched matmuls for small models.
        mask = attention_mask.expand(rows, kv_heads, 1, length).reshape(rows * kv_heads, 1, length)
        flat_key, flat_value = key.flatten(0, 1), value.flatten(0, 1)  # views: a cache's rows and heads are adjacent
        scores = torch.baddbmm(mask, q.reshape(rows * kv_heads, group, head_dim), flat_key.transpose(1, 2), alpha=scale)
        out = torch.bmm(scores.softmax(-1), flat_value).view(rows, 1, heads, head_dim)
    elif new == 1:
        out = F.scaled_dot_product_attention(q.reshape(rows, kv_heads, group, head_dim), key, value, attn_mask=attention_mask, scale=scale)
        out = out.reshape(rows, 1, heads, head_dim)
    else:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        out = F.scaled_dot_product_attention(q, key, value, attn_mask=attention_mask, scale=scale).transpose(1, 2)
    if module.v_scale != 1.0:
        out = out * module.v_scale
    return out.to(query.dtype), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
