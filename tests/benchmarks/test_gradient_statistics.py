"""The benchmark's estimates of a gradient's bias and noise against their definitions, pair by pair, and against known answers."""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch

from tests.helpers.paths import ROOT

BATCHES, SIZE = 16, 5


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gradient_statistics")


def gram_of(*gradients):
    """The inner products of estimators' gradients, each ``[batches, size]``."""
    vectors = torch.stack(gradients, 1).double()
    return torch.einsum("bks,cls->bkcl", vectors, vectors)


def alone(number, of, batches=BATCHES):
    coefficients = torch.zeros(batches, of, dtype=torch.float64)
    coefficients[:, number] = 1.0
    return coefficients


def over_pairs(x, y):
    products = [float(x[i].double().dot(y[j].double())) for i, j in itertools.permutations(range(len(x)), 2)]
    return sum(products) / len(products)


@pytest.fixture
def gradients():
    torch.manual_seed(0)
    t = torch.randn(BATCHES, SIZE) + 2.0
    return t, t + 0.5 * torch.randn(BATCHES, SIZE) + torch.tensor([1.0, 0.0, 0.0, -1.0, 0.0])


def test_error_by_pairs(module, gradients):
    t, g = gradients
    error = module.gradient_error(gram_of(t, g), alone(1, 2), alone(0, 2))
    length = over_pairs(t, t)
    assert float(error.bias[0]) == pytest.approx(math.sqrt(over_pairs(g - t, g - t) / length))
    assert float(error.cosine[0]) == pytest.approx(over_pairs(g, t) / math.sqrt(over_pairs(g, g) * length))
    assert float(error.norm[0]) == pytest.approx(math.sqrt(over_pairs(g, g) / length))
    assert float(error.noise[0]) == pytest.approx(float(g.var(0).sum() / t.var(0).sum()))
    assert error.batches_to_bias == pytest.approx(float(g.var(0).sum()) / over_pairs(g - t, g - t))
    assert float(error.error(10.0)[0]) == pytest.approx((over_pairs(g - t, g - t) + float(g.var(0).sum()) / 10.0) / length)


def test_every_replicate_leaves_one_batch_out(module, gradients):
    error = module.gradient_error(gram_of(*gradients), alone(1, 2), alone(0, 2))
    for left_out in (0, 7, BATCHES - 1):
        rest = [x[torch.arange(BATCHES) != left_out] for x in gradients]
        again = module.gradient_error(gram_of(*rest), alone(1, 2, BATCHES - 1), alone(0, 2, BATCHES - 1))
        for key in ("bias", "cosine", "norm", "noise", "variance"):
            assert float(getattr(error, key)[1 + left_out]) == pytest.approx(float(getattr(again, key)[0]))


def test_the_jackknife_error_of_a_mean_is_its_standard_error(module):
    values = torch.tensor([1.0, 4.0, 2.0, 7.0], dtype=torch.float64)
    without = (values.sum() - values) / 3
    found = module.estimate(torch.cat([values.mean()[None], without]))
    assert found.value == 3.5 and found.error == pytest.approx(float(values.std() / 2))


def test_a_paired_difference_has_the_error_of_the_difference(module):
    # x and y = x + 1 + small noise share all of their large noise, so their difference is known much better than either.
    torch.manual_seed(2)
    x, small = 10.0 * torch.randn(BATCHES, dtype=torch.float64), 0.01 * torch.randn(BATCHES, dtype=torch.float64)

    def replicates(values):
        return torch.cat([values.mean()[None], (values.sum() - values) / (BATCHES - 1)])

    found = module.estimate(replicates(x + 1.0 + small) - replicates(x))
    assert found.error == pytest.approx(float(small.std() / BATCHES**0.5))
    assert module.estimate(replicates(x)).error > 100 * found.error


def test_without_noise_the_bias_is_exact(module):
    t, g = torch.tensor([3.0, 4.0]).expand(BATCHES, 2), torch.tensor([3.0, 3.0]).expand(BATCHES, 2)
    error = module.gradient_error(gram_of(t, g), alone(1, 2), alone(0, 2))
    assert module.estimate(error.bias) == pytest.approx((1 / 5, 0.0))
    assert module.estimate(error.error(1.0)) == pytest.approx((1 / 25, 0.0))
    assert float(error.cosine[0]) == pytest.approx(21 / (5 * math.sqrt(18)))


def test_bias_and_noise_are_right_on_average(module):
    torch.manual_seed(3)
    found = []
    for _ in range(400):  # t of length 1, bias 0.6, and noise of variance 1 in each of four directions; g has half the noise
        noise = torch.randn(BATCHES, 4)
        t, g = noise + torch.tensor([1.0, 0.0, 0.0, 0.0]), 0.5 * noise + torch.tensor([1.0, 0.6, 0.0, 0.0])
        gram = gram_of(t, g)
        of_g, of_d = (module.moments(module.combined(gram, x, x)) for x in (alone(1, 2), alone(1, 2) - alone(0, 2)))
        found.append([float(of_d.product[0]), float(of_g.covariance[0])])
    found = torch.tensor(found)
    for mean, error, right in zip(found.mean(0), found.std(0) / 20, (0.36, 1.0), strict=True):
        assert abs(mean - right) < 4 * error


def test_the_same_gradient_has_no_error(module):
    t = torch.arange(BATCHES * SIZE).view(BATCHES, SIZE)
    error = module.gradient_error(gram_of(t), alone(0, 1), alone(0, 1))
    assert module.estimate(error.bias) == (0.0, 0.0) and error.batches_to_bias == math.inf
    assert (float(error.noise[0]), float(error.cosine[0])) == pytest.approx((1.0, 1.0))


def test_a_mixture_by_batch_is_the_mixture_of_the_gradients(module, gradients):
    none, full = gradients
    alpha = torch.rand(BATCHES, 1)
    mixed = none + alpha * (full - none)
    coefficients = torch.cat([1.0 - alpha, alpha], 1).double()
    direct = module.gradient_error(gram_of(none, mixed), alone(1, 2), alone(0, 2))
    found = module.gradient_error(gram_of(none, full), coefficients, alone(0, 2))
    for key in ("bias", "cosine", "norm", "noise"):
        torch.testing.assert_close(getattr(found, key), getattr(direct, key), rtol=1e-5, atol=1e-5)


def test_best_alpha_takes_a_known_bias_away(module):
    torch.manual_seed(1)
    t, bias = torch.randn(BATCHES, SIZE).double(), torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0])
    gram = gram_of(t, t + bias, t + bias - 1.6 * bias)  # alpha = 1 / 1.6 hits t
    alpha, least = module.best_alpha(gram, alone(1, 3), alone(2, 3), alone(0, 3), math.inf)
    assert float(alpha[0]) == pytest.approx(1 / 1.6) and float(least[0]) == pytest.approx(0.0, abs=1e-9)


def test_best_alpha_weighs_bias_against_noise(module, gradients):
    t, g = gradients
    gram = gram_of(t, g, g + torch.randn(BATCHES, SIZE))
    alpha, least = module.best_alpha(gram, alone(1, 3), alone(2, 3), alone(0, 3), 5.0)

    def error(alpha):
        return float(module.gradient_error(gram, torch.lerp(alone(1, 3), alone(2, 3), alpha), alone(0, 3)).error(5.0)[0])

    assert float(least[0]) == pytest.approx(error(float(alpha[0])))
    assert float(least[0]) < min(error(float(alpha[0]) + shift) for shift in (-0.01, 0.01))
