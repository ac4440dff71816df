"""Block FP8 (E4M3) in plain PyTorch: what the policy's weights become before they are sent, and what an engine makes of activations.

Weights: one float32 scale per 128x128 block; activations: one per row and 128 columns, measured as they come:
    scale = amax / 448,   q = round_E4M3(x / scale),   x ~ q * scale.
The layout (``X.weight`` with ``X.weight_scale_inv``, which multiplies) is that of DeepSeek-V3's technical report, section
3.3.2, and of SGLang and vLLM for ``weight_block_size: [128, 128]``. E4M3FN has no infinity, so an overflowing cast would
give NaN: values are clamped to +-448 first. Runs on CPU and CUDA.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
BLOCK = 128

_SMALLEST_NORMAL = 2.0**-6  # below it the grid of E4M3 is uniform, 2**-9 apart
_EXPONENT_BITS = 0x7F800000  # of a float32
_MIN_GROUP_AMAX = 1e-10  # as in SGLang's kernel: an all-zero group must not become 0/0

_QUANTIZED = re.compile(
    r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj|mlp\.experts\.\d+\.(gate|up|down)_proj)\.weight"
)


def is_quantized_weight(hf_name: str) -> bool:
    """Whether the tensor of that Hugging Face name is one of the decoder layers' projections, the only ones kept in FP8.

    The pattern names what is quantised and matches whole names, so a router (``mlp.gate.weight``), a norm, an embedding or
    a head can never slip in.
    """
    return _QUANTIZED.fullmatch(hf_name) is not None


def quantize_block(weight: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Quantise a matrix in square blocks; the last row and column of blocks may be ragged.

    Args:
        weight: bfloat16 or float32 ``[N, K]``.
    Returns:
        q: float8_e4m3fn ``[N, K]``.
        scale_inv: float32 ``[ceil(N/block), ceil(K/block)]``, amax/448 of each block, 1.0 for an all-zero block.
    Raises:
        ValueError: not a matrix, or it holds NaN or infinity.
    """
    if weight.dim() != 2:
        raise ValueError(f"only a matrix [N, K] can be quantised in blocks, got shape {list(weight.shape)}")
    rows, columns = weight.shape
    q = torch.empty(rows, columns, dtype=E4M3, device=weight.device)
    # On a CPU one row of blocks at a time, whose float32 form stays in the cache; on a GPU one set of kernels for all.
    step = block if weight.device.type == "cpu" else max(rows, 1)
    scales = [_quantize_rows(weight[i : i + step], q[i : i + step], block) for i in range(0, rows, step)]
    scale_inv = torch.cat(scales) if scales else torch.empty(0, -(-columns // block), device=weight.device)
    if not torch.isfinite(scale_inv).all():  # a block's amax carries NaN and infinity along
        raise ValueError("the weight holds NaN or infinity, so it has no FP8 form; the update before this sync has diverged")
    return q, scale_inv


def _quantize_rows(weight: Tensor, into: Tensor, block: int) -> Tensor:
    """Write the FP8 form of whole rows of blocks; returns their scales."""
    rows, columns = weight.shape
    values = weight.to(torch.float32, copy=True)
    if rows % block or columns % block:
        values = F.pad(values, (0, -columns % block, 0, -rows % block))
    by_column = values.abs().unflatten(0, (-1, block)).amax(1)  # (this order of the two maxima is the one that vectorises)
    scale = by_column.unflatten(1, (-1, block)).amax(2) / E4M3_MAX
    scale = torch.where(scale == 0, 1.0, scale)
    blocks = values.unflatten(1, (-1, block)).unflatten(0, (-1, block))  # [row blocks, block, column blocks, block]
    blocks.div_(scale[:, None, :, None]).clamp_(-E4M3_MAX, E4M3_MAX)
    into.copy_(values[:rows, :columns])
    return scale


def dequantize_block(q: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32, block: int = BLOCK) -> Tensor:
    """The values that `quantize_block`'s result stands for: ``[N, K]``, multiplied in float32 and rounded once to `dtype`.

    Raises:
        ValueError: `scale_inv` has not one entry for each block of `q`.
    """
    rows, columns = q.shape
    expected = (-(-rows // block), -(-columns // block))
    if tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"scale_inv has shape {list(scale_inv.shape)}; a weight {list(q.shape)} in blocks of {block} needs {list(expected)}"
        )
    scale = scale_inv.float().repeat_interleave(block, 0)[:rows].repeat_interleave(block, 1)[:, :columns]
    return (q.float() * scale).to(dtype)


def round_to_e4m3(x: Tensor) -> Tensor:
    """The float32 values of ``clamp(x, -448, 448).to(float8_e4m3fn)``, bit for bit (also NaN and the sign of zero), and faster.

    The CPU's cast from FP8 back to float32 takes 3-5 ns an element, thrice all else together. Instead: with 2**e the power
    of two below |x| (not under 2**-6, where E4M3 turns subnormal), its grid is 2**(e-3) apart, which is also how far apart
    float32 values near 1.5 * 2**(e+20) are. Adding that number and subtracting it again therefore rounds x to the
    grid, to nearest and ties to even, as the cast does.

    Args:
        x: float32, any shape.
    """
    return _round_to_grid(x.clamp(-E4M3_MAX, E4M3_MAX)).copysign_(x)


def _round_to_grid(x: Tensor) -> Tensor:
    """`round_to_e4m3` for ``|x| < 464`` (which still rounds to 448), up to the sign of zero: all zeros come out positive."""
    anchor = (x.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    anchor.clamp_(min=_SMALLEST_NORMAL).mul_(1.5 * 2.0**20)
    return (x + anchor).sub_(anchor)


def quantize_dequantize_groups(x: Tensor, group: int = BLOCK) -> Tensor:
    """What a dynamically quantised FP8 linear layer sees of its input.

    Each row's groups of `group` neighbouring columns (the last may be ragged) are scaled by their own amax/448, rounded to
    E4M3 and scaled back.

    Args:
        x: bfloat16 or float32 ``[..., K]``.
    Returns:
        float32 ``[..., K]``: a BF16 result would round a second time.
    """
    columns = x.shape[-1]
    group = min(group, columns)  # one ragged group is a whole one of its own width, and needs no padding
    padded = F.pad(x.float(), (0, -columns % group)) if columns % group else x.float()
    groups = padded.unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True).clamp_(min=_MIN_GROUP_AMAX).div_(E4M3_MAX)
    # No clamp: |groups / scale| exceeds 448 by float32's rounding at most, which the grid takes back to 448.
    return _round_to_grid(groups / scale).mul_(scale).flatten(-2)[..., :columns]


def quantize_bucket(bucket: Iterable[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """Replace each projection ``X.weight`` by its FP8 form and ``X.weight_scale_inv``; pass everything else unchanged.

    Args:
        bucket: (Hugging Face name, tensor) pairs; the projections bfloat16 or float32 ``[N, K]`` and whole, not a TP shard:
            a shard's edge need not fall on a block's.
    Raises:
        ValueError: a projection that cannot be quantised, named.
    """
    quantized = []
    for name, tensor in bucket:
        if not is_quantized_weight(name):
            quantized.append((name, tensor))
            continue
        try:
            q, scale_inv = quantize_block(tensor)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        quantized += [(name, q), (name.removesuffix("weight") + "weight_scale_inv", scale_inv)]
    return quantized
