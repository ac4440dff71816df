"""How far the sampler is from the trainer: one vector of sums per rank, one all-reduce, then every figure.

    rho = (sum wbar)^2 / (n sum wbar^2)      weight reliability, the ESS ratio of the weights in use
    D   = mean(exp(l) - 1 - l)               divergence severity, the k3 estimator of KL(mu || pi_old), nats per token
    nu  = sum (wbar A)^2 / sum A^2           variance amplification

w and wbar are those of the correction's level: one per token, or one per response that all its tokens carry.

Source: AIS (arXiv 2605.13907), its three diagnostics. Ratios are taken of global sums only: a mean of ranks' ratios is
another number. Everything is float64 from before the exponential on, because at l = 1e-3 float32 gets D wrong by 12 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ais_megatron.algorithm.correction import Correction, importance_weights, log_importance_ratio, response_mean
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
    "kept",  # tokens of responses that were not rejected; at the levels of a response, such responses
    "kept_weight",  # sum of s at full strength over them: one term per token, or per response
    "rejected",  # tokens of rejected responses, or outside the band
    "g0",  # per response: g0 = mean A, g1 = mean wbar A, gap = g1 - g0
    "gap",
    "g0_gap",
    "gap_sq",
)
CPU_CHUNK = 2**16  # elements of [batch, seq] worked on at a time
NUM_EXTREMES = 3  # max w, max -w, max |p - q|: sent through the sum as one slot per rank


@dataclass(frozen=True)
class Diagnostics:
    """Global figures of one batch, equal on every rank; the words are those of docs/algorithm.md.

    k1_kl: mean(-l); ppl_ratio: mean over responses of exp(-mean l); chi2_token: mean(exp(2l)) - 1;
    prob_diff: |pi_old(y) - mu(y)|. num_tokens, num_sequences: over the whole batch.
    fraction_rejected: tokens that the correction dropped with their response, or gave the weight 0.
    mean_weight: of the correction at full strength, over the tokens kept; at the levels of a response over the responses kept,
    whatever their lengths, as in verl. signal_gap: over responses, mean of g1 - g0, how far
    the correction moves a response's mean advantage; signal_gap_variance and _covariance: its (unbiased) variance, and covariance with g0.
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
    fraction_rejected: float = 0.0
    mean_weight: float = 1.0
    signal_gap: float = 0.0
    signal_gap_variance: float = 0.0
    signal_gap_covariance: float = 0.0


def diagnose(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    weight_cap: float,
    group: dist.ProcessGroup | None = None,
    correction: Correction | None = None,
) -> Diagnostics:
    """The batch's `Diagnostics` from every rank's own tokens, with one all-reduce.

    Args:
        old_logprobs, rollout_logprobs: float32 ``[batch, seq]``.
        advantages: ``[batch]``, or ``[batch, seq]`` where they differ by token.
        loss_mask: bool ``[batch, seq]``.
        weight_cap: C.
        group: the data-parallel x context-parallel group (never TP or PP: replicas would count twice).
        correction: whose level, rejections and mean weight are measured; token-level ais if None.
    """
    sums, extremes = statistics(old_logprobs, rollout_logprobs, advantages, loss_mask, weight_cap, correction)
    vector = join(sums, extremes, group)
    if group is not None and dist.get_world_size(group) > 1:
        vector = all_reduce_sum(vector, group)
    return split(vector)


