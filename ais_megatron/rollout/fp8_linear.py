"""A linear layer with block-FP8 weights and dynamically quantised inputs, emulated.

    y = dequantize(round(x / s_x)) @ dequantize(q, scale_inv).T,    products and sums in float32.

The pushed q and scale_inv are the truth and stay as they came; the matmul reads a dequantised copy made once per update.
That copy is float32: E4M3 times a float32 scale has up to 28 significant bits, of which BF16 would drop most and so
quantise a second time. (BF16 could hold the bare E4M3 values, but its matmul rounds each group's sum to 8 bits before the
scales are applied; on a CPU it saves a third of the matmul's time, about a tenth of a decode step.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ais_megatron.quantization.fp8 import BLOCK, E4M3, dequantize_block, is_quantized_weight, quantize_dequantize_groups


class InputQuantizer:
    """`quantize_dequantize_groups`, which remembers its last input: q/k/v and gate/up read the same tensor one after another.

    One serves all layers of a model. It compares by identity, so the tensor must not be changed in place in between.
    """

    def __init__(self) -> None:
        self._input: Tensor | None = None
        self._output: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if x is not self._input:
            self._input, self._output = x, quantize_dequantize_groups(x)
        return self._output

    def forget(self) -> None:
        """Let go of the last activations' memory."""
        self._input = self._output = None


class FP8Linear(nn.Module):
    """In place of `nn.Linear` without bias.

    weight: float8_e4m3fn ``[out, in]``; weight_scale_inv: float32 ``[ceil(out/128), ceil(in/128)]``. Copy into them, then
    call `refresh`. Input and output are ``[..., in]`` and ``[..., out]`` in the model's dtype. Written for CPU and CUDA
    alike; it has not been run on a GPU, where it would need no FP8 hardware, nor profit from it.
    """

    def __init__(self, in_features: int, out_features: int, quantizer: InputQuantizer, device: torch.device | None = None) -> None:
        super().__init__()
        blocks = (-(-out_features // BLOCK), -(-in_features // BLOCK))
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=E4M3, device=device))
        self.register_buffer("weight_scale_inv", torch.empty(blocks, dtype=torch.float32, device=device))
        self.register_buffer("dequantized", torch.empty(out_features, in_features, dtype=torch.float32, device=device), persistent=False)
        self.quantizer = quantizer

    def refresh(self) -> None:
        """Make the dequantised copy anew, in place."""
        self.dequantized.copy_(dequantize_block(self.weight, self.weight_scale_inv))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.quantizer(x), self.dequantized).to(x.dtype)


def replace_linears(model: nn.Module) -> InputQuantizer:
    """Put an `FP8Linear` in the place of every projection that is kept in FP8; they share the quantiser that is returned."""
    quantizer = InputQuantizer()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and is_quantized_weight(f"{name}.weight"):
            model.set_submodule(name, FP8Linear(module.in_features, module.out_features, quantizer, module.weight.device))
    return quantizer
