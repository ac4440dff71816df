"""Block-FP8 quantisation of weights: the fused Triton kernel against plain PyTorch and the memory bandwidth.

    python benchmarks/gpu/quantize.py            [--device cpu --tiny]

Checked first: both give the same bits, with ragged edges, blocks of zeros, ties and subnormals; NaN and infinity are refused.
Weights under 50 MB stay in the second-level cache between rounds, and so may exceed the bandwidth of the memory.
NOT YET RUN ON A GPU. (The kernel's arithmetic is tested in Triton's interpreter, tests/quantization/test_fp8_triton.py.)
"""

from __future__ import annotations

import importlib.util
from functools import partial

import torch
from bench import Bench, ms, number, ratio, share

from ais_megatron.quantization import fp8


def main() -> None:
    bench = Bench(__doc__)
    has_kernel = bench.on_gpu and importlib.util.find_spec("triton") is not None and fp8._fused_agrees(bench.device, fp8.BLOCK)
    if not has_kernel:
        bench.skip("the fused kernel", "it needs CUDA, Triton, capability 8.9, and to agree with plain PyTorch")
    small = [(256, 384), (130, 5), (1, 1), (300, 257)]
    for dtype in (torch.bfloat16, torch.float32):
        for shape in small:
            weight = (torch.randn(shape) * 0.02).to(dtype).to(bench.device)
            weight[: shape[0] // 3] = 0.0
            check(bench, weight)
    check(bench, torch.tensor([[448.0, 17.0, 19.0, 0.00146484375, -0.0029296875, 464.0, -0.0]], device=bench.device))
    for bad in (float("nan"), float("inf")):
        weight = torch.ones(130, 130, device=bench.device)
        weight[129, 3] = bad
        try:
            fp8.quantize_block(weight)
            refused = False
        except ValueError:
            refused = True
        bench.check(f"{bad} is refused", refused)

    bench.columns("weight", "variant", "time", "ratio to plain", "GB/s", "of peak")
    for rows, columns in [(256, 256)] if bench.tiny else [(4096, 4096), (12288, 4096), (768, 2048), (16384, 16384)]:
        weight = (torch.randn(rows, columns) * 0.02).to(torch.bfloat16).to(bench.device)
        moved = weight.numel() * 3  # two bytes read, one written
        plain = bench.time(partial(fp8._quantize_plain, weight, fp8.FP8_E4M3))
        bench.row(
            f"{rows}x{columns}",
            "plain",
            ms(plain),
            ratio(1, 1),
            number(moved / plain / 1e9, "GB/s"),
            share(moved / plain, bench.peak_bytes),
        )
        if has_kernel:
            from ais_megatron.quantization.fp8_triton import quantize_block_fused

            fused = bench.time(partial(quantize_block_fused, weight, fp8.BLOCK, fp8.E4M3_MAX))
            rate = moved / fused
            bench.row(
                f"{rows}x{columns}", "fused", ms(fused), ratio(plain, fused), number(rate / 1e9, "GB/s"), share(rate, bench.peak_bytes)
            )
    bench.finish()


def check(bench: Bench, weight: torch.Tensor) -> None:
    """What a sync would use, against plain PyTorch on the CPU."""
    q, scale = fp8.quantize_block(weight)
    expected_q, expected_scale = fp8._quantize_plain(weight.cpu(), fp8.FP8_E4M3)
    same = torch.equal(q.cpu().view(torch.uint8), expected_q.view(torch.uint8)) and torch.equal(scale.cpu(), expected_scale)
    bench.check(f"{list(weight.shape)} {weight.dtype}: bits of the plain path on a CPU", same)


if __name__ == "__main__":
    main()
