"""The measured coefficient: the strength alpha and the limit of the weights with the least estimated error of the gradient.

Let v_k be the importance weight w with limit k: truncated at one of several C, or 0 outside one of several bands. Let g(alpha, k) be the
gradient of one batch with s = 1 + alpha (v_k - 1). Training accumulates its bias and averages its noise:

    error(alpha, k) = |E g(alpha, k) - E g(1, T)|^2 + tr Var g(alpha, k) / H

T is truncation at the largest C, whose gradient counts as unbiased. H (`ais.horizon`) is the number of batches over which training averages
noise. Both terms come from the sketched gradients of `gradients`: phi_0 with weights 1, and phi_k with weights v_k - 1. g is linear in
them, so

    bias  = alpha E phi_k - E phi_T              noise = tr Var phi_0 + 2 alpha tr Cov(phi_0, phi_k) + alpha^2 tr Var phi_k

and for each limit the best alpha has a closed form. Groups are the independent units. <E phi_k, E phi_l> is estimated without bias from all
pairs of different groups, in the same batch or in two batches, because one batch alone cannot see a bias of a third of the gradient's
length. Older batches count less, by `ais.memory` per batch, since the policy changes. A bias that turns with the policy averages out in
training as noise does, and it does so here.

Even tens of batches estimate a bias poorly. So the estimate starts from an assumption, which counts as `ais.prior` batches: all limits
remove the same bias, and its square is `PRIOR_BIAS` times the variance of one batch's phi with the smallest C. By this assumption alone
alpha is near 1 and C is the smallest. Evidence moves the choice from there.

At equal precision every phi_k is 0, so the choice does not matter and s is exactly 1 (Proposition 3 of arXiv 2605.13907). The idea is that
of its Proposition 1. There the two terms are those of a scalar surrogate, and here they are those of gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ais_megatron.algorithm.correction import Correction
from ais_megatron.algorithm.gradients import SIZE, GradientSums
from ais_megatron.config import AISConfig, Config

PRIOR_BIAS = 0.3
"""In the five settings where it was measured it was 0.09 to 0.67 (docs/algorithm.md)."""

TIE = 1e-9
"""Errors that differ by less than this share count as equal, and the smallest C is taken. Where no weight exceeds several C, their errors
differ by rounding alone."""


class Choice(NamedTuple):
    """How a batch is corrected."""

    alpha: float
    limit: int | None = None
    """The number of the limit in `limits`; None: that of the configuration, without a choice."""

    def correction(self, config: Config) -> Correction:
        """What alpha scales."""
        return Correction.of(config) if self.limit is None else limits(config)[self.limit]


def limits(config: Config) -> list[Correction]:
    """Every limit among which to choose: the caps, and behind them the bands."""
    own = Correction.of(config)
    caps = [replace(own, weight_cap=cap) for cap in config.ais.caps]
    return caps + [replace(own, name="mis", low=low, high=high) for low, high in config.ais.bands]


@dataclass(frozen=True)
class Evidence:
    """What the batches so far say, each counted with ais.memory ** (its age in batches). Plain numbers, equal on every rank."""

    means: tuple[float, ...] = ()
    """``[1 + K, SIZE]``, sums over batches of phi per token."""
    own_products: tuple[float, ...] = ()
    """``[1 + K, 1 + K]``, the part of the inner products of `means` that pairs each group with itself."""
    covariances: tuple[float, ...] = ()
    """``[1 + K, 1 + K]``, sums over batches of tr Cov(phi_k, phi_l) of one batch per token."""
    batches: float = 0.0
    """Sum of the counts."""
    own_pairs: float = 0.0
    """The share of `batches` squared that pairs each group with itself."""

    @staticmethod
    def from_json(raw: dict[str, Any]) -> Evidence:
        """The reverse of what `AISState.to_json` writes."""
        plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()}
        return Evidence(**plain)

    def after(self, batch: GradientSums, memory: float) -> Evidence:
        """The evidence with one more batch. A batch with fewer than two groups adds nothing."""
        groups = float(batch.groups)
        if groups < 2:
            return self
        means, products = batch.sums / batch.tokens, batch.products / batch.tokens**2
        covariances = (products - means @ means.T / groups) * (groups / (groups - 1.0))
        if self.batches:
            old_means, old_products, old_covariances = self._tensors()
            means, products = memory * old_means + means, memory**2 * old_products + products
            covariances = memory * old_covariances + covariances
        return Evidence(
            means=tuple(means.flatten().tolist()),
            own_products=tuple(products.flatten().tolist()),
            covariances=tuple(covariances.flatten().tolist()),
            batches=memory * self.batches + 1.0,
            own_pairs=memory**2 * self.own_pairs + 1.0 / groups,
        )

    def moments(self) -> tuple[Tensor, Tensor]:
        """Estimates of <E phi_k, E phi_l> and of tr Cov(phi_k, phi_l) of one batch, float64 ``[1 + K, 1 + K]`` each. There must have been a
        batch."""
        means, products, covariances = self._tensors()
        return (means @ means.T - products) / (self.batches**2 - self.own_pairs), covariances / self.batches

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        means = torch.tensor(self.means, dtype=torch.float64).view(-1, SIZE)
        products, covariances = (torch.tensor(x, dtype=torch.float64).view(len(means), -1) for x in (self.own_products, self.covariances))
        return means, products, covariances

    def choice(self, ais: AISConfig) -> Choice:
        """The choice of least estimated error. Before the first batch the correction is as strong as allowed, with the configured limit."""
        return least_error(*self.moments(), self.batches, ais) if self.batches else Choice(ais.alpha_max)


def least_error(squares: Tensor, noise: Tensor, batches: float, ais: AISConfig) -> Choice:
    """The choice of least estimated error.

    squares, noise: as from `Evidence.moments`. batches: how many they are an average of, against which the prior counts."""
    assumed = torch.zeros_like(squares)
    assumed[1:, 1:] = PRIOR_BIAS * noise[1, 1]
    squares = (batches * squares + ais.prior * assumed) / (batches + ais.prior)
    found = [best_alpha(squares, noise, k, ais) for k in range(1, len(squares))]
    least = min(error for error, _ in found)
    return next(choice for error, choice in found if error <= least + TIE * abs(least))


def best_alpha(squares: Tensor, noise: Tensor, k: int, ais: AISConfig) -> tuple[float, Choice]:
    """The least error with the limit of vector k, without the terms that depend neither on alpha nor on the limit, and where it is.

    squares, noise: as from `Evidence.moments`."""
    target = len(ais.caps)
    curvature = float(squares[k, k] + noise[k, k] / ais.horizon)
    slope = float(noise[0, k] / ais.horizon - squares[k, target])  # half of it, at alpha = 0
    candidates = [ais.alpha_min, ais.alpha_max]
    if curvature > 0.0:
        candidates.append(min(max(-slope / curvature, ais.alpha_min), ais.alpha_max))
    error, alpha = min((alpha * (alpha * curvature + 2.0 * slope), alpha) for alpha in candidates)
    return error, Choice(alpha, k - 1)
