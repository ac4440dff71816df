"""The benchmark's estimates of a gradient's bias and noise against their definitions, pair by pair."""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch

from tests.helpers.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
BATCHES, SIZE = 16, 5


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("gradient_statistics")


def sums_of(module, g, t):
    sums = module.Sums.empty(g.shape[1])
    for number, (gi, ti) in enumerate(zip(g, t, strict=True)):
        sums.add(number * module.BLOCKS // len(g), gi, ti)
    return sums


def over_pairs(x, y):
    products = [float(x[i].double().dot(y[j].double())) for i, j in itertools.permutations(range(len(x)), 2)]
    return sum(products) / len(products)


def test_error_by_pairs(module):
    torch.manual_seed(0)
    t = torch.randn(BATCHES, SIZE) + 2.0
    g = t + 0.5 * torch.randn(BATCHES, SIZE) + torch.tensor([1.0, 0.0, 0.0, -1.0, 0.0])
    value, errors = module.error_of(sums_of(module, g, t), sums_of(module, t, t), BATCHES)
    assert value.bias == pytest.approx(math.sqrt(over_pairs(g - t, g - t) / over_pairs(t, t)), rel=1e-5)
    assert value.cosine == pytest.approx(over_pairs(g, t) / math.sqrt(over_pairs(g, g) * over_pairs(t, t)), rel=1e-5)
    assert value.noise == pytest.approx(float(g.var(0).sum() / t.var(0).sum()), rel=1e-5)
    assert value.batches_to_bias == pytest.approx(float(g.var(0).sum()) / over_pairs(g - t, g - t), rel=1e-5)
    assert errors.bias > 0 and errors.cosine > 0


def test_the_same_gradient_has_no_error(module):
    t = torch.arange(BATCHES * SIZE).view(BATCHES, SIZE).float()
    value, errors = module.error_of(sums_of(module, t, t), sums_of(module, t, t), BATCHES)
    assert (value.bias, value.noise, value.batches_to_bias, errors.bias) == (0.0, 1.0, math.inf, 0.0)
    assert value.cosine == pytest.approx(1.0)


def test_best_alpha_takes_a_known_bias_away(module):
    torch.manual_seed(1)
    t, bias = torch.randn(BATCHES, SIZE), torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    none, full = t + bias, t + bias - 1.6 * bias  # alpha = 1 / 1.6 hits t
    found = module.best_alpha(*(sums_of(module, g, t) for g in (none, full, full - none)))
    assert found == pytest.approx(1 / 1.6, rel=1e-5)
