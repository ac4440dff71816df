"""The loss of one microbatch, as a sum over tokens.

    loss = - sum_t weight_t J_t + sum_t share_t (kl_coefficient KL_t - entropy_bonus H_t)

J comes from the objective (`objectives`), weight_t and share_t from `LossScaler`. Megatron divides by the global number of tokens. The
penalty and the bonus are regularisers of the policy, so alpha does not scale them.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ais_megatron.algorithm.objectives import kl_penalty, surrogate
from ais_megatron.algorithm.scaler import TokenFactors
from ais_megatron.config.algorithm import ObjectiveConfig

POLICY_METRICS = ("loss", "entropy", "policy_ratio_mean", "clip_fraction", "reference_kl", "unlikely_fraction")
UNLIKELY = 1e-4  # a token to which the trainer gives less than this is unlikely; garbled responses have many (arXiv 2604.07853)


class PolicyLoss(NamedTuple):
    """The loss of one microbatch, and its metrics."""

    total: Tensor
    """float32 scalar with grad."""
    metric_sums: Tensor
    """float64 ``[len(POLICY_METRICS)]``, sums over the kept tokens, each as often as it counts."""


def policy_loss(
    objective: ObjectiveConfig,
    logprobs: Tensor,
    entropy: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    advantages: Tensor,
    factors: TokenFactors,
) -> PolicyLoss:
    """The loss of one microbatch of whole rows.

    Args:
        logprobs, entropy: float32 ``[batch, seq]`` with grad.
        old_logprobs: the same shape, no grad.
        reference_logprobs: the same shape, no grad; None if there is no penalty.
        advantages: float32 ``[batch]``.
    """
    kept, clip = factors.kept, objective.resolved
    j = surrogate(objective.name, logprobs, old_logprobs, advantages, kept, clip.clip_low, clip.clip_high)
    total = -(factors.policy * j.objective).sum()
    kl = torch.zeros_like(logprobs)
    if objective.kl_coefficient and reference_logprobs is not None:
        kl = kl_penalty(objective.kl_estimator, logprobs, reference_logprobs, kept)
        total = total + objective.kl_coefficient * (factors.shares * kl).sum()
    if objective.entropy_bonus:
        total = total - objective.entropy_bonus * (factors.shares * entropy.masked_fill(~kept, 0.0)).sum()
    sums = [masked_sum(x, kept, factors.counts) for x in (entropy, j.policy_ratio, j.clipped.float(), kl, logprobs < math.log(UNLIKELY))]
    return PolicyLoss(total, torch.stack([total.detach().double(), *sums]))


def masked_sum(values: Tensor, loss_mask: Tensor, counts: Tensor) -> Tensor:
    """float64 scalar, detached. counts: int64 ``[batch, seq]``."""
    return (values.detach().masked_fill(~loss_mask, 0.0) * counts).sum(dtype=torch.float64)
