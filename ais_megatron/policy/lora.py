"""LoRA: frozen weights, and low-rank factors beside them that are trained.

    y = W x + (alpha / rank) B A x,     A ``[rank, in]``,     B ``[out, rank]``, zero at the start

Source: arXiv 2106.09685, section 4.1. Every Hugging Face projection has its own pair of factors, with the names, shapes and
initialisation of PEFT. Megatron keeps several projections in one parameter (Q, K and V; gate and up). There the As lie one above the
other, and the Bs form a block-diagonal matrix with its rows in Megatron's order. So one product each serves all of them, and B A has the
layout of the parameter.

Tensor parallelism splits a factor along the dimension of the weight that it splits. The other factor is whole on every rank:

    column-parallel (Q, K, V, gate, up)   A whole, B split    x -> A x -> every rank its rows of B A x
    row-parallel (output, down)           A split, B whole    x -> A x, summed over ranks -> B A x

Under sequence parallelism a rank has only its part of the tokens where the whole factor works, so the gradient of this factor is a partial
sum. It is marked as Megatron marks norms, and `finalize_model_grads` sums it.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from ais_megatron.config import Config
from ais_megatron.config.policy import lora_targets, projection
from ais_megatron.export.adapter import AdapterReader, add_product, factor_names
from ais_megatron.export.parameters import join
from ais_megatron.models.family import Weight, parameters_of, sections_of, shape_of, table_of
from ais_megatron.policy.gated_delta_net import by_section


class Factors(nn.Module):
    """The factors of one Megatron linear layer.

    Args:
        rows: the rows of the family's table that make up the layer's weight.
        targets: short names of the projections that have factors.
        layer: its number in the whole model.
        like: the frozen weight, whose device and dtype the factors get.
    """

    def __init__(self, config: Config, rows: tuple[Weight, ...], targets: set[str], layer: int, like: Tensor) -> None:
        super().__init__()
        a, lora, tp = config.architecture, config.policy.lora, parallel_state.get_tensor_model_parallel_world_size()
        self.architecture, self.layer, self.lora = a, layer, lora
        self.rows = {projection(row): row for row in rows}
        self.is_column = rows[0].tp_dim == 0
        self.sequence_parallel = config.parallel.sequence_parallel
        self.hook: Any = None
        """The handle of `add` after the layer, by which an aligned forward pass removes it."""
        self.heights = [shape_of(row, a)[0] // (tp if self.is_column else 1) for row in rows]
        self.names = [projection(row) if projection(row) in targets else None for row in rows]
        self.a, self.b = nn.ParameterDict(), nn.ParameterDict()
        for row, name in zip(rows, self.names, strict=True):
            if name is not None:
                out, width = shape_of(row, a)
                first = initial_a(config.run.seed, layer, name, lora.rank, width)
                self.a[name] = self._parameter(first if self.is_column else _shard(first, 1), like, is_split=not self.is_column)
                self.b[name] = self._parameter(torch.zeros(out // (tp if self.is_column else 1), lora.rank), like, is_split=self.is_column)

    def _parameter(self, value: Tensor, like: Tensor, is_split: bool) -> nn.Parameter:
        parameter: Any = nn.Parameter(value.to(like))  # torch's type does not have the attributes that Megatron reads
        parameter.tensor_model_parallel = is_split
        parameter.sequence_parallel = self.sequence_parallel and not is_split
        result: nn.Parameter = parameter
        return result

    def whole_a(self) -> Tensor:
        """``[projections * rank, in]``, or this rank's columns."""
        return torch.cat(list(self.a.values()))

    def whole_b(self) -> Tensor:
        """``[out, projections * rank]``, or this rank's rows, in the order of Megatron's parameter."""
        width = len(self.a) * self.lora.rank
        blocks, column = [], 0
        for name, height in zip(self.names, self.heights, strict=True):
            if name is None:
                blocks.append(next(iter(self.b.values())).new_zeros(height, width))
                continue
            blocks.append(F.pad(self.b[name], (column, width - column - self.lora.rank)))
            column += self.lora.rank
        return join(blocks, self.architecture)

    @torch.no_grad()
    def merged(self, weight: Tensor) -> Tensor:
        """The layer's weight with the product of the factors added, in the weight's dtype."""
        return add_product(weight, self.whole_a(), self.whole_b(), self.lora)

    def forward(self, x: Tensor) -> Tensor:
        """What the factors add to the layer's output, from the layer's input ``[seq, batch, in]``, in the dtype of the input."""
        low = F.linear(x, self.whole_a().to(x.dtype))
        if self.is_column:
            low = (
                gather_from_sequence_parallel_region(low, tensor_parallel_output_grad=True)
                if self.sequence_parallel
                else copy_to_tensor_model_parallel_region(low)
            )
        elif self.sequence_parallel:
            low = reduce_scatter_to_sequence_parallel_region(low)
        else:
            low = reduce_from_tensor_model_parallel_region(low)
        return F.linear(low, self.whole_b().to(x.dtype) * self.lora.scale)

    def add(self, linear: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """A hook after the frozen layer, which returns (output, bias)."""
        result, bias = output
        x = inputs[0]
        if isinstance(result, tuple):  # Transformer Engine's layer has the norm in it, and returns the normed input too (see `LoRA`)
            result, x = result
        return result + self(x), bias

    def named_factors(self) -> Iterator[tuple[str, nn.Parameter, int | None]]:
        """(name, factor, dimension that TP splits) of each factor. Names are those of PEFT, from ``layers.`` on."""
        for name in self.a:
            name_a, name_b = self._factor_names(name)
            yield name_a, self.a[name], None if self.is_column else 1
            yield name_b, self.b[name], 0 if self.is_column else None

    def sections(self) -> dict[str, list[int]]:
        """Rows that this rank has of each section of a factor, for those whose rows tensor parallelism splits section by section."""
        tp, a = parallel_state.get_tensor_model_parallel_world_size(), self.architecture
        return {
            self._factor_names(name)[1]: [size // tp for size in sections_of(self.rows[name], a)]
            for name in self.b
            if self.rows[name].sections
        }

    def _factor_names(self, name: str) -> tuple[str, str]:
        return factor_names(f"{self.architecture.family.factor_layers}{self.layer}.{self.rows[name].name}")


def initial_a(seed: int, layer: int, name: str, rank: int, width: int) -> Tensor:
    """The first A, uniform in +-1/sqrt(in) as PEFT's, float32 ``[rank, in]``. Equal on all ranks and in all layouts."""
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {layer} {name}").getrandbits(63))
    return (torch.rand(rank, width, generator=generator) * 2 - 1) / width**0.5


def _shard(whole: Tensor, dim: int) -> Tensor:
    tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
    return whole.chunk(tp, dim)[rank]


class LoRA(nn.Module):
    """All factors of this rank's pipeline stage. Building it freezes the model's weights and hooks the factors to its layers."""

    def __init__(self, model: Any, config: Config) -> None:
        super().__init__()
        targets = set(lora_targets(config.policy.lora, config.architecture))
        self.parts = nn.ModuleList()
        self.of_parameter: dict[str, Factors] = {}
        model.requires_grad_(False)
        for number, layer in enumerate(model.decoder.layers):
            for rows in parameters_of(table_of(config.architecture, layer.layer_number - 1)):
                if any(projection(row) in targets for row in rows):
                    place = rows[0].megatron.removesuffix(".weight")
                    linear = layer.get_submodule(place)
                    factors = Factors(config, rows, targets, layer.layer_number - 1, linear.weight)
                    if hasattr(linear, "layer_norm_weight"):
                        linear.return_layernorm_output = True
                    factors.hook = linear.register_forward_hook(factors.add)
                    self.parts.append(factors)
                    self.of_parameter[f"decoder.layers.{number}.{rows[0].megatron}"] = factors
        model.lora = self  # so that the factors are parameters of the model
        if model.pre_process:
            # Recomputation needs an input that requires a gradient, and nothing before the first layer does.
            model.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_(torch.is_grad_enabled()))

    def merged(self, name: str, parameter: Tensor) -> Tensor:
        """The parameter with its factors' product added, if it has any."""
        factors = self.of_parameter.get(name)
        return parameter if factors is None else factors.merged(parameter)

    def named_factors(self) -> Iterator[tuple[str, nn.Parameter, int | None]]:
        """See `Factors.named_factors`, over all layers of this stage."""
        for part in self.parts:
            yield from part.named_factors()  # type: ignore[operator]

    def sharded_state_dict(self) -> dict[str, ShardedTensor | ShardedTensorFactory]:
        """For Megatron's distributed checkpoint, independent of the layout."""
        tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
        replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
        state: dict[str, ShardedTensor | ShardedTensorFactory] = {}
        sections = self._sections()
        for name, factor, dim in self.named_factors():
            offsets = () if dim is None else ((dim, rank, tp),)
            whole = ShardedTensor.from_rank_offsets(f"lora.{name}", factor, *offsets, replica_id=(0, 0 if offsets else rank, replica))
            state[name] = by_section(whole, sections[name]) if name in sections else whole
        return state

    def _sections(self) -> dict[str, list[int]]:
        """See `Factors.sections`, over all layers of this stage."""
        return {name: heights for part in self.parts for name, heights in part.sections().items()}  # type: ignore[operator]

    @torch.no_grad()
    def load_adapter(self, reader: AdapterReader) -> None:
        """Start from this rank's shards of a PEFT folder."""
        tp, rank = parallel_state.get_tensor_model_parallel_world_size(), parallel_state.get_tensor_model_parallel_rank()
        sections = self._sections()
        for name, factor, dim in self.named_factors():
            first, parts = 0, []
            for size in sections.get(name, ()):
                parts.append(reader.read(name, slice(first + rank * size, first + (rank + 1) * size)))
                first += size * tp
            if parts:
                factor.copy_(torch.cat(parts))
                continue
            size = 0 if dim is None else factor.shape[dim]
            mine = [slice(rank * size, (rank + 1) * size) if dim == i else slice(None) for i in range(2)]
            factor.copy_(reader.read(name, *mine))

    @torch.no_grad()
    def load(self, values: dict[str, Tensor]) -> None:
        """Copy this rank's shards, named as in `sharded_state_dict`."""
        for name, factor, _ in self.named_factors():
            factor.copy_(values[name])
