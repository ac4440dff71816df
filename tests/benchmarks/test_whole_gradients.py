"""Choices that know whole gradients: their optimum where it is known."""

from __future__ import annotations

import importlib

import pytest
import torch

from ais_megatron.config import build_config
from tests.helpers.paths import ROOT
from tests.helpers.runs import small

BATCHES = 6


@pytest.fixture
def arms(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("gradient_arms")


@pytest.fixture
def whole(arms):
    return importlib.import_module("whole_gradients")


@pytest.fixture
def record(arms, tmp_path):
    """A record of made-up gradients ``[batches, vectors, size]``."""
    data = small(tmp_path)
    data["rollout"] |= {"quantization": "fp8_e4m3"}
    config = build_config(data)
    vectors = arms.basis(config, arms.possible_arms(config, False)[0].values())

    def make(gradient):
        basis = torch.stack([torch.stack([gradient(batch, vector) for vector in vectors]) for batch in range(BATCHES)]).double()
        gram = torch.einsum("bks,cls->bkcl", basis, basis)
        return importlib.import_module("gradient_basis").Record("", config, vectors, gram, {}, {}, 4, 4)

    return make


def weight(vector):
    """How far a basic gradient is on the way from the uncorrected one to that of the largest C."""
    return {"none": 0.0, "tis": (vector.correction.weight_cap - 1.0) / 9.0, "mis": 0.5}[vector.correction.name]


def test_without_noise_the_least_bias_is_chosen(whole, record):
    """All batches have the same gradients, so the limit that counts as unbiased is the best."""
    found = whole.mixtures(record(lambda batch, vector: torch.tensor([1.0, weight(vector), 0.0, 0.0])))
    hindsight = found["in hindsight"]
    assert hindsight.alphas == [1.0] * BATCHES and hindsight.limits == ["10"] * BATCHES
    first = found["whole gradients"]
    assert first.limits[0] == "1.5", "one batch shows no bias, so the prior chooses"


def test_without_bias_the_least_noise_is_chosen(whole, record):
    """The gradients of all limits have the same mean, and stronger corrections have more noise, of which alpha 0 has the least."""
    signs = torch.tensor([1.0, -1.0] * (BATCHES // 2))
    found = whole.mixtures(record(lambda batch, vector: torch.tensor([1.0, (1.0 + weight(vector)) * signs[batch], 0.0, 0.0])))
    assert found["in hindsight"].alphas == [0.0] * BATCHES


def test_only_the_past_counts_in_training(whole, record):
    """What later batches are like changes nothing for the rules without hindsight."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(BATCHES, 4, generator=generator)

    def gradient(batch, vector, late):
        louder = (1.0 + weight(vector)) * (late if batch >= 3 else 1.0)
        return torch.tensor([1.0, weight(vector), 0.0, 0.0]) + louder * noise[batch]

    calm, wild = (whole.mixtures(record(lambda b, v, late=late: gradient(b, v, late)))["whole gradients"] for late in (0.1, 10.0))
    assert torch.equal(calm.coefficients[:3], wild.coefficients[:3]) and calm.alphas[3:] != wild.alphas[3:]
