"""Forward passes with the rollout engine's arithmetic, so that the trainer computes what the engine has sampled from.

`policy.forward_precision=fp8_aligned` or `int4_aligned`: the linear layers that the engine quantises use its weights (quantised in the
blocks of whole Hugging Face tensors) and its inputs (quantised in groups, row by row), and attention uses K and V as the engine's FP8
cache stores them. Norms, routers and the sum over experts round where the engine rounds. Everything else, such as embeddings and the
output layer, is as before. The backward pass is straight-through:

    y = Q(x) Q(W)^T,      dx = dy Q(W),      dW = dy^T Q(x),      and the gradients of Q are taken to be 1

Source: QaRL (arXiv 2604.07853), which calls it the aligned forward pass; the estimator is that of arXiv 1308.3432. The format is that of
`rollout.quantization`, so FP4 and E5M2 work too. With INT4 inputs are not quantised.

Rounding makes a deep model chaotic: values that differ in their last bit are rounded apart, and after some layers the difference is as
large as if they had been rounded independently. So unless trainer and engine agree to the bit, an input that is rounded on both sides
differs by twice the variance of one that only the engine rounds. `fp8_weights_aligned` therefore shares the weights alone, whose rounding
is the same on both sides: y = x Q(W)^T, and K and V as they are.

With LoRA the engine has Q(W + s B A), where s = alpha / rank, and so has the trainer. W has no gradient, and nothing of its size is made
for the gradients of the factors:

    y = Q(x) Q(W + s B A)^T,      dx = dy Q(W + s B A),      dB = s dy^T (Q(x) A^T),      dA = s (dy B)^T Q(x)

A block may lie on two tensor-parallel ranks, and Megatron interleaves Q, K and V. So every rank takes the amax of its part of each block,
one all-reduce makes them those of whole blocks, and the result does not depend on the layout. Weights are quantised once per optimizer
step and kept, in float32 on a CPU like the engine's, and otherwise in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from torch import Tensor, nn

from ais_megatron.config import Architecture, Config
from ais_megatron.distributed import device
from ais_megatron.export.parameters import join, split
from ais_megatron.models.family import Weight, parameters_of, table_of
from ais_megatron.policy.hf_weights import part_of
from ais_megatron.policy.lora import Factors, LoRA
from ais_megatron.policy.norm import RMSNorm
from ais_megatron.policy.routing import Router
from ais_megatron.policy.straight_through import also_for, straight_through
from ais_megatron.quantization.formats import Format, format_of
from ais_megatron.quantization.fp8 import MIN_GROUP_AMAX, round_to_e4m3
from ais_megatron.quantization.kv_scales import KVScales


@dataclass(frozen=True)
class Piece:
    """This rank's part of one matrix: its rows of each section, its first column, and the whole matrix's shape."""

    rows: tuple[range, ...]
    column: int
    whole: tuple[int, int]

    def block_amax(self, values: Tensor, fmt: Format) -> Tensor:
        """The largest magnitudes of this part in each block of the whole matrix, float32, and 0 in blocks that are elsewhere."""
        (height, width), columns = fmt.weight_block, values.shape[1]
        grid = values.new_zeros(fmt.scales_shape(self.whole), dtype=torch.float32)
        left = self.column % width
        for rows, section in zip(self.rows, values.split([len(rows) for rows in self.rows]), strict=True):
            top = rows.start % height
            padded = F.pad(section.float().abs(), (left, -(left + columns) % width, top, -(top + len(rows)) % height))
            own = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height)).amax((1, 3))
            blocks = grid[rows.start // height :, self.column // width :][: own.shape[0], : own.shape[1]]
            torch.maximum(blocks, own, out=blocks)  # two sections may share a block
        return grid

    def quantized(self, values: Tensor, amax: Tensor, fmt: Format) -> Tensor:
        """This part quantised and dequantised, float32. amax: of every block of the whole matrix. As `quantize_block` does."""
        (height, width), columns = fmt.weight_block, values.shape[1]
        scale = amax / torch.full((), fmt.largest, device=amax.device)
        scale = torch.where(scale == 0, 1.0, scale)
        of_row = torch.cat([torch.arange(rows.start, rows.stop, device=amax.device) for rows in self.rows]) // height
        of_column = (torch.arange(columns, device=amax.device) + self.column) // width
        scale = scale[of_row][:, of_column]
        return fmt.round_scaled(values.float() / scale).mul_(scale)


@dataclass
class AlignedLinear:
    """One linear layer of Megatron, whose product is replaced."""

    linear: Any
    pieces: tuple[Piece, ...]
    """One for each Hugging Face matrix in its weight."""
    group: dist.ProcessGroup | None
    """The ranks that share the layer's matrices; None if this rank has them whole."""
    factors: Factors | None
    """Those of LoRA beside the layer."""
    rounds_later: bool
    """Whether the output is summed over experts before it is rounded to the model's dtype."""
    weight: Tensor | None = None
    """The quantised weight after the latest `Aligned.refresh`."""
    input: Tensor | None = None
    """The quantised input, between the product and the hook after the layer, for the gradients of the factors."""

    @property
    def changes(self) -> bool:
        """Whether training changes the weight."""
        return self.factors is not None or self.linear.weight.requires_grad

    def parts(self, architecture: Architecture) -> list[Tensor]:
        """This rank's parts of the Hugging Face matrices, with LoRA merged as a weight sync merges it."""
        weight = self.linear.weight.detach()
        heights = [part.whole[0] * len(weight) // sum(other.whole[0] for other in self.pieces) for part in self.pieces]
        return split(weight if self.factors is None else self.factors.merged(weight), heights, architecture)


class Aligned:
    """Replaces the products of all linear layers that the engine quantises, and rounds K and V as its cache does.

    Call `weights_changed` after every change of the model's weights, and `refresh` before the next forward pass.
    """

    def __init__(self, model: Any, config: Config, lora: LoRA | None) -> None:
        fmt = format_of(config.rollout)
        assert fmt is not None, "the configuration refuses an aligned forward pass without a quantised engine"
        self._config, self._fmt = config, fmt if config.policy.aligns_inputs else replace(fmt, group=0)
        self._rounds_cache = config.policy.aligns_cache and config.rollout.kv_cache_is_fp8
        self._model_dtype = next(model.parameters()).dtype
        self._dtype = torch.float32 if device().type == "cpu" else self._model_dtype
        self._factors = {} if lora is None else lora.of_parameter
        self._linears = list(self._find(model))
        self._is_fresh = False
        self.kv_scales: Tensor | None = None
        """float32 ``[num_layers, 2]``, those of the engine's FP8 cache; None if the cache is not quantised."""
        for aligned in self._linears:
            aligned.linear._forward_impl = self._product(aligned, aligned.linear._forward_impl)
            if aligned.factors is not None:
                aligned.factors.hook.remove()
                aligned.linear.register_forward_hook(self._differentiated(aligned))
            if not aligned.rounds_later:
                aligned.linear.register_forward_hook(self._rounded)
        # A difference in the last bit of a BF16 value moves every thirtieth input to another value of FP8. So norms, routers and the sum
        # over experts must round alike too.
        for module in model.modules():
            if isinstance(module, RMSNorm | Router):
                module.rounds_first = True
        for layer in model.decoder.layers if config.architecture.is_moe else ():
            for expert in layer.mlp.experts.local_experts:
                expert.forward = _weighted(expert.forward)
            layer.mlp.register_forward_hook(self._rounded)
        if self._rounds_cache:
            self.use_scales(KVScales.unit(config.architecture.num_hidden_layers))
            for layer in model.decoder.layers:
                if not config.architecture.is_recurrent(layer.layer_number - 1):
                    layer.self_attention.core_attention.register_forward_pre_hook(self._cached(layer.layer_number - 1))

    def use_scales(self, scales: KVScales | None) -> None:
        """The scales that the engine has from now on."""
        if self._rounds_cache and scales is not None:
            self.kv_scales = torch.stack([scales.k_scale, scales.v_scale], 1).to(device())

    def weights_changed(self) -> None:
        """Quantise the weights again before they are used next."""
        self._is_fresh = False

    def _find(self, model: Any) -> Iterator[AlignedLinear]:
        """The linear layers with a quantised weight, on this rank."""
        a = self._config.architecture
        for number, layer in enumerate(model.decoder.layers):
            for rows in parameters_of(table_of(a, layer.layer_number - 1)):
                if rows[0].quantized:
                    factors = self._factors.get(f"decoder.layers.{number}.{rows[0].megatron}")
                    yield self._aligned(layer, rows, rows[0].megatron, factors, is_expert=False)
            for slot in range(a.num_experts // self._config.parallel.ep):
                for rows in parameters_of(a.family.experts):
                    if rows[0].quantized:
                        yield self._aligned(layer, rows, rows[0].megatron.format(slot=slot), None, is_expert=True)

    def _aligned(self, layer: nn.Module, rows: tuple[Weight, ...], name: str, factors: Factors | None, is_expert: bool) -> AlignedLinear:
        ps = parallel_state
        if is_expert:
            size, rank, group = ps.get_expert_tensor_parallel_world_size(), ps.get_expert_tensor_parallel_rank(), _expert_group()
        else:
            size, rank, group = (
                ps.get_tensor_model_parallel_world_size(),
                ps.get_tensor_model_parallel_rank(),
                ps.get_tensor_model_parallel_group(),
            )
        pieces = []
        for part in (part_of(row, self._config.architecture) for row in rows):
            height, width = part.shape
            own = tuple(range(section.start, section.stop) for section in part.pieces(size, rank))
            pieces.append(Piece(own, 0, (height, width)) if part.dim == 0 else Piece((range(height),), own[0].start, (height, width)))
        linear, shared_by = layer.get_submodule(name.removesuffix(".weight")), group if size > 1 else None
        return AlignedLinear(linear, tuple(pieces), shared_by, factors, rounds_later=is_expert and rows[0].tp_dim == 1)

    @torch.no_grad()
    def refresh(self) -> None:
        """Quantise the weights if they have changed. Collective over the ranks that share matrices: one all-reduce for all dense
        layers, and one for experts."""
        if self._is_fresh:
            return
        architecture = self._config.architecture
        stale = [aligned for aligned in self._linears if aligned.weight is None or aligned.changes]
        grids = [
            [piece.block_amax(part, self._fmt) for piece, part in zip(aligned.pieces, aligned.parts(architecture), strict=True)]
            for aligned in stale
        ]
        # In the order of the layers, which is the same on all ranks of a group. Otherwise they could wait for each other.
        for group in dict.fromkeys(aligned.group for aligned in stale if aligned.group is not None):
            shared = [grid for aligned, own in zip(stale, grids, strict=True) if aligned.group is group for grid in own]
            flat = torch.cat([grid.flatten() for grid in shared])
            dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=group)
            for grid, whole in zip(shared, flat.split([grid.numel() for grid in shared]), strict=True):
                grid.copy_(whole.view_as(grid))
        for aligned, amax in zip(stale, grids, strict=True):
            quantized = [
                piece.quantized(part, grid, self._fmt).to(self._dtype)
                for piece, part, grid in zip(aligned.pieces, aligned.parts(architecture), amax, strict=True)
            ]
            aligned.weight = join(quantized, architecture) if len(quantized) > 1 else quantized[0]
        self._is_fresh = True

    def _product(self, aligned: AlignedLinear, product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Megatron's product of the layer, with both factors quantised."""
        columns = aligned.pieces[0]
        is_split = aligned.group is not None and columns.whole[1] != aligned.linear.weight.shape[1]
        first = columns.column if is_split else 0

        def forward(input: Tensor, weight: Tensor, **options: Any) -> Tensor:
            assert self._is_fresh and aligned.weight is not None, "call refresh before the forward pass"
            x = straight_through(input, self._quantize_input(input, first, columns.whole[1], aligned.group if is_split else None))
            if aligned.factors is not None:
                aligned.input = x.detach()
            return product(input=x, weight=straight_through(weight, aligned.weight), **options)

        return forward

    @torch.no_grad()
    def _quantize_input(self, x: Tensor, first: int, whole: int, group: dist.ProcessGroup | None) -> Tensor:
        """`quantize_dequantize_groups` of this rank's columns, which begin at column `first` of `whole`.

        group: the ranks that have the other columns of the same rows; None if this rank has all."""
        if not self._fmt.group:
            return x.to(self._dtype)
        size = min(self._fmt.group, whole)
        left, columns = first % size, x.shape[-1]
        values = x.float()
        padding = (left, -(left + columns) % size)
        groups = (F.pad(values, padding) if any(padding) else values).unflatten(-1, (-1, size))
        amax = groups.abs().amax(-1)
        if group is not None and any(padding):  # a group lies on two ranks
            count, start = -(-whole // size), first // size
            everywhere = F.pad(amax, (start, count - start - amax.shape[-1]))
            dist.all_reduce(everywhere, op=dist.ReduceOp.MAX, group=group)
            amax = everywhere[..., start : start + amax.shape[-1]]
        scale = amax.clamp_(min=MIN_GROUP_AMAX).div_(self._fmt.largest)[..., None]
        quantized = self._fmt.round_scaled(groups / scale).mul_(scale).flatten(-2)[..., left : left + columns]
        return quantized.to(self._dtype)

    def _differentiated(self, aligned: AlignedLinear) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """A hook after the layer, which gives LoRA's factors their gradients. Their product is in the layer's weight already."""

        def hook(linear: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
            assert aligned.factors is not None and aligned.input is not None
            quantized, aligned.input = aligned.input, None
            if not torch.is_grad_enabled():
                return output
            return also_for(output[0], aligned.factors(quantized)), output[1]

        return hook

    def _rounded(self, linear: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """A hook after the layer, whose output is in float32 until it has been summed over ranks. The engine rounds it once, too."""
        return output[0].to(self._model_dtype), output[1]

    def _cached(self, layer: int) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        """A hook before the core attention, which rounds K and V as the engine's cache stores them."""

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            query, key, value, *others = inputs
            assert self.kv_scales is not None
            stored = []
            for x, scale in zip((key, value), self.kv_scales[layer], strict=True):
                with torch.no_grad():
                    rounded = round_to_e4m3(x.float() / scale).mul_(scale).to(self._dtype)
                stored.append(straight_through(x, rounded))
            return query, *stored, *others

        return hook


def _weighted(expert: Callable[[Tensor], tuple[Tensor, None]]) -> Callable[[Tensor, Tensor], tuple[Tensor, None]]:
    """The expert, whose output is multiplied by the probabilities, as the engine does. Megatron multiplies what the last matrix gets."""

    def forward(tokens: Tensor, probabilities: Tensor) -> tuple[Tensor, None]:
        output, no_bias = expert(tokens)
        return output * probabilities[:, None], no_bias

    return forward


def _expert_group() -> dist.ProcessGroup:
    group: dist.ProcessGroup = parallel_state.get_expert_tensor_parallel_group()
    return group
