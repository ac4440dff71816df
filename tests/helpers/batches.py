"""Batches of a few hand-made or random tokens, and a configuration of nothing but an algorithm."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ais_megatron.algorithm.diagnostics import NUM_EXTREMES, NUM_SUMS, Diagnostics, from_statistics
from ais_megatron.config import Config, build_config

ARCHITECTURE = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, head_dim=16
)


def config_with(**sections: object) -> Config:
    return build_config({"model": {"architecture": ARCHITECTURE}, **sections})


def hand_batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two responses; weights 2, 0.5, 4 (truncated to 2 at C = 2), and one masked token that must not count."""
    ratio = torch.tensor([[9.0, 2.0, 0.5], [9.0, 4.0, 9.0]], dtype=torch.float64)
    rollout = torch.full((2, 3), -3.0, dtype=torch.float64)
    mask = torch.tensor([[False, True, True], [False, True, False]])
    return rollout + ratio.log(), rollout, torch.tensor([1.0, -2.0]), mask


def random_parts(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(24, 19, generator=generator) * 4
    rollout = old + 0.3 * torch.randn(24, 19, generator=generator)
    mask = torch.rand(24, 19, generator=generator) < 0.6
    mask[5] = False
    return old, rollout, torch.randn(24, generator=generator), mask


def diagnostics_of(rho: float = 1.0, divergence: float = 0.0, nu: float = 1.0, rho_raw: float = 1.0) -> Diagnostics:
    base = from_statistics(torch.ones(NUM_SUMS, dtype=torch.float64), torch.ones(NUM_EXTREMES, dtype=torch.float64))
    return replace(base, weight_reliability=rho, weight_reliability_raw=rho_raw, divergence_severity=divergence, variance_amplification=nu)


def random_rows(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    mask = (torch.rand(5, 9, generator=g) < 0.7) & (torch.arange(9) > 0)
    mask[3] = False
    old = -torch.rand(5, 9, generator=g, dtype=torch.float64) * 3
    noise = torch.randn(4, 5, 9, generator=g, dtype=torch.float64)
    return dict(
        mask=mask,
        old=old,
        rollout=old + 0.3 * noise[0],
        logprobs=old + 0.3 * noise[1],
        reference=old + 0.3 * noise[2],
        entropy=noise[3].exp(),
        advantages=torch.randn(5, generator=g, dtype=torch.float64),
    )
