"""Bias and variance of gradient estimators from inner products, without the bias that the noise of the batches would add.

For gradients x_i of B independent batches <E x, E y> is estimated by the mean of <x_i, y_j> over pairs i != j, and the trace of the
covariance by the mean of <x_i, y_i> minus that. So the matrix of inner products is enough, for any combination of the gradients in it.
Errors are a jackknife: every figure is computed again without each batch. Two arms share their batches, so a difference of their
figures is computed without each batch too, and its error is smaller than those of the two figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    value: float
    error: float
    """Its jackknife standard error."""


def estimate(replicates: Tensor) -> Estimate:
    """From a figure of all batches and then without each of them, ``[batches + 1]``."""
    value, without = float(replicates[0]), replicates[1:]
    count = len(without)
    return Estimate(value, math.sqrt((count - 1) / count * float((without - without.mean()).square().sum())))


class Moments(NamedTuple):
    """Of two estimators x and y, of all batches and then without each of them: float64 ``[batches + 1]``."""

    product: Tensor
    """<E x, E y>."""
    covariance: Tensor
    """tr Cov(x, y) of one batch."""


def moments(products: Tensor) -> Moments:
    """products: <x_i, y_j>, float64 ``[batches, batches]``. There must be at least three batches."""
    own = products.diagonal()
    everything = products.sum()
    total = torch.cat([everything[None], everything - products.sum(0) - products.sum(1) + own])
    same = torch.cat([own.sum()[None], own.sum() - own])
    count = torch.full_like(total, len(own) - 1)
    count[0] = len(own)
    return Moments((total - same) / (count * (count - 1)), (same - total / count) / (count - 1))


def combined(gram: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Inner products ``[batches, batches]`` of combinations of gradients.

    gram: ``[batches, vectors, batches, vectors]``. x, y: coefficients, ``[batches, vectors]``.
    """
    return torch.einsum("bk,bkcl,cl->bc", x, gram, y)


@dataclass(frozen=True)
class GradientError:
    """How far estimates g are from estimates t. All tensors are float64 ``[batches + 1]``: of all batches, then without each of them."""

    bias_sq: Tensor
    """|E (g - t)|^2 / |E t|^2. It may be below 0, because noise is subtracted."""
    variance: Tensor
    """tr Var(g) / |E t|^2 of one batch."""
    noise: Tensor
    """tr Var(g) / tr Var(t)."""
    cosine: Tensor
    """Of E g and E t."""
    norm: Tensor
    """|E g| / |E t|."""

    @property
    def bias(self) -> Tensor:
        """The root of `bias_sq`. Below 0: no bias is seen, and this is how well it would have been."""
        return self.bias_sq.sign() * self.bias_sq.abs().sqrt()

    @property
    def batches_to_bias(self) -> float:
        """B*: how many batches must be averaged until their variance is as small as the squared bias; infinite where no bias is seen."""
        return float(self.variance[0] / self.bias_sq[0]) if self.bias_sq[0] > 0.0 else math.inf

    def error(self, horizon: float) -> Tensor:
        """What is left after averaging `horizon` batches: (|E (g - t)|^2 + tr Var(g) / horizon) / |E t|^2."""
        return self.bias_sq + self.variance / horizon


def gradient_error(gram: Tensor, g: Tensor, t: Tensor) -> GradientError:
    """gram: ``[batches, vectors, batches, vectors]``. g, t: coefficients of the estimator and of its target, ``[batches, vectors]``."""
    of_t, of_g, of_d = (moments(combined(gram, x, x)) for x in (t, g, g - t))
    across = moments(combined(gram, g, t)).product
    return GradientError(
        bias_sq=of_d.product / of_t.product,
        variance=of_g.covariance / of_t.product,
        noise=of_g.covariance / of_t.covariance,
        cosine=across / (of_g.product * of_t.product).sqrt(),  # NaN where noise hides a whole gradient
        norm=(of_g.product / of_t.product).sqrt(),
    )


def best_alpha(gram: Tensor, none: Tensor, full: Tensor, t: Tensor, horizon: float) -> tuple[Tensor, Tensor]:
    """The constant alpha of least `GradientError.error`, which may be outside [0, 1], and that error; both ``[batches + 1]``. NaN where
    noise leaves no minimum."""
    at = [gradient_error(gram, torch.lerp(none, full, alpha), t).error(horizon) for alpha in (0.0, 0.5, 1.0)]
    # The error is a parabola in alpha: a + b alpha + c alpha^2.
    a, c = at[0], 2.0 * (at[0] - 2.0 * at[1] + at[2])
    b = at[2] - a - c
    c = c.where(c > 0.0, math.nan)
    return -b / (2.0 * c), a - b.square() / (4.0 * c)
