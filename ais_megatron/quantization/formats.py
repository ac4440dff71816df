"""Number formats of quantised rollouts: which values exist, and how large the blocks are that share a scale.

A float with m mantissa bits, smallest normal number 2**e_min and largest value `largest` has, between two powers of two 2**e
and 2**(e+1), values 2**(e-m) apart, and below 2**e_min values 2**(e_min-m) apart.

    name       m  e_min  largest  values                         scales of weights      of activations
    fp8_e4m3   3  -6     448      OCP FP8, no infinity           one per 128x128        one per row and 128 columns
    fp8_e5m2   2  -14    57344    OCP FP8, cast without infinity one per 128x128        one per row and 128 columns
    fp4_e2m1   1  0      6        0 .5 1 1.5 2 3 4 6 and minus   one per row and 32 columns, for both

FP4 has the blocks of the OCP microscaling formats (MXFP4) with float32 scales in place of their powers of two, so that a
block's largest value is always kept; NVFP4 (blocks of 16, E4M3 scales) lies near. All scales are amax / largest.
Nothing here needs hardware that knows the format: FP4 values are kept in E4M3, which holds each of them exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_EXPONENT_BITS = 0x7F800000  # of a float32
_MANTISSA_BITS = 23  # of a float32


@dataclass(frozen=True)
class Format:
    """One format; see the module.

    dtype: what its values are kept and sent in. weight_block: (rows, columns) of a weight that share a scale.
    group: columns of a row of activations that share a scale.
    """

    name: str
    dtype: torch.dtype
    mantissa_bits: int
    min_exponent: int
    largest: float
    weight_block: tuple[int, int]
    group: int

    def round(self, x: Tensor) -> Tensor:
        """The nearest value of the format, ties to even, saturating at +-`largest`: float32, also NaN and the sign of zero.

        For the FP8 formats that is ``clamp(x, -largest, largest).to(dtype).float()`` bit for bit, and faster: the CPU's cast
        from FP8 back to float32 takes 3-5 ns an element, thrice all else together.

        Args:
            x: float32, any shape.
        """
        return self.round_scaled(x.clamp(-self.largest, self.largest)).copysign_(x)

    def round_scaled(self, x: Tensor) -> Tensor:
        """`round` for x that exceeds `largest` by float32's rounding at most, up to the sign of zero: all zeros come out positive.

        With 2**e the power of two below |x| (at least 2**min_exponent), the format's values are 2**(e-m) apart, which is
        also how far apart float32 values near 1.5 * 2**(e-m+23) are. Adding that number and subtracting it again therefore
        rounds x as a cast does.
        """
        anchor = (x.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
        anchor.clamp_(min=2.0**self.min_exponent).mul_(1.5 * 2.0 ** (_MANTISSA_BITS - self.mantissa_bits))
        return (x + anchor).sub_(anchor)

    def scales_shape(self, weight_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of a weight ``[N, K]``."""
        return tuple(-(-size // block) for size, block in zip(weight_shape, self.weight_block, strict=True))


FP8_E4M3 = Format("fp8_e4m3", torch.float8_e4m3fn, 3, -6, 448.0, (128, 128), 128)
FP8_E5M2 = Format("fp8_e5m2", torch.float8_e5m2, 2, -14, 57344.0, (128, 128), 128)
FP4_E2M1 = Format("fp4_e2m1", torch.float8_e4m3fn, 1, 0, 6.0, (1, 32), 32)
FORMATS = {fmt.name: fmt for fmt in (FP8_E4M3, FP8_E5M2, FP4_E2M1)}  # by the word of rollout.quantization
