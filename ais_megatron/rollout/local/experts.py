"""The experts of a MoE layer, in the model's dtype or in an emulated quantised format, and the record of the chosen experts.

    y = sum over the token's chosen experts e of  p_e * down_e(silu(gate_e(x)) * up_e(x))

transformers keeps the gate and up projections of all experts in one parameter, and so do these modules. But tensors arrive and leave
per expert, under the names that checkpoints and SGLang use. The router is that of transformers.

Tokens are sorted by expert and go through two `grouped_mm`. Alternatives were measured on one CPU core with 8, 16 and 64 experts, hidden
size 128 and 8 to 2048 tokens, in float32 (which FP8 emulation uses). A loop over the experts takes 1.0 to 1.8 times as long. A bmm over
groups that are padded to the longest takes 0.9 to 1.7 times as long, and has no bound if the router is unbalanced. Computing all experts
for all tokens saves 0.1 ms at 8 tokens with 8 experts, and takes two to ten times as long at 2048 tokens. In BF16 the padded bmm would be
a tenth to a third faster at 256 tokens with 8 or 16 experts, but rollouts that are not quantised do not justify a second path.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from ais_megatron.batch import routes_dtype
from ais_megatron.config import Architecture
from ais_megatron.quantization.formats import FP8_E4M3, Format
from ais_megatron.quantization.fp8 import dequantize_block, quantize_dequantize_groups

_MULTIPLE = 8  # grouped_mm needs rows whose size is a multiple of 16 bytes: 8 BF16 values


class RoutingRecord:
    """The experts that each layer chose in the model's latest forward pass."""

    def __init__(self, num_layers: int, num_experts: int) -> None:
        self._num_layers = num_layers
        self._layers: dict[int, Tensor] = {}
        self._dtype = routes_dtype(num_experts)

    def put(self, layer: int, chosen: Tensor) -> None:
        """chosen: int64 ``[tokens, experts_per_token]``."""
        self._layers[layer] = chosen

    def latest(self) -> Tensor:
        """`routes_dtype` ``[tokens, num_layers, experts_per_token]``."""
        return torch.stack([self._layers[layer] for layer in range(self._num_layers)], dim=1).to(self._dtype)


