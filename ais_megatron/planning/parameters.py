"""Numbers of parameters: of a model, of a rank, of LoRA's factors, of what FP8 rollouts quantise. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

from ais_megatron.config import Architecture, Config, ParallelConfig
from ais_megatron.config.policy import lora_targets
from ais_megatron.models.family import Weight, parameters_of, shape_of

FP32 = 4


def dtype_bytes(config: Config) -> int:
    return 2 if config.model.dtype == "bf16" else FP32


@dataclass(frozen=True)
class Counts:
    """Number of parameters on one rank."""

    dense: int
    expert: int
    largest: int
    """Size of the largest parameter. Its gradient exists twice before it is added to the buffer."""

    @property
    def all(self) -> int:
        return self.dense + self.expert


def total_parameters(a: Architecture) -> int:
    return rank_counts(a, ParallelConfig(), 0).all


def layer_counts(a: Architecture, tp: int = 1, ep: int = 1, etp: int = 1, layers: range | None = None) -> tuple[int, int]:
    """Number of (dense, expert) parameters of these layers on one rank; None: of all layers."""
    layers = range(a.num_hidden_layers) if layers is None else layers

    def count(table: tuple[Weight, ...], shards: int) -> int:
        return sum(prod(shape_of(weight, a)) // (1 if weight.tp_dim is None else shards) for weight in table)

    recurrent = sum(a.is_recurrent(layer) for layer in layers)
    dense = recurrent * count(a.family.recurrent_layer, tp) + (len(layers) - recurrent) * count(a.family.layer, tp)
    return dense, len(layers) * (a.num_experts // ep) * count(a.family.experts, etp)


def stage_layers(a: Architecture, parallel: ParallelConfig, stage: int) -> range:
    """The numbers of the layers of a pipeline stage."""
    count = a.num_hidden_layers // parallel.pp
    return range(stage * count, (stage + 1) * count)


def rank_counts(a: Architecture, parallel: ParallelConfig, stage: int) -> Counts:
    """Number of parameters on a rank of a pipeline stage."""
    dense, expert = layer_counts(a, parallel.tp, parallel.ep, parallel.etp, stage_layers(a, parallel, stage))
    vocabulary = ceil(a.vocab_size / parallel.tp) * a.hidden_size
    is_last = stage == parallel.pp - 1
    copies = (stage == 0) + (is_last and (not a.tie_word_embeddings or parallel.pp > 1))
    tables = ((a.family.layer, parallel.tp), (a.family.recurrent_layer, parallel.tp), (a.family.experts, parallel.etp))
    widest = max(sum(prod(shape_of(row, a)) for row in rows) // shards for table, shards in tables for rows in parameters_of(table))
    return Counts(dense + copies * vocabulary + is_last * a.hidden_size, expert, max(widest, copies * vocabulary // max(copies, 1)))


def factor_count(config: Config) -> int:
    """Number of parameters in the LoRA factors of a rank (policy/lora.py); 0 without LoRA."""
    a, parallel, lora = config.architecture, config.parallel, config.policy.lora
    total = 0
    for layer in stage_layers(a, parallel, 0):
        for row in lora_targets(lora, a, layer).values():
            out, width = shape_of(row, a)
            # Column-parallel layers split B, and row-parallel layers split A.
            total += width + out // parallel.tp if row.tp_dim == 0 else width // parallel.tp + out
    return lora.rank * total


def quantized_counts(a: Architecture, block: int) -> tuple[int, int]:
    """Number of (parameters, blocks of `block` rows and columns) in all projections that FP8 rollouts quantise."""
    family, layers, attention = a.family, a.num_hidden_layers, len(a.attention_layers)
    tables = ((family.layer, attention), (family.recurrent_layer, layers - attention), (family.experts, layers * a.num_experts))
    shapes = [(*shape_of(weight, a), times) for table, times in tables for weight in table if weight.quantized]
    return sum(n * k * times for n, k, times in shapes), sum(ceil(n / block) * ceil(k / block) * times for n, k, times in shapes)


def smallest_dp(parallel: ParallelConfig) -> int:
    """`parallel.dp`, or if it is empty the smallest size that expert parallelism allows."""
    if parallel.dp:
        return parallel.dp
    return next(dp for dp in range(1, parallel.ep * parallel.etp + 1) if not parallel.tp * parallel.cp * dp % (parallel.ep * parallel.etp))
