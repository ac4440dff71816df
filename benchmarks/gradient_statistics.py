"""Bias and variance of a gradient estimator from streamed batches, without the bias that the noise of the batches would add.

For vectors x_i of B independent batches |E x|^2 is estimated by the mean of <x_i, x_j> over pairs i != j,

    (|sum x_i|^2 - sum |x_i|^2) / (B (B - 1)),

and likewise <E x, E y>. All of it follows from sums over batches; kept by block of batches they give a jackknife error too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

BLOCKS = 8


def _zeros() -> Tensor:
    return torch.zeros(BLOCKS, dtype=torch.float64)


@dataclass
class Sums:
    """Of one estimator's gradients g and the target's t, by block of batches: sums of g and of d = g - t (``[BLOCKS, parameters]``,
    float32), and of <g, g>, <d, d> and <g, t> (``[BLOCKS]``, float64)."""

    g: Tensor
    d: Tensor
    gg: Tensor = field(default_factory=_zeros)
    dd: Tensor = field(default_factory=_zeros)
    gt: Tensor = field(default_factory=_zeros)

    @staticmethod
    def empty(parameters: int) -> Sums:
        return Sums(torch.zeros(BLOCKS, parameters), torch.zeros(BLOCKS, parameters))

    def add(self, block: int, g: Tensor, t: Tensor) -> None:
        d = g - t
        self.g[block] += g
        self.d[block] += d
        self.gg[block] += g.dot(g)
        self.dd[block] += d.dot(d)
        self.gt[block] += g.dot(t)


@dataclass(frozen=True)
class ErrorOfGradient:
    """bias: |E d| / |E t|. cosine: of E g and E t. noise: tr Var(g) / tr Var(t) of one batch. batches_to_bias: how many must be
    averaged until their variance is as small as the squared bias; infinite where no bias was seen."""

    bias: float
    cosine: float
    noise: float
    batches_to_bias: float


def error_of(arm: Sums, target: Sums, batches: int) -> tuple[ErrorOfGradient, ErrorOfGradient]:
    """The figures over `batches` batches, equally many to a block, and their jackknife standard errors."""
    everything = torch.arange(BLOCKS)
    value = _error(arm, target, everything, batches)
    parts = [_error(arm, target, everything[everything != block], batches - batches // BLOCKS) for block in range(BLOCKS)]

    def spread(key: str) -> float:
        values = torch.tensor([getattr(part, key) for part in parts], dtype=torch.float64)
        return math.sqrt((BLOCKS - 1) / BLOCKS * float((values - values.mean()).square().sum()))

    return value, ErrorOfGradient(*(spread(key) for key in ("bias", "cosine", "noise", "batches_to_bias")))


def _error(arm: Sums, target: Sums, blocks: Tensor, batches: int) -> ErrorOfGradient:
    pairs = batches * (batches - 1)

    def product(x: Tensor, y: Tensor, same: Tensor) -> tuple[float, float]:
        """<E x, E y>, and the trace of their covariance; same: sums of <x_i, y_i>."""
        joint, own = float(x[blocks].sum(0).dot(y[blocks].sum(0))), float(same[blocks].sum())
        return (joint - own) / pairs, (own - joint / batches) / (batches - 1)

    (t, t_variance), (g, g_variance) = product(target.g, target.g, target.gg), product(arm.g, arm.g, arm.gg)
    d, (across, _) = product(arm.d, arm.d, arm.dd)[0], product(arm.g, target.g, arm.gt)
    return ErrorOfGradient(
        bias=math.copysign(math.sqrt(abs(d / t)), d),  # below 0: none is seen, and this is how well it would have been
        cosine=across / math.sqrt(max(t * g, 1e-300)),
        noise=g_variance / t_variance,
        batches_to_bias=g_variance / d if d > 0.0 else math.inf,
    )


def best_alpha(none: Sums, full: Sums, gap: Sums) -> float:
    """The alpha of least |E (g_none + alpha e) - E t|^2; `gap` holds e = g_full - g_none: -<E d_none, E e> / |E e|^2."""
    same = (full.gg - none.gg - gap.gg) / 2 - gap.gt  # sums of <g_none, e> - <t, e>
    d, e = none.d.sum(0), gap.g.sum(0)
    return -float((d.dot(e) - same.sum()) / (e.dot(e) - gap.gg.sum()))