class Experts(nn.Module):
    """Replaces transformers' `Qwen3MoeExperts`.

    gate_up is ``[num_experts, 2 (gate, up), intermediate, hidden]`` and down is ``[num_experts, hidden, intermediate]``, both in
    `dtype`. They are filled through the views from `named_tensors`.

    Raises:
        ValueError: `grouped_mm` does not support the sizes.
    """

    gate_up: Tensor
    down: Tensor

    def __init__(self, architecture: Architecture, dtype: torch.dtype) -> None:
        super().__init__()
        experts, size, hidden = architecture.num_experts, architecture.moe_intermediate_size, architecture.hidden_size
        if size % _MULTIPLE or hidden % _MULTIPLE:
            raise ValueError(
                f"model.architecture: hidden_size={hidden} and moe_intermediate_size={size} must be multiples of {_MULTIPLE} "
                "for the local engine"
            )
        # Not in the state dict, because there they would have names that are never pushed.
        self.register_buffer("gate_up", torch.empty(experts, 2, size, hidden, dtype=dtype), persistent=False)
        self.register_buffer("down", torch.empty(experts, hidden, size, dtype=dtype), persistent=False)
        self.layer = 0
        self.record: RoutingRecord | None = None

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of every expert as views, with their names after ``mlp.experts.``."""
        yield from _per_expert(self.gate_up, self.down, "weight")

    def matrices(self) -> tuple[Tensor, Tensor]:
        """`gate_up` and `down` as the matrix products use them."""
        return self.gate_up, self.down

    def quantize_input(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor, chosen: Tensor, probs: Tensor) -> Tensor:
        """
        Args:
            x: ``[tokens, hidden]`` in the model's dtype.
            chosen: int64 ``[tokens, experts_per_token]``, likeliest first.
            probs: ``[tokens, experts_per_token]``, the weights of the chosen experts' outputs.
        Returns:
            ``[tokens, hidden]`` in x's dtype; weighted and summed in float32, rounded once.
        """
        if self.record is not None:
            self.record.put(self.layer, chosen)
        gate_up, down = self.matrices()
        expert, order = chosen.flatten().sort(stable=True)  # of the (token, choice) pairs
        ends = torch.searchsorted(expert, torch.arange(len(down), device=x.device), right=True, out_int32=True)
        rows = self.quantize_input(x)[order // chosen.shape[1]]
        projected = F.grouped_mm(rows, gate_up.flatten(1, 2).transpose(1, 2), offs=ends).to(x.dtype)
        gate, up = projected.chunk(2, -1)
        inner = self.quantize_input(F.silu(gate).mul_(up))
        out = F.grouped_mm(inner, down.transpose(1, 2), offs=ends)
        back = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=x.device))
        out = out[back].view(*chosen.shape, -1).float()
        return out.mul_(probs[..., None]).sum(1).to(x.dtype)


class QuantizedExperts(Experts):
    """Experts with quantised weights and inputs, as in `QuantizedLinear`. The matrices of each expert have their own blocks.

    gate_up and down have the format's dtype. gate_up_scale_inv is float32 ``[num_experts, 2, *blocks of a matrix]``, for the FP8 formats
    ``[num_experts, 2, ceil(intermediate/128), ceil(hidden/128)]``. down_scale_inv is the same without the 2. Fill them, then call
    `refresh`. Products and sums are float32 and use a dequantised copy.
    """

    gate_up_scale_inv: Tensor
    down_scale_inv: Tensor
    dequantized_gate_up: Tensor
    dequantized_down: Tensor

    def __init__(self, architecture: Architecture, fmt: Format = FP8_E4M3) -> None:
        super().__init__(architecture, fmt.dtype)
        self.format = fmt
        experts, _, size, hidden = self.gate_up.shape
        for name, shape in (
            ("gate_up_scale_inv", (experts, 2, *fmt.scales_shape((size, hidden)))),
            ("down_scale_inv", (experts, *fmt.scales_shape((hidden, size)))),
            ("dequantized_gate_up", self.gate_up.shape),
            ("dequantized_down", self.down.shape),
        ):
            self.register_buffer(name, torch.empty(shape, dtype=torch.float32), persistent=False)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from _per_expert(self.gate_up, self.down, "weight")
        yield from _per_expert(self.gate_up_scale_inv, self.down_scale_inv, "weight_scale_inv")

    def matrices(self) -> tuple[Tensor, Tensor]:
        return self.dequantized_gate_up, self.dequantized_down

    def quantize_input(self, x: Tensor) -> Tensor:
        return quantize_dequantize_groups(x, self.format)

    def refresh(self) -> None:
        """Update the dequantised copies in place."""
        for q, scale_inv, copy in (
            (self.gate_up.flatten(0, 1), self.gate_up_scale_inv.flatten(0, 1), self.dequantized_gate_up.flatten(0, 1)),
            (self.down, self.down_scale_inv, self.dequantized_down),
        ):
            for matrix, scale, destination in zip(q, scale_inv, copy, strict=True):
                destination.copy_(dequantize_block(matrix, scale, fmt=self.format))


def _per_expert(gate_up: Tensor, down: Tensor, kind: str) -> Iterator[tuple[str, Tensor]]:
    for expert, ((gate, up), matrix) in enumerate(zip(gate_up, down, strict=True)):
        yield f"{expert}.gate_proj.{kind}", gate
        yield f"{expert}.up_proj.{kind}", up
        yield f"{expert}.down_proj.{kind}", matrix


def replace_experts(
    causal_lm: PreTrainedModel, architecture: Architecture, dtype: torch.dtype, fmt: Format | None, record: bool
) -> RoutingRecord | None:
    """Replace the experts in every layer of a Qwen3-MoE model by experts in `dtype`, or quantised to `fmt`. Returns their routing record
    if one is requested."""
    routing = RoutingRecord(architecture.num_hidden_layers, architecture.num_experts) if record else None
    for number, layer in enumerate(causal_lm.model.layers):
        layer.mlp.experts = QuantizedExperts(architecture, fmt) if fmt else Experts(architecture, dtype)
        layer.mlp.experts.layer, layer.mlp.experts.record = number, routing
    return routing


def named_expert_tensors(causal_lm: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face name and the memory of the tensors of every expert. Empty for a dense model."""
    for name, module in causal_lm.named_modules():
        if isinstance(module, Experts):
            yield from ((f"{name}.{suffix}", tensor) for suffix, tensor in module.named_tensors())
