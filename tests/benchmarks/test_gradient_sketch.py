"""Sketches of gradients keep inner products: exactly if all parameters fit, and on average otherwise."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.helpers.paths import ROOT


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gradient_sketch")


def test_what_fits_is_kept_exactly(module):
    sketcher = module.Sketcher([6, 2], size=10)
    sketch = sketcher([torch.arange(6.0).view(2, 3), torch.tensor([6.0, 7.0])])
    assert sketcher.is_exact and sketch.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]


def test_products_of_sketches_are_right_on_average_with_the_stated_variance(module):
    torch.manual_seed(0)
    size, sizes, seeds = 16, [40, 7, 16], 4000
    x, y = torch.randn(63), torch.randn(63)
    y += 0.5 * x
    found = []
    for seed in range(seeds):
        sketcher = module.Sketcher(sizes, size, seed)
        found.append(float(sketcher(x.split(sizes)).dot(sketcher(y.split(sizes)))))
    found = torch.tensor(found)
    bound = (x.dot(x) * y.dot(y) + x.dot(y) ** 2) / size
    assert float(found.mean()) == pytest.approx(float(x.dot(y)), abs=4 * float((bound / seeds).sqrt()))
    assert 0.5 * bound < found.var() < bound * (1 + 4 * (2 / seeds) ** 0.5)


def test_a_sketch_is_linear_and_the_same_for_every_gradient(module):
    torch.manual_seed(1)
    sketcher, sizes = module.Sketcher([30, 20], 8), [30, 20]
    x, y = torch.randn(50), torch.randn(50)
    mixed = sketcher((x + 0.25 * (y - x)).split(sizes))
    torch.testing.assert_close(mixed, torch.lerp(sketcher(x.split(sizes)), sketcher(y.split(sizes)), 0.25))


def test_the_gram_matrix_has_every_product(module, monkeypatch):
    monkeypatch.setattr(module, "PRODUCT_CHUNK", 3)
    sketches = torch.randn(4, 2, 7)  # [batches, vectors, size]
    gram = module.GramMatrix(5, 2, 7)
    for batch in sketches:
        gram.add(batch)
    torch.testing.assert_close(gram.values, torch.einsum("bks,cls->bkcl", sketches, sketches).double(), rtol=1e-5, atol=1e-5)
