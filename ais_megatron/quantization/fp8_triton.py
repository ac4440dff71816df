"""`fp8.quantize_block` as one Triton kernel. It reads the weight once and writes q once; plain PyTorch reads the weight six times.

    scale = amax / 448,   q = round_E4M3(clamp(x / scale)),   one program per 128x128 block

q and scale_inv equal those of `quantize_block`, bit for bit. Therefore divisions are IEEE divisions (Triton's own are approximate), a
block of zeros has scale 1.0, and a block with NaN or infinity has a scale that is not finite, which the caller refuses. The rounding is
the arithmetic of `fp8.round_to_e4m3`. Its result is exact in E4M3, so it does not matter how the cast rounds (in Triton's interpreter
it does not round to even). `fp8.quantize_block` uses the kernel only on CUDA from compute capability 8.9 on, which has the cast. Tested in
Triton's interpreter on a CPU. Not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WARPS = 8


@triton.jit
def _quantize_kernel(x_ptr, q_ptr, scale_ptr, rows, columns, x_stride, scale_stride, BLOCK: tl.constexpr, LARGEST: tl.constexpr):  # noqa: ANN001, ANN202, N803
    block_row, block_column = tl.program_id(0), tl.program_id(1)
    row = (block_row * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[:, None]
    column = (block_column * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)[None, :]
    inside = (row < rows) & (column < columns)
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    magnitude = tl.where(x == x, tl.abs(x), float("inf"))  # the hardware's maximum would ignore NaN
    amax = tl.max(tl.max(magnitude, 1), 0)
    scale = tl.div_rn(amax, tl.full((), LARGEST, tl.float32))
    scale = tl.where(scale > 0.0, scale, 1.0)
    tl.store(scale_ptr + block_row * scale_stride + block_column, scale)
    y = tl.div_rn(x, tl.broadcast_to(scale, (BLOCK, BLOCK)))
    y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
    bits = y.to(tl.int32, bitcast=True)
    anchor = (bits & 0x7F800000).to(tl.float32, bitcast=True)
    anchor = tl.maximum(anchor, 0.015625) * 1572864.0  # below 2**-6 E4M3 is uniform; the factor is 1.5 * 2**20
    rounded = ((y + anchor) - anchor).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    rounded = (rounded | (bits & -2147483648)).to(tl.float32, bitcast=True)  # a negative that rounds to zero stays negative
    tl.store(q_ptr + row * columns + column, rounded.to(tl.float8e4nv), mask=inside)


def quantize_block_fused(weight: Tensor, block: int, largest: float) -> tuple[Tensor, Tensor]:
    """(q float8_e4m3fn ``[N, K]``, scale_inv float32 ``[ceil(N/block), ceil(K/block)]``) of bfloat16 or float32 ``[N, K]``.

    Args:
        block: a power of two.
        largest: of E4M3, 448.
    """
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    rows, columns = weight.shape
    grid = (triton.cdiv(rows, block), triton.cdiv(columns, block))
    q = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=weight.device)
    scale = torch.empty(grid, dtype=torch.float32, device=weight.device)
    if weight.numel():
        _quantize_kernel[grid](
            weight, q, scale, rows, columns, weight.stride(0), scale.stride(0), BLOCK=block, LARGEST=largest, num_warps=_WARPS
        )
    return q, scale
