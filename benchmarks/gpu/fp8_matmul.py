"""Block-FP8 matrix products: torch's scaled_mm with 1x128 and 128x128 scales against BF16 and the embedded engine's emulation.

    python benchmarks/gpu/fp8_matmul.py          [--device cpu --tiny]

The embedded engine multiplies dequantised float32 copies (rollout/quantized_linear.py). Checked first: that against its definition;
then scaled_mm against the emulation, on the same codes and scales. Where torch has no product for this layout, the reason
is printed. NOT YET RUN ON A GPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bench import Bench, ms, number, ratio, share
from torch import Tensor

from ais_megatron.quantization.fp8 import BLOCK, E4M3, E4M3_MAX, dequantize_block, quantize_block, quantize_dequantize_groups
from ais_megatron.rollout.local.quantized_linear import InputQuantizer, QuantizedLinear


def quantize_groups(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[tokens, K]`` and scales float32 ``[tokens, K/128]``, outer dimension major as cuBLAS wants them."""
    groups = x.float().unflatten(-1, (-1, BLOCK))
    scale = groups.abs().amax(-1).clamp_(min=1e-10) / E4M3_MAX
    codes = (groups / scale[..., None]).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3).flatten(-2)
    return codes, scale.t().contiguous().t()


def product(x: Tensor, q: Tensor, weight_scale: Tensor) -> Tensor:
    """x ``[tokens, K]`` BF16 times q ``[N, K]``, quantising x on the way; raises what torch raises where it has no such product."""
    codes, x_scale = quantize_groups(x)
    padded = F.pad(weight_scale, (0, -weight_scale.shape[1] % 4)).t()  # cuBLAS: K/128 rounded up to 4, and major
    kinds = F.ScalingType
    return F.scaled_mm(codes, q.t(), x_scale, kinds.BlockWise1x128, padded, kinds.BlockWise128x128, output_dtype=torch.bfloat16)


def close(a: Tensor, b: Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def main() -> None:
    bench = Bench(__doc__)
    shapes = [(256, 256)] if bench.tiny else [(6144, 4096), (24576, 4096), (4096, 12288)]
    with torch.inference_mode():
        weight = (torch.randn(256, 384) * 0.02).to(torch.bfloat16).to(bench.device)
        x = torch.randn(32, 384, dtype=torch.bfloat16, device=bench.device)
        emulated = linear(weight)
        definition = quantize_dequantize_groups(x) @ dequantize_block(emulated.weight, emulated.weight_scale_inv).t()
        error = close(emulated(x), definition)
        bench.check("emulation against its definition", error < 5e-3, f"relative {error:.1e}")
        reason = unsupported(x, emulated)
        if reason:
            bench.skip("scaled_mm", reason)
        else:
            error = close(product(x, emulated.weight, emulated.weight_scale_inv), emulated(x))
            bench.check("scaled_mm against the emulation", error < 1e-2, f"relative {error:.1e}")

        bench.columns("weight", "tokens", "variant", "time", "ratio to BF16", "TFLOP/s", "of BF16 peak")
        for out, size in shapes:
            weight = (torch.randn(out, size) * 0.02).to(torch.bfloat16).to(bench.device)
            emulated = linear(weight)
            for tokens in (8,) if bench.tiny else (1, 64, 512, 8192):
                x = torch.randn(tokens, size, dtype=torch.bfloat16, device=bench.device)
                variants = {"BF16": lambda x=x, w=weight: F.linear(x, w)}
                if not reason:
                    variants["FP8 scaled_mm"] = lambda x=x, m=emulated: product(x, m.weight, m.weight_scale_inv)
                variants["FP8 emulated"] = lambda x=x, m=emulated: fresh(m, x)
                base = 0.0
                for name, work in variants.items():
                    seconds = bench.time(work)
                    base, rate = base or seconds, 2 * tokens * out * size / seconds
                    bench.row(
                        f"{out}x{size}",
                        tokens,
                        name,
                        ms(seconds),
                        ratio(base, seconds),
                        number(rate / 1e12, "TFLOP/s", ".2f"),
                        share(rate, bench.peak_flops),
                    )
    bench.finish()


def linear(weight: Tensor) -> QuantizedLinear:
    module = QuantizedLinear(weight.shape[1], weight.shape[0], InputQuantizer(), weight.device)
    for destination, source in zip((module.weight, module.weight_scale_inv), quantize_block(weight), strict=True):
        destination.copy_(source)
    module.refresh()
    return module


def fresh(module: QuantizedLinear, x: Tensor) -> Tensor:
    """Without the memory of its last input, which a timing loop would profit from."""
    module.quantizer.forget()
    return module(x)


def unsupported(x: Tensor, module: QuantizedLinear) -> str | None:
    """Why torch cannot multiply in this layout here; None if it can."""
    if not x.is_cuda:
        return "block scales are implemented for CUDA only"
    if not hasattr(F, "scaled_mm"):
        return f"torch {torch.__version__} has no torch.nn.functional.scaled_mm"
    try:
        product(x, module.weight, module.weight_scale_inv)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return None


if __name__ == "__main__":
    main()
