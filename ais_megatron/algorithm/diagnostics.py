"""How far the sampler is from the trainer: one vector of sums per rank, one all-reduce, then every figure.

    rho = (sum wbar)^2 / (n sum wbar^2)      weight reliability, the ESS ratio of the weights in use
    D   = mean(exp(l) - 1 - l)               divergence severity, the k3 estimator of KL(mu || pi_old), nats per token
    nu  = sum (wbar A)^2 / sum A^2           variance amplification

Source: AIS (arXiv 2605.13907), its three diagnostics. Ratios are taken of global sums only: a mean of ranks' ratios is
another number. Everything is float64 from before the exponential on, because at l = 1e-3 float32 gets D wrong by 12 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ais_megatron.algorithm.correction import log_importance_ratio
from ais_megatron.distributed import all_reduce_sum

SUMS = (
    "tokens",
    "sequences",
    "w_trunc",
    "w_trunc_sq",
    "w",
    "w_sq",
    "k3",
    "log_ratio",
    "weighted_adv_sq",
    "adv_sq",
    "chi2",
    "truncated",
    "prob_diff",
    "ppl_ratio",
)
NUM_EXTREMES = 3  # max w, max -w, max |p - q|: sent through the sum as one slot per rank


@dataclass(frozen=True)
class Diagnostics:
    """Global figures of one batch, equal on every rank; the words are those of docs/algorithm.md.

    k1_kl: mean(-l); ppl_ratio: mean over responses of exp(-mean l); chi2_token: mean(exp(2l)) - 1;
    prob_diff: |pi_old(y) - mu(y)|. num_tokens, num_sequences: over the whole batch.
    """

    num_tokens: float
    num_sequences: float
    weight_reliability: float
    weight_reliability_raw: float
    divergence_severity: float
    variance_amplification: float
    k1_kl: float
    ppl_ratio: float
    chi2_token: float
    is_weight_mean: float
    is_weight_min: float
    is_weight_max: float
    fraction_truncated: float
    prob_diff_mean: float
    prob_diff_max: float


def diagnose(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    weight_cap: float,
    group: dist.ProcessGroup | None = None,
) -> Diagnostics:
    """The batch's `Diagnostics` from every rank's own tokens, with one all-reduce.

    Args:
        old_logprobs, rollout_logprobs: float32 ``[batch, seq]``.
        advantages: ``[batch]``, or ``[batch, seq]`` where they differ by token.
        loss_mask: bool ``[batch, seq]``.
        group: the data-parallel x context-parallel group (never TP or PP: replicas would count twice).
    """
    sums, extremes = statistics(old_logprobs, rollout_logprobs, advantages, loss_mask, weight_cap)
    world = dist.get_world_size(group) if group is not None else 1
    slots = torch.zeros(world, NUM_EXTREMES, dtype=torch.float64, device=sums.device)
    slots[dist.get_rank(group) if world > 1 else 0] = extremes
    vector = torch.cat([sums, slots.view(-1)])
    if world > 1:
        vector = all_reduce_sum(vector, group)
    return from_statistics(vector[: len(SUMS)], vector[len(SUMS) :].view(world, NUM_EXTREMES).amax(0))


def statistics(
    old_logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, weight_cap: float
) -> tuple[Tensor, Tensor]:
    """Sufficient statistics of one part of a batch: float64 sums ``[len(SUMS)]``, which add, and extremes
    ``[NUM_EXTREMES]``, of which the maximum counts (-inf where there is no token)."""
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    old, rollout = old_logprobs[loss_mask].double(), rollout_logprobs[loss_mask].double()
    adv = advantages.expand_as(old_logprobs)[loss_mask].double()
    log_ratio = log_importance_ratio(old, rollout)
    w = log_ratio.exp()
    w_trunc = w.clamp(max=weight_cap)
    prob_diff = (old.exp() - rollout.exp()).abs()
    lengths = loss_mask.sum(1)
    row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    per_row = torch.zeros(len(lengths), dtype=torch.float64, device=lengths.device).index_add_(0, row, log_ratio)
    present = lengths > 0
    sums = torch.stack(
        [
            lengths.sum().double(),
            present.sum().double(),
            w_trunc.sum(),
            w_trunc.square().sum(),
            w.sum(),
            w.square().sum(),
            (torch.special.expm1(log_ratio) - log_ratio).sum(),
            log_ratio.sum(),
            (w_trunc * adv).square().sum(),
            adv.square().sum(),
            torch.special.expm1(2 * log_ratio).sum(),
            (w > weight_cap).sum().double(),
            prob_diff.sum(),
            (-per_row[present] / lengths[present]).exp().sum(),
        ]
    )
    if not len(w):
        return sums, sums.new_full((NUM_EXTREMES,), -math.inf)
    return sums, torch.stack([w.max(), -w.min(), prob_diff.max()])


def from_statistics(sums: Tensor, extremes: Tensor) -> Diagnostics:
    """The figures from global sums and extremes. Without a single token: a batch that agrees perfectly.

    Raises:
        ValueError: a sum is not finite, so some log-probability was not.
    """
    if not torch.isfinite(sums).all():
        bad = [name for name, value in zip(SUMS, sums.tolist(), strict=True) if not math.isfinite(value)]
        raise ValueError(f"log-probabilities of this batch are not finite (sums of {', '.join(bad)}); the policy or the rollout is corrupt")
    t = dict(zip(SUMS, sums.tolist(), strict=True))
    n = t["tokens"]
    if n == 0:
        return Diagnostics(0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 0, 0)
    max_w, minus_min_w, max_diff = extremes.tolist()
    return Diagnostics(
        num_tokens=n,
        num_sequences=t["sequences"],
        weight_reliability=t["w_trunc"] ** 2 / (n * t["w_trunc_sq"]),
        weight_reliability_raw=t["w"] ** 2 / (n * t["w_sq"]),
        divergence_severity=t["k3"] / n,
        variance_amplification=t["weighted_adv_sq"] / t["adv_sq"] if t["adv_sq"] > 0 else 1.0,
        k1_kl=-t["log_ratio"] / n,
        ppl_ratio=t["ppl_ratio"] / t["sequences"],
        chi2_token=t["chi2"] / n,
        is_weight_mean=t["w"] / n,
        is_weight_min=-minus_min_w,
        is_weight_max=max_w,
        fraction_truncated=t["truncated"] / n,
        prob_diff_mean=t["prob_diff"] / n,
        prob_diff_max=max_diff,
    )
