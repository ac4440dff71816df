"""The fused quantisation: bits of the plain path in Triton's interpreter, and never used on a CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from ais_megatron.quantization import fp8
from ais_megatron.quantization.fp8 import quantize_block

HAS_TRITON = importlib.util.find_spec("triton") is not None


def test_a_cpu_takes_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "_fused_agrees", lambda device, block: pytest.fail("asked for the kernel on a CPU"))
    q, scale = quantize_block(torch.ones(130, 5, dtype=torch.bfloat16))
    assert (q.float() == 448).all() and (scale == 1 / 448).all() and scale.shape == (2, 1)
    assert "ais_megatron.quantization.fp8_triton" not in sys.modules


@pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed; with a CPU torch: pip install --no-deps triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU benchmarks/gpu/quantize.py compares the compiled kernel")
def test_bits_of_the_plain_path_in_the_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when Triton is imported
    subprocess.run([sys.executable, "-m", "tests.quantization.test_fp8_triton"], check=True, env=environment, timeout=360)


def compare() -> None:
    from ais_megatron.quantization.fp8_triton import quantize_block_fused

    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        for rows, columns in ((128, 128), (256, 384), (130, 5), (1, 1), (127, 257)):
            for size in (0.02, 1e4, 1e-30):
                weight = (torch.randn(rows, columns, generator=generator) * size).to(dtype)
                weight[: rows // 3] = 0.0
                weight[-1, ::2] = -0.0
                check(weight, quantize_block_fused)
    zeros = torch.zeros(300, 140)
    zeros[299, 139] = 1e-44  # subnormal: amax / 448 is 0, so the scale is 1
    check(zeros, quantize_block_fused)
    ties = torch.tensor([448.0, 17.0, 19.0, 0.00146484375, -0.0029296875, 464.0, 440.0])[None].repeat(3, 1)
    check(ties, quantize_block_fused)
    check(torch.randn(200, 300, generator=generator).t(), quantize_block_fused)  # not contiguous
    for bad in (float("nan"), float("inf")):
        weight = torch.randn(256, 128, generator=generator)
        weight[200, 7] = bad
        assert torch.isfinite(quantize_block_fused(weight, 128, 448.0)[1]).tolist() == [[True], [False]]


def check(weight: torch.Tensor, fused) -> None:
    q, scale = fused(weight, 128, 448.0)
    expected_q, expected_scale = quantize_block(weight)
    assert torch.equal(scale, expected_scale), (weight.shape, scale, expected_scale)
    assert torch.equal(q.view(torch.uint8), expected_q.view(torch.uint8)), weight.shape


if __name__ == "__main__":
    compare()
