"""pass@k against all ways to draw k of n responses, and standard errors by hand."""

from __future__ import annotations

import math
import statistics
from itertools import combinations

import pytest

from ais_megatron.algorithm.estimates import Estimate, Moments, estimate, moments, pass_at_k


def test_pass_at_k_is_the_share_of_draws_with_a_correct_response() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(combinations([True] * c + [False] * (n - c), k))
                assert pass_at_k(n, c, k) == sum(map(any, draws)) / len(draws), (n, c, k)


def test_pass_at_k_of_many_responses_is_exact() -> None:
    assert pass_at_k(10_000, 0, 5_000) == 0.0 and pass_at_k(10_000, 5_001, 5_000) == 1.0
    assert pass_at_k(10_000, 1, 100) == 0.01
    product = 1.0 - math.prod(1.0 - 100 / i for i in range(10_000 - 37 + 1, 10_000 + 1))  # as in the paper's code
    assert pass_at_k(10_000, 37, 100) == pytest.approx(product, rel=1e-12)


def test_errors_by_hand() -> None:
    """Two responses to each of four problems, of which 0, 1, 2 and 2 are correct: means 0, 1/2, 1, 1 with deviation sqrt(11/48)."""
    mean, error = estimate(moments([(0, 2), (1, 2), (2, 2), (2, 2)]))
    assert mean == 5 / 8 and error == pytest.approx(math.sqrt(11 / 48 / 4), rel=1e-12)
    assert error == pytest.approx(statistics.stdev([0, 0.5, 1, 1]) / 2, rel=1e-12)
    assert estimate(moments([(3, 4)] * 5)) == (0.75, 0.0), "problems that are all alike"


def test_problems_with_fewer_responses_weigh_less() -> None:
    """(1 of 1) and (0 of 3): the mean over responses is 1/4, and the deviations 1 - 1/4 and 0 - 3/4 give sqrt(2 * 18/16) / 4."""
    mean, error = estimate(moments([(1, 1), (0, 3)]))
    assert mean == 0.25 and error == pytest.approx(math.sqrt(2 * (0.75**2 + 0.75**2)) / 4, rel=1e-12)


def test_what_cannot_be_known() -> None:
    assert all(map(math.isnan, estimate(moments([]))))
    only = estimate(moments([(1, 2)]))
    assert only.mean == 0.5 and math.isnan(only.error)


def test_ranks_add_up() -> None:
    pairs = [(0.3, 3), (2.0, 2), (1.1, 4), (0.0, 1), (3.0, 3)]
    parts = zip(moments(pairs[:2]), moments(pairs[2:]), moments([]), strict=True)
    together: Estimate = estimate(Moments(*map(sum, parts)))
    assert together == pytest.approx(estimate(moments(pairs)), rel=1e-12)
