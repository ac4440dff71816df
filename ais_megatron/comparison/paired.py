"""Tests whether two arms differ, seed by seed.

Runs of one seed share the warm start, the prompts and the held-out problems. So the differences of single seeds say more than the
difference of two means. Some runs collapse, so these differences are not normally distributed, and a t test would be wrong. The p value is
that of a sign-flip test instead. If two arms were alike, the difference of each seed could as well have had the other sign. p is the
share of all patterns of signs that give a mean at least as far from 0 as the observed one.

Whoever looks at several contrasts finds a small p by chance. So the p values are also corrected together, by Holm's method.

Sources: R. A. Fisher, The Design of Experiments (1935), section 21. S. Holm, Scandinavian Journal of Statistics 6 (1979), 65 to 70.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EXACT_UP_TO = 40  # seeds; the patterns of each half of the seeds are held in memory, so this is 2 * 2^20 numbers


@dataclass(frozen=True)
class Contrast:
    """One arm minus another. Differences are in the unit of the values that were compared."""

    arm: str
    against: str
    seeds: int
    mean: float
    standard_error: float
    """NaN with a single seed."""
    p: float
    """Two-sided, by flipping signs. With n seeds it cannot be below 2^(1 - n)."""
    p_holm: float
    """The same, corrected for all contrasts that were asked for together."""


def contrasts(pairs: Sequence[tuple[str, str]], values: Mapping[str, Mapping[int, float]]) -> list[Contrast]:
    """Compare pairs of arms over the seeds that both have.

    Args:
        pairs: (arm, the arm it is compared with). A pair without a common seed is left out.
        values: for each arm, a value by seed.
    """
    by_pair = {pair: differences(values.get(pair[0], {}), values.get(pair[1], {})) for pair in pairs}
    by_pair = {pair: gaps for pair, gaps in by_pair.items() if gaps}
    ps = [sign_flip_p(gaps) for gaps in by_pair.values()]
    return [
        Contrast(arm, against, len(gaps), *mean_and_error(gaps), p, corrected)
        for ((arm, against), gaps), p, corrected in zip(by_pair.items(), ps, holm(ps), strict=True)
    ]


def differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Ours minus theirs, for every seed that both have."""
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def mean_and_error(gaps: Sequence[float]) -> tuple[float, float]:
    """The mean of one or more differences and its standard error, which is NaN for a single one."""
    return statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan


def sign_flip_p(differences: Sequence[float]) -> float:
    """The share of patterns of signs whose sum is at least as far from 0 as that of `differences`.

    It is exact for up to `EXACT_UP_TO` differences. Beyond that it is that of the normal distribution with the same variance.
    """
    import torch  # takes seconds, and most commands of this package need no p value

    gaps = torch.tensor(differences, dtype=torch.float64)
    observed = float(gaps.sum().abs())
    if len(gaps) > EXACT_UP_TO:
        return math.erfc(observed / math.sqrt(2.0 * float(gaps.square().sum()))) if observed else 1.0
    # Every pattern is one of the first half of the seeds and one of the second. So it is enough to sort the sums of one half.
    first, second = _signed_sums(gaps[: len(gaps) // 2]), _signed_sums(gaps[len(gaps) // 2 :]).sort().values
    least = observed - 1e-9 * float(gaps.abs().sum())  # equal sums can differ in their last bits
    if least <= 0.0:
        return 1.0
    above = len(second) - torch.searchsorted(second, least - first)
    below = torch.searchsorted(second, -least - first, right=True)
    return float((above + below).sum()) / 2.0 ** len(gaps)


def _signed_sums(gaps: Tensor) -> Tensor:
    """The sums of all patterns of signs, float64 ``[2^n]``."""
    import torch

    sums = gaps.new_zeros(1)
    for gap in gaps:
        sums = torch.cat([sums + gap, sums - gap])
    return sums


def holm(ps: Sequence[float]) -> list[float]:
    """p values corrected by Holm's method, in the order of `ps`: the smallest times their number, the next times one less, and so on."""
    corrected, largest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        largest = max(largest, min(1.0, (len(ps) - rank) * ps[index]))
        corrected[index] = largest
    return corrected