def join(sums: Tensor, extremes: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """One float64 vector whose SUM over the ranks of `group` holds everything: the sums, and one slot of extremes per rank."""
    world = dist.get_world_size(group) if group is not None else 1
    slots = torch.zeros(world, NUM_EXTREMES, dtype=torch.float64, device=sums.device)
    slots[dist.get_rank(group) if world > 1 else 0] = extremes
    return torch.cat([sums, slots.view(-1)])


def split(vector: Tensor) -> Diagnostics:
    """The figures of a reduced `join`."""
    return from_statistics(vector[: len(SUMS)], vector[len(SUMS) :].view(-1, NUM_EXTREMES).amax(0))


def statistics(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    weight_cap: float,
    correction: Correction | None = None,
) -> tuple[Tensor, Tensor]:
    """Sufficient statistics of whole rows of a batch: float64 sums ``[len(SUMS)]``, which add, and extremes
    ``[NUM_EXTREMES]``, of which the maximum counts (-inf where there is no token)."""
    correction = correction or Correction("ais", weight_cap=weight_cap)
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    parts = (old_logprobs, rollout_logprobs, advantages.expand_as(loss_mask), loss_mask)
    batch, seq = loss_mask.shape
    # On a CPU a few rows at a time, whose float64 intermediates stay in the cache; on a GPU one set of kernels for all.
    rows = max(1, CPU_CHUNK // max(seq, 1)) if loss_mask.device.type == "cpu" else batch
    chunks = [_of_rows(*(x[i : i + rows] for x in parts), weight_cap, correction) for i in range(0, batch, rows) or (0,)]
    return torch.stack([sums for sums, _ in chunks]).sum(0), torch.stack([extremes for _, extremes in chunks]).amax(0)


def _of_rows(
    old: Tensor, rollout: Tensor, advantages: Tensor, loss_mask: Tensor, cap: float, correction: Correction
) -> tuple[Tensor, Tensor]:
    """`statistics` of a few rows, over their response tokens alone, end to end: outside the mask anything may stand, NaN included."""
    where = loss_mask.flatten().nonzero()[:, 0]
    old, rollout, adv = (x.flatten().index_select(0, where) for x in (old, rollout, advantages))
    log_ratio, adv = log_importance_ratio(old.double(), rollout.double()), adv.double()
    excess = torch.special.expm1(log_ratio)
    prob_diff = old.exp_().sub_(rollout.exp_()).abs_()  # in the inputs' float32: no small difference is taken to a power here
    w, of_correction = _weights(log_ratio, excess, where, loss_mask, correction)
    w_trunc = w.clamp(max=cap)
    weighted_adv = w_trunc * adv
    lengths = loss_mask.sum(1)
    present = lengths > 0
    totals = torch.stack([_response_sums(x, lengths) for x in (log_ratio, adv, weighted_adv - adv)])
    mean_log_ratio, g0, gap = totals[:, present] / lengths[present]
    sums = torch.stack(
        [
            lengths.sum().double(),
            present.sum().double(),
            w_trunc.sum(),
            w_trunc.dot(w_trunc),
            w.sum(),
            w.dot(w),
            (excess - log_ratio).sum(),
            log_ratio.sum(),
            weighted_adv.dot(weighted_adv),
            adv.dot(adv),
            excess.dot(excess) + 2.0 * excess.sum(),  # exp(2 l) - 1
            torch.count_nonzero(w > cap).double(),
            prob_diff.sum(dtype=torch.float64),
            (-mean_log_ratio).exp().sum(),
            *of_correction,
            g0.sum(),
            gap.sum(),
            g0.dot(gap),
            gap.dot(gap),
        ]
    )
    if not len(w):
        return sums, sums.new_full((NUM_EXTREMES,), -math.inf)
    smallest, largest = w.aminmax()
    return sums, torch.stack([largest, -smallest, prob_diff.max().double()])


def _weights(
    log_ratio: Tensor, excess: Tensor, where: Tensor, loss_mask: Tensor, correction: Correction
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """w of the tokens at the flat positions `where`; and the sums "kept", "kept_weight" and "rejected", float64.

    excess: exp(log_ratio) - 1.
    """
    if correction.acts_on_tokens:
        w = excess + 1.0
        full = correction.limited(w)
        return w, (full.new_tensor(len(full)), full.sum(), torch.count_nonzero(full == 0.0).double())
    grid = log_ratio.new_zeros(loss_mask.shape)
    grid.view(-1)[where] = log_ratio
    w, full = importance_weights(grid, loss_mask, correction.level), correction.weights(grid, loss_mask)
    kept = correction.kept(grid, loss_mask)
    full = full.masked_fill(~kept, 0.0)
    rejected = torch.count_nonzero(full.flatten()[where] == 0.0).double()
    if correction.level == "token":
        averaged = kept.sum().double(), full.sum()
    else:  # each response counts once: its tokens all carry its one weight
        averaged = kept.any(1).sum().double(), response_mean(full, kept).sum()
    return w.flatten()[where], (*averaged, rejected)


def _response_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """float64 ``[batch]``: sums over each response of ``[tokens]`` values."""
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


def from_statistics(sums: Tensor, extremes: Tensor) -> Diagnostics:
    """The figures from global sums and extremes. Without a single token: a batch that agrees perfectly.

    Raises:
        ValueError: a sum is not finite, so some log-probability was not.
    """
    if not torch.isfinite(sums).all():
        bad = [name for name, value in zip(SUMS, sums.tolist(), strict=True) if not math.isfinite(value)]
        raise ValueError(f"log-probabilities of this batch are not finite (sums of {', '.join(bad)}); the policy or the rollout is corrupt")
    t = dict(zip(SUMS, sums.tolist(), strict=True))
    n, responses = t["tokens"], t["sequences"]
    if n == 0:
        return Diagnostics(0, 0, 1, 1, 0, 1, 0, 1, 0, 1, 1, 1, 0, 0, 0)
    max_w, minus_min_w, max_diff = extremes.tolist()
    gap, spread = t["gap"] / responses, max(responses - 1.0, 1.0)
    return Diagnostics(
        num_tokens=n,
        num_sequences=responses,
        weight_reliability=t["w_trunc"] ** 2 / (n * t["w_trunc_sq"]),
        weight_reliability_raw=t["w"] ** 2 / (n * t["w_sq"]),
        divergence_severity=t["k3"] / n,
        variance_amplification=t["weighted_adv_sq"] / t["adv_sq"] if t["adv_sq"] > 0 else 1.0,
        k1_kl=-t["log_ratio"] / n,
        ppl_ratio=t["ppl_ratio"] / responses,
        chi2_token=t["chi2"] / n,
        is_weight_mean=t["w"] / n,
        is_weight_min=-minus_min_w,
        is_weight_max=max_w,
        fraction_truncated=t["truncated"] / n,
        prob_diff_mean=t["prob_diff"] / n,
        prob_diff_max=max_diff,
        fraction_rejected=t["rejected"] / n,
        mean_weight=t["kept_weight"] / t["kept"] if t["kept"] else 1.0,
        signal_gap=gap,
        signal_gap_variance=max(0.0, t["gap_sq"] - responses * gap**2) / spread,
        signal_gap_covariance=(t["g0_gap"] - t["g0"] * gap) / spread,
    )


class RunningStatistics:
    """`statistics` of a batch that comes in pieces (microbatches): sums are added, extremes compared, nothing is reduced."""

    def __init__(self, weight_cap: float, correction: Correction) -> None:
        self._arguments = weight_cap, correction
        self._sums = torch.zeros(len(SUMS), dtype=torch.float64)
        self._extremes = torch.full((NUM_EXTREMES,), -math.inf, dtype=torch.float64)

    def add(self, old_logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor) -> None:
        """Whole rows, as in `statistics`; on a GPU nothing waits for the result."""
        sums, extremes = statistics(old_logprobs, rollout_logprobs, advantages, loss_mask, *self._arguments)
        self._sums = self._sums.to(sums.device) + sums
        self._extremes = torch.maximum(self._extremes.to(sums.device), extremes)

    def joined(self, group: dist.ProcessGroup) -> Tensor:
        """`join` of all pieces so far, on the CPU."""
        return join(self._sums.cpu(), self._extremes.cpu(), group)
