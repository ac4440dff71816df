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

from collections.abc import Iterator
from math import prod

from ais_megatron.config import Config
from ais_megatron.models.family import Weight, shape_of, table_of
from ais_megatron.planning.parameters import FP32, dtype_bytes, stage_layers

ROUNDED = 5 * FP32
"""Bytes per value while weights are rounded: values, scales, quotients, and the anchors and sums of `Format.round_scaled`."""
ROUNDED_INPUT = 4 * FP32
"""The same for inputs, whose scales are not expanded."""


def copy_width(config: Config, cuda: bool) -> int:
    """Bytes of one value of a quantised weight or input."""
    return 2 if cuda and config.model.dtype == "bf16" else FP32


def copied_bytes(config: Config, stage: int, cuda: bool) -> int:
    """Bytes of the quantised copies of a rank's weights; 0 without an aligned forward pass."""
    if not config.policy.is_aligned:
        return 0
    return copy_width(config, cuda) * sum(map(sum, _sizes(config, stage)))


def refresh_bytes(config: Config, stage: int, cuda: bool) -> int:
    """Bytes at the worst moment while the copies are made again: of the largest matrix, and of the one that was made just before."""
    if not config.policy.is_aligned:
        return 0
    return (ROUNDED + copy_width(config, cuda)) * max(map(max, _sizes(config, stage)))


def _sizes(config: Config, stage: int) -> Iterator[list[int]]:
    """For each layer of a stage: the number of values in a rank's part of each quantised matrix, of its experts too."""
    a, parallel = config.architecture, config.parallel

    def sizes(table: tuple[Weight, ...], shards: int) -> list[int]:
        return [prod(shape_of(weight, a)) // (1 if weight.tp_dim is None else shards) for weight in table if weight.quantized]

    for layer in stage_layers(a, parallel, stage):
        yield sizes(table_of(a, layer), parallel.tp) + sizes(a.family.experts, parallel.etp) * (a.num_experts // parallel.ep)


def saved_bytes(config: Config, tokens: int, pairs: int, cuda: bool, is_recurrent: bool = False) -> int:
    """Bytes that a layer saves for the backward pass beyond those of `activations.layer_saved`.

    pairs: of a token and an expert, on this rank."""
    if not config.policy.is_aligned:
        return 0
    a, parallel = config.architecture, config.parallel
    e, width = dtype_bytes(config), copy_width(config, cuda)
    shard = parallel.tp if parallel.sequence_parallel else 1
    hidden, attention = a.hidden_size, a.linear_value_size if is_recurrent else a.query_size
    saved = 0
    if not a.family.zero_centered_norms:  # norms of the other kind round once
        saved += tokens * 2 * width * hidden // shard
        saved += tokens * width * (a.query_size + a.kv_size) // parallel.tp if a.family.qk_norm else 0
    if is_recurrent and width != e:
        saved += tokens * e * hidden // shard  # the input of the projection to the gates, which is not quantised
    if not a.is_moe:
        return saved + (width - e) * tokens * (2 * hidden // shard + (attention + a.intermediate_size) // parallel.tp)
    experts = pairs * ((2 * width - e) * hidden + (width - 2 * e) * a.moe_intermediate_size // parallel.etp)
    return saved + (width - e) * tokens * (hidden // shard + attention // parallel.tp) + experts


def rounding_bytes(config: Config, tokens: int) -> int:
    """Bytes of the widest input of a dense layer, and of temporary tensors while it is rounded."""
    if not config.policy.aligns_inputs:
        return 0
    a, parallel = config.architecture, config.parallel
    e = dtype_bytes(config)
    return (ROUNDED_INPUT + e) * tokens * max(a.query_size, 0 if a.is_moe else a.intermediate_size) // parallel.tp
