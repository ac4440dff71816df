"""What a sample of responses to problems says about a policy: pass@k, and standard errors with problems as clusters.

Of a problem with n responses, c of them correct, pass@k is estimated without bias by

    1 - C(n - c, k) / C(n, k)                                        (Chen et al. 2021, arXiv 2107.03374, eq. 1)

and then averaged over problems. For k = 1 this is the share of correct responses, which is also called avg@n. Problems are the
independent units and not responses, so every standard error is that of a mean over problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple


class Estimate(NamedTuple):
    mean: float
    """NaN if no problem counts."""
    error: float
    """Standard error of the mean. NaN if fewer than two problems count."""


class Moments(NamedTuple):
    """Sums over problems of (s, n), the sum and the number of a problem's values. Those of several ranks add up."""

    problems: float
    s: float
    n: float
    ss: float
    sn: float
    nn: float


def pass_at_k(responses: int, correct: int, k: int) -> float:
    """The module's equation for one problem. Python's whole numbers are exact, and so is their quotient up to its last bit."""
    assert 0 <= correct <= responses >= k >= 1
    return (math.comb(responses, k) - math.comb(responses - correct, k)) / math.comb(responses, k)


def moments(pairs: Sequence[tuple[float, int]]) -> Moments:
    """pairs: (s, n) of each problem."""
    terms = ((1.0, s, n, s * s, s * n, n * n) for s, n in pairs)
    return Moments(*(math.fsum(column) for column in zip(*terms, strict=True))) if pairs else Moments(0, 0, 0, 0, 0, 0)


def estimate(of: Moments) -> Estimate:
    """The mean over all values, and its standard error with problems as clusters.

    The error is sqrt(P / (P - 1) * sum of (s_i - mean * n_i)^2) / sum of n_i, over P problems. If all problems have the same number of
    values, it equals the sample deviation of the problems' means divided by sqrt(P).
    """
    if not of.n:
        return Estimate(float("nan"), float("nan"))
    mean = of.s / of.n
    if of.problems < 2:
        return Estimate(mean, float("nan"))
    squares = max(of.ss - 2 * mean * of.sn + mean * mean * of.nn, 0.0)
    return Estimate(mean, math.sqrt(of.problems / (of.problems - 1) * squares) / of.n)
