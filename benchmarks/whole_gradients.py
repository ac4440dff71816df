"""What the measured coefficient would choose if it saw more: whole gradients, or also the batches to come.

The coefficient itself sees sketches of the output layer's gradient, up to the present batch. These rules see the gradients of all
parameters, which training cannot know. So what they gain is the most that a better estimate could gain.
"""

from __future__ import annotations

from typing import Any

import torch
from gradient_arms import MEASURED, Mixture, basic_gradient, changed, limit_text
from gradient_basis import Record
from torch import Tensor

from ais_megatron.algorithm.measured import Choice, least_error, limits
from ais_megatron.config import Config

_BANDS = {"bands": [[0.5, 2.0], [0.5, 5.0]]}
ARMS: dict[str, dict[str, Any]] = {
    "whole gradients": MEASURED,
    "whole gradients, H = 100": MEASURED | {"horizon": 100.0},
    "in hindsight": MEASURED | {"prior": 0.0},
    "in hindsight, H = 100": MEASURED | {"prior": 0.0, "horizon": 100.0},
    "in hindsight, bands": MEASURED | {"prior": 0.0} | _BANDS,
    "in hindsight, bands, H = 100": MEASURED | {"prior": 0.0, "horizon": 100.0} | _BANDS,
}
"""Their keys of the `ais` section. Those in hindsight have one alpha and one limit for all batches."""


def mixtures(record: Record) -> dict[str, Mixture]:
    """Of every arm whose gradients the record has."""
    result = {}
    for name, changes in ARMS.items():
        config = changed(record.config, {"correction": "ais", "ais": changes})
        full = [basic_gradient(config, limit) for limit in limits(config)]
        if all(vector in record.vectors for vector in (full[0].uncorrected, *full)):
            result[name] = _mixture(record, config, in_hindsight="hindsight" in name)
    return result


def _mixture(record: Record, config: Config, in_hindsight: bool) -> Mixture:
    batches, choices = len(record.gram), limits(config)
    full = [record.vectors.index(basic_gradient(config, limit)) for limit in choices]
    none = record.vectors.index(basic_gradient(config, choices[0]).uncorrected)
    phi = torch.eye(len(record.vectors), dtype=record.gram.dtype)[[none, *full]]
    phi[1:] -= phi[0].clone()  # the gradients with weights 1, and with v_k - 1
    products = torch.einsum("ik,bkcl,jl->bcij", phi, record.gram, phi)
    mixture = Mixture(torch.zeros(batches, len(record.vectors), dtype=torch.float64), [], [], [])
    age = torch.arange(batches)
    for now, row in enumerate(mixture.coefficients):
        past = (config.ais.memory ** (now - age).double()).where(age <= now, 0.0)
        choice = _choice(products, torch.ones_like(past) if in_hindsight else past, config)
        assert choice.limit is not None
        row += phi[0] + choice.alpha * phi[1 + choice.limit]
        mixture.alphas.append(choice.alpha)
        mixture.limits.append(limit_text(choices[choice.limit]))
    return mixture


def _choice(products: Tensor, counts: Tensor, config: Config) -> Choice:
    """products: <phi_i, phi_j> of any two batches, ``[batches, batches, 1 + K, 1 + K]``. counts: how much each batch counts."""
    own = products.diagonal().permute(2, 0, 1)
    total, pairs = counts.sum(), counts.sum().square() - counts.square().sum()
    of_pairs = torch.einsum("b,bcij,c->ij", counts, products, counts) - torch.einsum("b,bij->ij", counts.square(), own)
    squares = of_pairs / pairs if pairs > 0.0 else torch.zeros_like(of_pairs)
    noise = torch.einsum("b,bij->ij", counts, own) / total - squares
    return least_error(squares, noise, float(total), config.ais)
