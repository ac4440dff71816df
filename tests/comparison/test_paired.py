"""Tests of differences, against all patterns of signs written out and against published examples' arithmetic."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from ais_megatron.comparison import paired
from ais_megatron.comparison.paired import contrasts, holm, sign_flip_p


@pytest.mark.parametrize("n", [1, 2, 5, 10])
def test_p_is_the_share_of_sign_patterns(n: int) -> None:
    random.seed(n)
    gaps = [random.choice([-2, -1, 0, 1, 3]) / 8 for _ in range(n)]
    observed = abs(sum(gaps))
    patterns = [abs(sum(s * g for s, g in zip(signs, gaps, strict=True))) for signs in itertools.product((1, -1), repeat=n)]
    assert sign_flip_p(gaps) == sum(value >= observed - 1e-12 for value in patterns) / 2**n


def test_the_least_p_of_n_seeds_and_none_without_a_difference() -> None:
    assert sign_flip_p([0.1] * 24) == 2.0**-23, "only all plus and all minus are as far; 0.1 has no exact binary form"
    assert sign_flip_p([0.0] * 6) == 1.0 and sign_flip_p([0.3]) == 1.0


def test_many_seeds_go_over_to_the_normal_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    random.seed(0)
    gaps = [random.gauss(0.2, 1.0) for _ in range(24)]
    exact = sign_flip_p(gaps)
    monkeypatch.setattr(paired, "EXACT_UP_TO", 10)
    assert sign_flip_p(gaps) == pytest.approx(exact, abs=0.02) and sign_flip_p([0.0] * 24) == 1.0


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0] and holm([]) == []


def test_a_contrast_takes_the_seeds_that_both_arms_have() -> None:
    values = {"a": {1: 0.5, 2: 0.7, 3: 0.9}, "b": {2: 0.4, 3: 0.5, 4: 0.1}, "c": {9: 0.0}}
    (only,) = contrasts([("a", "b"), ("a", "c"), ("a", "missing")], values)
    assert (only.arm, only.against, only.seeds) == ("a", "b", 2)
    assert only.mean == pytest.approx(0.35) and only.standard_error == pytest.approx(0.05), "gaps 0.3 and 0.4"
    assert only.p == only.p_holm == 0.5
    (single,) = contrasts([("a", "b")], {"a": {2: 0.7}, "b": {2: 0.4}})
    assert math.isnan(single.standard_error)
