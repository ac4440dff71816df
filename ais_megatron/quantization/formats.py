"""The number formats of quantised rollouts: their values, and the size of the blocks that share a scale.

A format has m mantissa bits, the smallest normal number 2**e_min and the largest value `largest`. Between 2**e and 2**(e+1) its
values are 2**(e-m) apart. Below 2**e_min they are 2**(e_min-m) apart.

    name       m  e_min  largest  values                         scales of weights      of activations
    fp8_e4m3   3  -6     448      OCP FP8, no infinity           one per 128x128        one per row and 128 columns
    fp8_e5m2   2  -14    57344    OCP FP8, cast without infinity one per 128x128        one per row and 128 columns
    fp4_e2m1   1  0      6        0 .5 1 1.5 2 3 4 6 and minus   one per row and 32 columns, for both
    int4       3  3      7        0 1 2 3 4 5 6 7 and minus      one per row and 128 columns   none, not quantised

`rollout.weight_block` changes the 128 of the FP8 formats. FP4 has the block size of the OCP microscaling format MXFP4, but float32
scales instead of powers of two, so the largest value of a block stays exact. NVFP4 (blocks of 16, E4M3 scales) is similar. INT4 is the
W4A16 of QaRL (arXiv 2604.07853): symmetric integers, and activations in the model's dtype. All scales are amax / largest. No hardware
support is needed. FP4 values are stored in E4M3 and INT4 values in INT8, which represent each of them exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ais_megatron.config import RolloutConfig

_EXPONENT_BITS = 0x7F800000  # of a float32
_MANTISSA_BITS = 23  # of a float32


@dataclass(frozen=True)
class Format:
    """One number format, as in the module's table."""

    name: str
    dtype: torch.dtype
    """The dtype in which its values are stored and sent."""
    mantissa_bits: int
    min_exponent: int
    """e_min."""
    largest: float
    weight_block: tuple[int, int]
    """(rows, columns) of a weight that share a scale."""
    group: int
    """Number of columns in a row of activations that share a scale. 0: activations are not quantised."""

    @property
    def is_fp8(self) -> bool:
        """Whether torch has a dtype of just these values, so that a cast rounds to them. The blocks are then `rollout.weight_block`'s."""
        return self.name.startswith("fp8")

    def round(self, x: Tensor) -> Tensor:
        """Round to the nearest value of the format, ties to even, saturating at +-`largest`. NaN and the sign of zero are kept.

        For the FP8 formats the result equals ``clamp(x, -largest, largest).to(dtype).float()`` bit for bit, but is faster. The CPU's
        cast from FP8 back to float32 takes 3-5 ns per element, three times as long as everything else.

        Args:
            x: float32, any shape.
        """
        return self.round_scaled(x.clamp(-self.largest, self.largest)).copysign_(x)

    def round_scaled(self, x: Tensor) -> Tensor:
        """`round` for x that exceeds `largest` at most by float32's rounding. All zeros in the result are positive.

        Let 2**e be the power of two below |x|, at least 2**min_exponent. The format's values are 2**(e-m) apart, and so are float32
        values near 1.5 * 2**(e-m+23). Adding that number and subtracting it again therefore rounds x as a cast would.
        """
        anchor = (x.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
        anchor.clamp_(min=2.0**self.min_exponent).mul_(1.5 * 2.0 ** (_MANTISSA_BITS - self.mantissa_bits))
        return (x + anchor).sub_(anchor)

    def with_block(self, size: int) -> Format:
        """This format with one scale per `size` rows and columns of a weight, and per `size` columns of a row of activations."""
        return replace(self, weight_block=(size, size), group=size)

    def scales_shape(self, weight_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales for a weight ``[N, K]``."""
        return tuple(-(-size // block) for size, block in zip(weight_shape, self.weight_block, strict=True))


FP8_E4M3 = Format("fp8_e4m3", torch.float8_e4m3fn, 3, -6, 448.0, (128, 128), 128)
FP8_E5M2 = Format("fp8_e5m2", torch.float8_e5m2, 2, -14, 57344.0, (128, 128), 128)
FP4_E2M1 = Format("fp4_e2m1", torch.float8_e4m3fn, 1, 0, 6.0, (1, 32), 32)
INT4 = Format("int4", torch.int8, 3, 3, 7.0, (1, 128), 0)
FORMATS = {fmt.name: fmt for fmt in (FP8_E4M3, FP8_E5M2, FP4_E2M1, INT4)}  # by the value of rollout.quantization


def format_of(rollout: RolloutConfig) -> Format | None:
    """The format of a configured engine's weights and activations; None if they are not quantised."""
    fmt = FORMATS.get(rollout.quantization)
    return fmt.with_block(rollout.weight_block) if fmt is not None and fmt.is_fp8 else fmt
