"""Block FP8 (E4M3) in plain PyTorch: what the policy's weights become before they are sent, and what an engine makes of activations.

Weights: one float32 scale per 128x128 block; activations: one per row and 128 columns, measured as they come:
    scale = amax / 448,   q = round_E4M3(x / scale),   x ~ q * scale.
The layout (``X.weight`` with ``X.weight_scale_inv``, which multiplies) is that of DeepSeek-V3's technical report, section
3.3.2, and of SGLang and vLLM for ``weight_block_size: [128, 128]``. E4M3FN has no infinity, so an overflowing cast would
give NaN: values are clamped to +-448 first. Runs on CPU and CUDA.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import re
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

E4M3 = torch.float8_e4m3fn
E4M3_MAX = 448.0
BLOCK = 128

_SMALLEST_NORMAL = 2.0**-6  # below it the grid of E4M3 is uniform, 2**-9 apart
_EXPONENT_BITS = 0x7F800000  # of a float32
_MIN_GROUP_AMAX = 1e-10  # as in SGLang's kernel: an all-zero group must not become 0/0
_CAST_CAPABILITY = (8, 9)  # the first CUDA compute capability that Triton can cast to E4M3 on

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
    if weight.is_cuda and block == BLOCK and _fused_agrees(weight.device):
        from ais_megatron.quantization.fp8_triton import quantize_block_fused

        q, scale = quantize_block_fused(weight, block, E4M3_MAX)
    else:
        q, scale = _quantize_plain(weight, block)
    if not torch.isfinite(scale).all():  # amax carries NaN and infinity along
        raise ValueError("the weight holds NaN or infinity, so it has no FP8 form; the update before this sync has diverged")
    return q, scale


def _quantize_plain(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """`quantize_block` without its checks: the scale of a block that holds NaN or infinity is not finite either."""
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % block, 0, -rows % block))
    blocks = padded.unflatten(1, (-1, block)).unflatten(0, (-1, block))  # [row blocks, block, column blocks, block]
    amax = blocks.abs().amax(dim=(1, 3), keepdim=True)
    # A tensor on the device: by a Python number CUDA multiplies with the reciprocal, which is another last bit than a CPU's.
    scale = amax / torch.full((), E4M3_MAX, device=weight.device)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    q = (blocks / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    q = q.view(padded.shape)[:rows, :columns].contiguous()
    return q, scale[:, 0, :, 0].contiguous()


@functools.cache
def _fused_agrees(device: torch.device) -> bool:
    """Whether the Triton kernel can be used on that CUDA device: it is there, and gives a sample the plain path's bits. If it does
    not, that is said once."""
    if importlib.util.find_spec("triton") is None or torch.cuda.get_device_capability(device) < _CAST_CAPABILITY:
        return False
    from triton.errors import TritonError

    from ais_megatron.quantization.fp8_triton import quantize_block_fused

    sample = torch.randn(2 * BLOCK + 3, BLOCK + 5, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16).to(device)
    sample[:BLOCK, BLOCK:] = 0.0
    try:
        parts = zip(quantize_block_fused(sample, BLOCK, E4M3_MAX), _quantize_plain(sample, BLOCK), strict=True)
        differs = [not torch.equal(fused.view(torch.uint8), plain.view(torch.uint8)) for fused, plain in parts]
        problem = "its result differs from plain PyTorch's" if any(differs) else None
    except TritonError as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        logger.warning("the fused FP8 quantisation of weights is switched off: %s; plain PyTorch is used, slower", problem)
    return problem is None


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
