"""Blockwise quantisation in plain PyTorch: of the policy's weights before they are sent, and of activations inside an engine.

The default is E4M3, with one float32 scale per 128x128 block of a weight, and one per row and 128 columns of activations (see
`rollout.weight_block`).
Activation scales are computed at run time. `formats` lists the other formats.
    scale = amax / 448,   q = round_E4M3(x / scale),   x ~ q * scale.
The layout is ``X.weight`` with ``X.weight_scale_inv``, by which q is multiplied. It is that of DeepSeek-V3's technical report, section
3.3.2, and of SGLang and vLLM for ``weight_block_size: [128, 128]``. E4M3FN has no infinity, so a cast that overflows would give
NaN. Values are therefore clamped to +-448 first. Runs on CPU and CUDA.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from ais_megatron.models.registry import is_quantized_weight
from ais_megatron.quantization.formats import FP8_E4M3, Format

logger = logging.getLogger(__name__)

E4M3 = FP8_E4M3.dtype
E4M3_MAX = FP8_E4M3.largest
BLOCK = FP8_E4M3.group

MIN_GROUP_AMAX = 1e-10  # as in SGLang's kernel, so that a group of zeros does not become 0/0
_CAST_CAPABILITY = (8, 9)  # the first CUDA compute capability on which Triton can cast to E4M3


def quantize_block(weight: Tensor, fmt: Format = FP8_E4M3) -> tuple[Tensor, Tensor]:
    """Quantise a matrix in blocks. The blocks at the right and lower edge may be smaller.

    Args:
        weight: bfloat16 or float32 ``[N, K]``.
    Returns:
        q: ``[N, K]`` in the format's dtype.
        scale_inv: float32, one per block, ``[ceil(N/block), ceil(K/block)]`` for the FP8 formats. It is amax / largest, or 1.0
            for a block of zeros.
    Raises:
        ValueError: `weight` is not a matrix, or holds NaN or infinity.
    """
    if weight.dim() != 2:
        raise ValueError(f"only a matrix [N, K] can be quantised in blocks, got shape {list(weight.shape)}")
    if weight.is_cuda and fmt.name == FP8_E4M3.name and _fused_agrees(weight.device, fmt.group):
        from ais_megatron.quantization.fp8_triton import quantize_block_fused

        q, scale_inv = quantize_block_fused(weight, fmt.group, E4M3_MAX)
    else:
        q, scale_inv = _quantize_plain(weight, fmt)
    if not torch.isfinite(scale_inv).all():  # NaN and infinity in a block are in its amax too
        raise ValueError(
            f"the weight holds NaN or infinity and cannot be quantised to {fmt.name}; the update before this sync has diverged"
        )
    return q, scale_inv


def _quantize_plain(weight: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """`quantize_block` without its checks. A block with NaN or infinity gets a scale that is not finite."""
    if weight.device.type == "cpu" and fmt.is_fp8 and weight.numel():
        return _quantize_fp8_on_cpu(weight, fmt)
    rows, columns = weight.shape
    q = torch.empty(rows, columns, dtype=fmt.dtype, device=weight.device)
    # On a CPU a few rows of blocks at a time, so that their float32 values stay in the cache. On a GPU all at once.
    step = max(fmt.weight_block[0], BLOCK) if weight.device.type == "cpu" else max(rows, 1)
    scales = [_quantize_rows(weight[i : i + step], q[i : i + step], fmt) for i in range(0, rows, step)]
    return q, torch.cat(scales) if scales else torch.empty(fmt.scales_shape((0, columns)), device=weight.device)


_MAGNITUDES = {torch.bfloat16: (torch.int16, 0x7FFF), torch.float32: (torch.int32, 0x7FFFFFFF)}
"""For each dtype of weights the integers of the same size, and all bits but the sign."""
_SMALLEST_NORMAL = 2.0**-126  # of float32


def _quantize_fp8_on_cpu(weight: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """`_quantize_plain` in less time, with the same bits.

    Without the sign bit, floating-point numbers are ordered as integers with the same bits, of which a CPU finds the largest faster; NaN is
    above infinity. A quotient exceeds `largest` by rounding alone, which the cast rounds back, so there is no clamp, unless a scale is
    subnormal and therefore inexact. One buffer holds a row of blocks at a time. More than half of the time is the cast itself."""
    integers, mask = _MAGNITUDES[weight.dtype]
    (rows, columns), (height, width) = weight.shape, fmt.weight_block
    bits = weight.view(integers) & mask
    if rows % height or columns % width:
        bits = F.pad(bits, (0, -columns % width, 0, -rows % height))
    by_column = bits.unflatten(0, (-1, height)).amax(1).view(weight.dtype).float()  # (only this order of the two maxima vectorises)
    scale = by_column.unflatten(1, (-1, width)).amax(2) / torch.full((), fmt.largest)
    scale = torch.where(scale == 0, 1.0, scale)
    of_row, must_clamp = scale.repeat_interleave(width, 1)[:, :columns], bool((scale < _SMALLEST_NORMAL).any())
    q, buffer = torch.empty(rows, columns, dtype=fmt.dtype), torch.empty(min(height, rows), columns)
    for number, part in enumerate(weight.split(height)):
        values = buffer[: len(part)].copy_(part).div_(of_row[number])
        if must_clamp:
            values.clamp_(-fmt.largest, fmt.largest)
        q[number * height :][: len(part)].copy_(values)
    return q, scale


def _quantize_rows(weight: Tensor, into: Tensor, fmt: Format) -> Tensor:
    """Quantise whole rows of blocks into `into` and return their scales."""
    (rows, columns), (height, width) = weight.shape, fmt.weight_block
    values = weight.to(torch.float32, copy=True)
    if rows % height or columns % width:
        values = F.pad(values, (0, -columns % width, 0, -rows % height))
    by_column = values.abs().unflatten(0, (-1, height)).amax(1)  # (only this order of the two maxima vectorises)
    # The divisor is a tensor on the device. With a Python number CUDA multiplies by the reciprocal, and its last bit differs from a CPU's.
    scale = by_column.unflatten(1, (-1, width)).amax(2) / torch.full((), fmt.largest, device=weight.device)
    scale = torch.where(scale == 0, 1.0, scale)
    blocks = values.unflatten(1, (-1, width)).unflatten(0, (-1, height))  # [row blocks, height, column blocks, width]
    blocks.div_(scale[:, None, :, None])
    # The cast itself rounds to FP8 (on a GPU). FP4 and INT4 are stored in wider types, so their values must be rounded first.
    values = values.clamp_(-fmt.largest, fmt.largest) if fmt.is_fp8 else fmt.round(values)
    into.copy_(values[:rows, :columns])
    return scale


@functools.cache
def _fused_agrees(device: torch.device, block: int) -> bool:
    """Whether the Triton kernel can be used on a CUDA device: it exists, and gives the same bits as plain PyTorch on a sample
    with blocks of `block` rows and columns.

    If not, one warning says so."""
    if importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device) < _CAST_CAPABILITY:
        return False
    from triton.errors import TritonError

    from ais_megatron.quantization.fp8_triton import quantize_block_fused

    sample = torch.randn(2 * block + 3, block + 5, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16).to(device)
    sample[:block, block:] = 0.0
    try:
        parts = zip(quantize_block_fused(sample, block, E4M3_MAX), _quantize_plain(sample, FP8_E4M3.with_block(block)), strict=True)
        differs = [not torch.equal(fused.view(torch.uint8), plain.view(torch.uint8)) for fused, plain in parts]
        problem = "its result differs from plain PyTorch's" if any(differs) else None
    except TritonError as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        logger.warning("the fused FP8 quantisation of weights is switched off: %s; plain PyTorch is used, which is slower", problem)
    return problem is None


def dequantize_block(q: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.float32, fmt: Format = FP8_E4M3) -> Tensor:
    """The inverse of `quantize_block`, up to rounding: ``[N, K]``, multiplied in float32 and rounded once to `dtype`.

    Raises:
        ValueError: `scale_inv` does not have one entry for each block of `q`.
    """
    (rows, columns), (height, width) = q.shape, fmt.weight_block
    expected = fmt.scales_shape(tuple(q.shape))
    if tuple(scale_inv.shape) != expected:
        raise ValueError(
            f"scale_inv has shape {list(scale_inv.shape)}; a weight {list(q.shape)} in blocks of {height}x{width} needs {list(expected)}"
        )
    scale = scale_inv.float().repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    return (q.float() * scale).to(dtype)


def round_to_e4m3(x: Tensor) -> Tensor:
    """The float32 values of ``clamp(x, -448, 448).to(float8_e4m3fn)``; see `Format.round`."""
    return FP8_E4M3.round(x)


def quantize_dequantize_groups(x: Tensor, fmt: Format = FP8_E4M3) -> Tensor:
    """Quantise and dequantise activations, as a dynamically quantised linear layer does with its input.

    In each row, every group of `fmt.group` neighbouring columns (the last may be smaller) is scaled by its own amax / largest,
    rounded to the format and scaled back. A format with `group` 0 leaves them as they are.

    Args:
        x: bfloat16 or float32 ``[..., K]``.
    Returns:
        float32 ``[..., K]``, because BF16 would round a second time.
    """
    if not fmt.group:
        return x.float()
    columns = x.shape[-1]
    group = min(fmt.group, columns)  # a single smaller group needs no padding
    padded = F.pad(x.float(), (0, -columns % group)) if columns % group else x.float()
    groups = padded.unflatten(-1, (-1, group))
    scale = groups.abs().amax(-1, keepdim=True).clamp_(min=MIN_GROUP_AMAX).div_(fmt.largest)
    return fmt.round_scaled(groups / scale).mul_(scale).flatten(-2)[..., :columns]


def quantize_bucket(bucket: Iterable[tuple[str, Tensor]], fmt: Format = FP8_E4M3) -> list[tuple[str, Tensor]]:
    """Replace each projection ``X.weight`` by its quantised values and ``X.weight_scale_inv``. Everything else is unchanged.

    Args:
        bucket: (Hugging Face name, tensor) pairs. Projections are bfloat16 or float32 ``[N, K]``. They must be whole and not TP
            shards, because the edge of a shard need not be the edge of a block.
    Raises:
        ValueError: a projection cannot be quantised. The message names it.
    """
    quantized = []
    for name, tensor in bucket:
        if not is_quantized_weight(name):
            quantized.append((name, tensor))
            continue
        try:
            q, scale_inv = quantize_block(tensor, fmt)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        quantized += [(name, q), (name.removesuffix("weight") + "weight_scale_inv", scale_inv)]
    return quantized
