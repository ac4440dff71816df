"""What an aligned forward pass (policy/aligned.py) adds to the memory of a rank.

    copies     every quantised weight of the rank once more, in float32 on a CPU and in the model's dtype on CUDA. With LoRA they are
               copies of the merged weights, and the layers without factors have one too
    refresh    temporary FP32 tensors while the largest matrix is quantised
    saved      quantised inputs of linear layers in the dtype of the copies. Norms round before they multiply by their weight, so each
               saves a second tensor: on a CPU its input in float32, on CUDA the normed values
    rounding   the same temporary tensors for the widest input of a linear layer

The lists were recorded with torch's saved-tensor hooks, as those of `activations`. tests/planning/test_plan.py compares them with real
ranks. On CUDA they are derived and not measured. No torch here.
"""

from __future__ import annotations

from math import prod

from ais_megatron.config import Config
from ais_megatron.models.family import Weight, shape_of
from ais_megatron.planning.parameters import FP32, dtype_bytes

ROUNDED = 5 * FP32
"""Bytes per value while weights are rounded: values, scales, quotients, and the anchors and sums of `Format.round_scaled`."""
ROUNDED_INPUT = 4 * FP32
"""The same for inputs, whose scales are not expanded."""


def copy_width(config: Config, cuda: bool) -> int:
    """Bytes of one value of a quantised weight or input."""
    return 2 if cuda and config.model.dtype == "bf16" else FP32


def copied_bytes(config: Config, cuda: bool) -> int:
    """Bytes of the quantised copies of a rank's weights; 0 without an aligned forward pass."""
    if not config.policy.is_aligned:
        return 0
    a, parallel = config.architecture, config.parallel
    dense, expert = _sizes(config)
    return copy_width(config, cuda) * (a.num_hidden_layers // parallel.pp) * (sum(dense) + a.num_experts // parallel.ep * sum(expert))


def refresh_bytes(config: Config, cuda: bool) -> int:
    """Bytes at the worst moment while the copies are made again: of the largest matrix, and of the one that was made just before."""
    if not config.policy.is_aligned:
        return 0
    dense, expert = _sizes(config)
    return (ROUNDED + copy_width(config, cuda)) * max(dense + expert)


def _sizes(config: Config) -> tuple[list[int], list[int]]:
    """Number of values in a rank's part of each quantised matrix of a layer, and of an expert."""
    a, parallel = config.architecture, config.parallel

    def size(weight: Weight, shards: int) -> int:
        return prod(shape_of(weight, a)) // (1 if weight.tp_dim is None else shards)

    return (
        [size(weight, parallel.tp) for weight in a.family.layer if weight.quantized],
        [size(weight, parallel.etp) for weight in a.family.experts if weight.quantized],
    )


def saved_bytes(config: Config, tokens: int, pairs: int, cuda: bool) -> int:
    """Bytes that a layer saves for the backward pass beyond those of `activations.layer_saved`.

    pairs: of a token and an expert, on this rank."""
    if not config.policy.is_aligned:
        return 0
    a, parallel = config.architecture, config.parallel
    e, width = dtype_bytes(config), copy_width(config, cuda)
    shard = parallel.tp if parallel.sequence_parallel else 1
    hidden, attention = a.hidden_size, a.query_size
    norms = tokens * 2 * width * hidden // shard
    norms += tokens * width * (a.query_size + a.kv_size) // parallel.tp if a.family.qk_norm else 0
    if not a.is_moe:
        return norms + (width - e) * tokens * (2 * hidden // shard + (attention + a.intermediate_size) // parallel.tp)
    experts = pairs * ((2 * width - e) * hidden + (width - 2 * e) * a.moe_intermediate_size // parallel.etp)
    return norms + (width - e) * tokens * (hidden // shard + attention // parallel.tp) + experts


def rounding_bytes(config: Config, tokens: int) -> int:
    """Bytes of the widest input of a dense layer, and of temporary tensors while it is rounded."""
    if not config.policy.aligns_inputs:
        return 0
    a, parallel = config.architecture, config.parallel
    e = dtype_bytes(config)
    return (ROUNDED_INPUT + e) * tokens * max(a.query_size, 0 if a.is_moe else a.intermediate_size) // parallel.tp
