"""What layers with a gated delta rule (policy/gated_delta_net.py) save and need, in place of attention. On CUDA FLA's kernels are assumed.

tests/planning/test_plan.py compares the bytes with real ranks on the CPU. On CUDA they are derived and not measured. No torch here.
"""

from __future__ import annotations

from ais_megatron.config import Config
from ais_megatron.planning.parameters import FP32, dtype_bytes

CHUNK = 64  # of policy/gated_delta_net.py


def recurrent_saved(config: Config, tokens: int, cuda: bool) -> int:
    """Bytes that a layer with a gated delta rule saves in place of what attention saves, without its norms, its inputs and the MLP. FLA's
    kernels keep Q, K, V, the decays and one matrix for each chunk."""
    a, e, tp = config.architecture, dtype_bytes(config), config.parallel.tp
    channels, value, heads = a.linear_qkv_size, a.linear_value_size, a.linear_num_value_heads
    keys = heads * a.linear_key_head_dim  # each key head is there once for every value head
    convolution = FP32 * channels + e * channels  # its input, and that of silu
    lengths = FP32 * 2 * a.linear_key_size  # Q and K, before they are scaled to length 1
    gated_norm = (FP32 + 2 * e) * value + FP32 * 2 * value  # normed values, and z with its silu
    if cuda:
        rule = e * (2 * keys + 2 * value) + FP32 * 4 * heads + e * heads * CHUNK
    else:
        states = 2 * keys * a.linear_value_head_dim // CHUNK
        rule = FP32 * (6 * heads * CHUNK + 5 * keys + 3 * value + states + 8 * heads)
    return tokens * (convolution + lengths + rule + gated_norm + e * value) // tp


def rule_transient(config: Config, tokens: int, cuda: bool) -> int:
    """Bytes of temporary tensors of a gated delta rule at the worst moment of a forward pass without gradient."""
    a = config.architecture
    keys, values = a.linear_num_value_heads * a.linear_key_head_dim, a.linear_value_size
    if cuda:  # FLA keeps the states at the beginnings of chunks
        return tokens * dtype_bytes(config) * (3 * keys + 2 * values + keys * a.linear_value_head_dim // CHUNK) // config.parallel.tp
    return FP32 * tokens * (5 * a.linear_num_value_heads * CHUNK + 7 * keys + 7 * values) // config.parallel.tp


def state_bytes(config: Config) -> int:
    """Bytes that an engine keeps of one response in layers with a gated delta rule, whatever its length, if it is not spread over GPUs."""
    a = config.architecture
    state = FP32 * a.linear_num_value_heads * a.linear_key_head_dim * a.linear_value_head_dim
    inputs = dtype_bytes(config) * a.linear_qkv_size * max(a.linear_conv_kernel_dim - 1, 0)
    return (a.num_hidden_layers - len(a.attention_layers)) * (state + inputs)
