"""A linear layer with blockwise quantised weights and dynamically quantised inputs, in any of `formats`, emulated.

    y = dequantize(round(x / s_x)) @ dequantize(q, scale_inv).T,    products and sums in float32.

The pushed q and scale_inv stay unchanged. The matmul uses a dequantised copy, which is made once per update. The copy is float32. E4M3
times a float32 scale has up to 28 significant bits, and BF16 would drop most of them and so quantise a second time. (BF16 could hold the
E4M3 values without scales, but its matmul rounds the sum of each group to 8 bits before the scales are applied. On a CPU it would save a
third of the matmul's time, about a tenth of a decode step.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ais_megatron.models.registry import is_quantized_weight
from ais_megatron.quantization.formats import FP8_E4M3, Format
from ais_megatron.quantization.fp8 import dequantize_block, quantize_dequantize_groups


class InputQuantizer:
    """`quantize_dequantize_groups` with a cache for its last input, because q/k/v and gate/up read the same tensor one after another.

    All layers of a model share one. It compares inputs by identity, so a tensor must not be changed in place between two calls.
    """

    def __init__(self, fmt: Format = FP8_E4M3) -> None:
        self.format = fmt
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        output = self._output
        if output is None or x is not self._input:
            output = quantize_dequantize_groups(x, self.format)
            self._input, self._output = x, output
        return output

    def forget(self) -> None:
        """Release the memory of the last input."""
        self._input = self._output = None


class QuantizedLinear(nn.Module):
    """Replaces `nn.Linear`.

    weight is ``[out, in]`` in the format's dtype. weight_scale_inv is float32, one per block of the format. bias is ``[out]`` in the
    model's dtype, or None. Copy into them, then call `refresh`. The product is rounded to the model's dtype before the bias is added,
    as in SGLang. Input and output are ``[..., in]`` and ``[..., out]`` in the model's dtype. The layer is written for CPU and CUDA. It
    has not been run on a GPU. There it would not need FP8 hardware, and would not use it.
    """

    weight: Tensor
    weight_scale_inv: Tensor
    dequantized: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        quantizer: InputQuantizer,
        device: torch.device | None = None,
        bias: torch.dtype | None = None,
    ) -> None:
        """bias: dtype of the bias; None: no bias."""
        super().__init__()
        fmt, shape = quantizer.format, (out_features, in_features)
        self.register_buffer("weight", torch.empty(shape, dtype=fmt.dtype, device=device))
        self.register_buffer("weight_scale_inv", torch.empty(fmt.scales_shape(shape), dtype=torch.float32, device=device))
        self.register_buffer("dequantized", torch.empty(shape, dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("bias", None if bias is None else torch.empty(out_features, dtype=bias, device=device))
        self.quantizer = quantizer

    def refresh(self) -> None:
        """Update the dequantised copy in place."""
        self.dequantized.copy_(dequantize_block(self.weight, self.weight_scale_inv, fmt=self.quantizer.format))

    def forward(self, x: Tensor) -> Tensor:
        product = F.linear(self.quantizer(x), self.dequantized).to(x.dtype)
        return product if self.bias is None else product + self.bias


def replace_linears(model: nn.Module, fmt: Format) -> InputQuantizer:
    """Replace every quantised projection by a `QuantizedLinear`. Returns the quantiser that they share."""
    quantizer = InputQuantizer(fmt)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_quantized_weight(f"{name}.weight"):
            bias = None if module.bias is None else module.bias.dtype
            quantized = QuantizedLinear(module.in_features, module.out_features, quantizer, module.weight.device, bias)
            model.set_submodule(name, quantized)
    return quantizer
