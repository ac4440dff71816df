"""Measures how far the sampler is from the trainer, with one vector of sums per rank and one all-reduce.

    rho = (sum wbar)^2 / (n sum wbar^2)      weight reliability, the ESS ratio of the weights in use
    D   = mean(exp(l) - 1 - l)               divergence severity, the k3 estimator of KL(mu || pi_old), nats per token
    nu  = sum (wbar A)^2 / sum A^2           variance amplification

w and wbar are those of the correction's level: one per token, or one per response, which all its tokens have. D is also measured by
position in the response, because the error of a KV cache can grow along it. A bin holds twice as many positions as the one before it: the
tokens 1, 2 to 3, 4 to 7, and so on.

Source: AIS (arXiv 2605.13907), its three diagnostics. Ratios are computed only from global sums, because the mean of the ranks' ratios
is a different number. Everything is float64 from before the exponential on, because at l = 1e-3 float32 gets D wrong by 12 %.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ais_megatron.algorithm.correction import Correction, importance_weights, log_importance_ratio, response_mean
from ais_megatron.algorithm.gradients import GradientSums, ResponseGradients
from ais_megatron.distributed import all_reduce_sum

CPU_CHUNK = 2**16  # number of elements of [batch, seq] that are processed at a time

Value = TypeVar("Value")


class Sums(NamedTuple, Generic[Value]):
    """The sums over tokens, responses and ranks: float64 scalars on each rank, numbers after the reduction.

    w is the weight at the correction's level, and wbar is w truncated at C. l is the log importance ratio, A the advantage.
    """

    tokens: Value
    """Response tokens."""
    sequences: Value
    """Responses with at least one such token."""
    w_trunc: Value
    """wbar."""
    w_trunc_sq: Value
    """wbar squared."""
    w: Value
    """w."""
    w_sq: Value
    """w squared."""
    k3: Value
    """exp(l) - 1 - l."""
    log_ratio: Value
    """l."""
    weighted_adv_sq: Value
    """(wbar A) squared."""
    adv_sq: Value
    """A squared."""
    chi2: Value
    """exp(2 l) - 1."""
    truncated: Value
    """Tokens with w > C."""
    prob_diff: Value
    """|pi_old(y) - mu(y)|."""
    ppl_ratio: Value
    """Per response: exp(-mean l)."""
    kept: Value
    """Tokens of responses that were not rejected. If a response has one weight, the number of such responses."""
    kept_weight: Value
    """s at full strength, summed over these tokens or responses."""
    rejected: Value
    """Tokens of rejected responses, or outside the band."""
    g0: Value
    """Per response: mean A."""
    gap: Value
    """Per response: g1 - g0, where g1 = mean wbar A."""
    g0_gap: Value
    """Per response: g0 (g1 - g0)."""
    gap_sq: Value
    """Per response: (g1 - g0) squared."""


class Extremes(NamedTuple, Generic[Value]):
    """Values whose maximum over all ranks is needed. In the all-reduce, which sums, every rank has its own slot for them."""

    largest_w: Value
    minus_smallest_w: Value
    largest_prob_diff: Value


NUM_BINS = 18  # bin b has the tokens 2**b to 2**(b+1) - 1 of a response, counted from 1; the last bin has all later ones too
NUM_SUMS = len(Sums._fields) + 2 * NUM_BINS  # after the `Sums`: number of tokens, and sum of exp(l) - 1 - l, in each bin
NUM_EXTREMES = len(Extremes._fields)


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """Global figures of one batch, equal on every rank. docs/algorithm.md explains the terms.

    The defaults are those of a batch without tokens: sampler and trainer agree perfectly.
    """

    num_tokens: float = 0.0
    """Response tokens of the whole batch."""
    num_sequences: float = 0.0
    """Responses of the whole batch."""
    weight_reliability: float = 1.0
    """rho of the truncated weights."""
    weight_reliability_raw: float = 1.0
    """rho of the weights without truncation."""
    divergence_severity: float = 0.0
    """D, in nats per token."""
    variance_amplification: float = 1.0
    """nu."""
    k1_kl: float = 0.0
    """mean(-l), in nats per token."""
    ppl_ratio: float = 1.0
    """Mean over responses of exp(-mean l)."""
    chi2_token: float = 0.0
    """mean(exp(2l)) - 1."""
    is_weight_mean: float = 1.0
    """Mean of w."""
    is_weight_min: float = 1.0
    """Smallest w."""
    is_weight_max: float = 1.0
    """Largest w."""
    fraction_truncated: float = 0.0
    """Share of tokens with w > C."""
    prob_diff_mean: float = 0.0
    """Mean of |pi_old(y) - mu(y)|."""
    prob_diff_max: float = 0.0
    """The largest |pi_old(y) - mu(y)|."""
    fraction_rejected: float = 0.0
    """Share of tokens whose response was rejected, or whose weight is 0."""
    mean_weight: float = 1.0
    """Mean weight of the correction at full strength over the kept tokens. If a response has one weight, over the kept responses, whatever
    their lengths, as in verl."""
    signal_gap: float = 0.0
    """Mean over responses of g1 - g0: how much the correction changes a response's mean advantage."""
    signal_gap_variance: float = 0.0
    """Its variance over responses, unbiased."""
    signal_gap_covariance: float = 0.0
    """Its covariance with g0."""
    divergence_by_position: tuple[float, ...] = ()
    """D in each bin of positions, up to the longest response."""


def diagnose(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    correction: Correction,
    group: dist.ProcessGroup | None = None,
) -> Diagnostics:
    """The `Diagnostics` of a batch, from every rank's own tokens and one all-reduce. See `diagnose_with`."""
    nothing = torch.zeros(0, dtype=torch.float64)
    return diagnose_with(nothing, old_logprobs, rollout_logprobs, advantages, loss_mask, correction, group)[0]


def diagnose_with(
    further: Tensor,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    correction: Correction,
    group: dist.ProcessGroup | None = None,
) -> tuple[Diagnostics, Tensor]:
    """The `Diagnostics` of a batch, and `further` summed over ranks, with one all-reduce.

    Args:
        further: float64 ``[n]``, further sums of this rank.
        old_logprobs, rollout_logprobs: float32 ``[batch, seq]``.
        advantages: ``[batch]``, or ``[batch, seq]`` if the tokens of a response differ.
        loss_mask: bool ``[batch, seq]``.
        correction: its weight cap, level, rejections and mean weight are used.
        group: the data-parallel x context-parallel group. (With TP or PP, copies would count twice.)
    """
    sums, extremes = statistics(old_logprobs, rollout_logprobs, advantages, loss_mask, correction)
    vector = torch.cat([further.to(sums.device), join(sums, extremes, group)])
    if group is not None and dist.get_world_size(group) > 1:
        vector = all_reduce_sum(vector, group)
    return split(vector[len(further) :]), vector[: len(further)]


def join(sums: Tensor, extremes: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """A float64 vector to be summed over the ranks of `group`. It has the sums, and one slot of extremes per rank."""
    world = dist.get_world_size(group) if group is not None else 1
    slots = torch.zeros(world, NUM_EXTREMES, dtype=torch.float64, device=sums.device)
    slots[dist.get_rank(group) if world > 1 else 0] = extremes
    return torch.cat([sums, slots.view(-1)])


def split(vector: Tensor) -> Diagnostics:
    """The figures from a reduced `join`."""
    return from_statistics(vector[:NUM_SUMS], vector[NUM_SUMS:].view(-1, NUM_EXTREMES).amax(0))


def statistics(
    old_logprobs: Tensor, rollout_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, correction: Correction
) -> tuple[Tensor, Tensor]:
    """The statistics of whole rows of a batch: the `Sums` and the sums by position, float64 ``[NUM_SUMS]``, and the `Extremes`,
    ``[NUM_EXTREMES]`` (-inf without tokens)."""
    if advantages.dim() == 1:
        advantages = advantages[:, None]
    advantages = advantages.expand_as(loss_mask)
    batch, seq = loss_mask.shape
    # On a CPU a few rows at a time, so that their float64 intermediates stay in the cache. On a GPU all at once.
    rows = max(1, CPU_CHUNK // max(seq, 1)) if loss_mask.device.type == "cpu" else batch
    cuts = [slice(first, first + rows) for first in range(0, batch, rows) or (0,)]
    chunks = [_of_rows(old_logprobs[cut], rollout_logprobs[cut], advantages[cut], loss_mask[cut], correction) for cut in cuts]
    return torch.stack([sums for sums, _ in chunks]).sum(0), torch.stack([extremes for _, extremes in chunks]).amax(0)


def _of_rows(old: Tensor, rollout: Tensor, advantages: Tensor, loss_mask: Tensor, correction: Correction) -> tuple[Tensor, Tensor]:
    """`statistics` of a few rows. Only response tokens are used, one after the other. Outside the mask any value is allowed, even NaN."""
    where = loss_mask.flatten().nonzero()[:, 0]
    old, rollout, adv = (x.flatten().index_select(0, where) for x in (old, rollout, advantages))
    log_ratio, adv = log_importance_ratio(old.double(), rollout.double()), adv.double()
    excess = torch.special.expm1(log_ratio)
    prob_diff = old.exp_().sub_(rollout.exp_()).abs_()  # float32 as the inputs is enough, because no small difference is exponentiated here
    weighed = _weigh(log_ratio, excess, where, loss_mask, correction)
    w, cap = weighed.w, correction.weight_cap
    w_trunc = w.clamp(max=cap)
    weighted_adv = w_trunc * adv
    lengths = loss_mask.sum(1)
    present = lengths > 0
    totals = torch.stack([_response_sums(x, lengths) for x in (log_ratio, adv, weighted_adv - adv)])
    mean_log_ratio, g0, gap = totals[:, present] / lengths[present]
    k3 = excess - log_ratio
    sums = Sums(
        tokens=lengths.sum().double(),
        sequences=present.sum().double(),
        w_trunc=w_trunc.sum(),
        w_trunc_sq=w_trunc.dot(w_trunc),
        w=w.sum(),
        w_sq=w.dot(w),
        k3=k3.sum(),
        log_ratio=log_ratio.sum(),
        weighted_adv_sq=weighted_adv.dot(weighted_adv),
        adv_sq=adv.dot(adv),
        chi2=excess.dot(excess) + 2.0 * excess.sum(),  # exp(2 l) - 1 without loss of digits for small l
        truncated=torch.count_nonzero(w > cap).double(),
        prob_diff=prob_diff.sum(dtype=torch.float64),
        ppl_ratio=(-mean_log_ratio).exp().sum(),
        kept=weighed.kept,
        kept_weight=weighed.kept_weight,
        rejected=weighed.rejected,
        g0=g0.sum(),
        gap=gap.sum(),
        g0_gap=g0.dot(gap),
        gap_sq=gap.dot(gap),
    )
    vector = torch.cat([torch.stack(sums), _by_position(k3, lengths)])
    if not len(w):
        return vector, w.new_full((NUM_EXTREMES,), -math.inf)
    smallest, largest = w.aminmax()
    extremes = Extremes(largest_w=largest, minus_smallest_w=-smallest, largest_prob_diff=prob_diff.max().double())
    return vector, torch.stack(extremes)


def _by_position(values: Tensor, lengths: Tensor) -> Tensor:
    """float64 ``[2 * NUM_BINS]``: the number of tokens in each bin of positions, and the sums of their ``[tokens]`` values."""
    starts = 2 ** torch.arange(NUM_BINS, device=lengths.device) - 1
    sizes = starts + 1
    sizes[-1] = torch.iinfo(sizes.dtype).max
    # A response is a few segments of tokens, one per bin, so one segmented sum gives all bins in a fixed order of summation.
    counts = (lengths[:, None] - starts).clamp(min=0).minimum(sizes)
    return torch.cat([counts.sum(0).double(), _response_sums(values, counts.view(-1)).view(-1, NUM_BINS).sum(0)])


class _Weighed(NamedTuple):
    """The weights of some tokens, and the `Sums` with the same names."""

    w: Tensor
    """float64 ``[tokens]``."""
    kept: Tensor
    kept_weight: Tensor
    rejected: Tensor


def _weigh(log_ratio: Tensor, excess: Tensor, where: Tensor, loss_mask: Tensor, correction: Correction) -> _Weighed:
    """The weights of the tokens at the flat positions `where`. excess: exp(log_ratio) - 1."""
    if correction.acts_on_tokens:
        w = excess + 1.0
        full = correction.limited(w)
        return _Weighed(w, full.new_tensor(len(full)), full.sum(), torch.count_nonzero(full == 0.0).double())
    grid = log_ratio.new_zeros(loss_mask.shape)
    grid.view(-1)[where] = log_ratio
    w, full = importance_weights(grid, loss_mask, correction.level), correction.weights(grid, loss_mask)
    kept = correction.kept(grid, loss_mask)
    full = full.masked_fill(~kept, 0.0)
    rejected = torch.count_nonzero(full.flatten()[where] == 0.0).double()
    if correction.level == "token":
        count, total = kept.sum().double(), full.sum()
    else:  # each response counts once, because all its tokens have the same weight
        count, total = kept.any(1).sum().double(), response_mean(full, kept).sum()
    return _Weighed(w.flatten()[where], count, total, rejected)


def _response_sums(values: Tensor, lengths: Tensor) -> Tensor:
    """float64 ``[batch]``: sums over each response of ``[tokens]`` values."""
    return torch.segment_reduce(values, "sum", lengths=lengths, unsafe=True)


def from_statistics(sums: Tensor, extremes: Tensor) -> Diagnostics:
    """The figures from global sums and extremes. Without tokens, sampler and trainer agree perfectly.

    Raises:
        ValueError: a sum is not finite, because a log-probability is not finite.
    """
    num_fields = len(Sums._fields)
    t: Sums[float] = Sums._make(sums[:num_fields].tolist())
    if bad := [name for name, value in t._asdict().items() if not math.isfinite(value)]:
        raise ValueError(f"log-probabilities of this batch are not finite (sums of {', '.join(bad)}); the policy or the rollout is corrupt")
    n, responses = t.tokens, t.sequences
    if n == 0:
        return Diagnostics()
    extreme: Extremes[float] = Extremes._make(extremes.tolist())
    gap, spread = t.gap / responses, max(responses - 1.0, 1.0)
    by_position = zip(*sums[num_fields:].view(2, NUM_BINS).tolist(), strict=True)
    return Diagnostics(
        num_tokens=n,
        num_sequences=responses,
        weight_reliability=t.w_trunc**2 / (n * t.w_trunc_sq),
        weight_reliability_raw=t.w**2 / (n * t.w_sq),
        divergence_severity=t.k3 / n,
        variance_amplification=t.weighted_adv_sq / t.adv_sq if t.adv_sq > 0 else 1.0,
        k1_kl=-t.log_ratio / n,
        ppl_ratio=t.ppl_ratio / responses,
        chi2_token=t.chi2 / n,
        is_weight_mean=t.w / n,
        is_weight_min=-extreme.minus_smallest_w,
        is_weight_max=extreme.largest_w,
        fraction_truncated=t.truncated / n,
        prob_diff_mean=t.prob_diff / n,
        prob_diff_max=extreme.largest_prob_diff,
        fraction_rejected=t.rejected / n,
        mean_weight=t.kept_weight / t.kept if t.kept else 1.0,
        signal_gap=gap,
        signal_gap_variance=max(0.0, t.gap_sq - responses * gap**2) / spread,
        signal_gap_covariance=(t.g0_gap - t.g0 * gap) / spread,
        divergence_by_position=tuple(k3 / count for count, k3 in by_position if count),
    )


class RunningStatistics:
    """`statistics` of a batch that comes in microbatches, and its `ResponseGradients` if they are measured. Sums are added and extremes
    compared, without communication."""

    def __init__(self, correction: Correction, gradients: ResponseGradients | None = None) -> None:
        self._correction, self.gradients = correction, gradients
        self._sums = torch.zeros(NUM_SUMS, dtype=torch.float64)
        self._extremes = torch.full((NUM_EXTREMES,), -math.inf, dtype=torch.float64)

    def add(
        self,
        old_logprobs: Tensor,
        rollout_logprobs: Tensor,
        advantages: Tensor,
        loss_mask: Tensor,
        index: Tensor,
        sketches: Tensor,
        repeats: Tensor | None = None,
    ) -> None:
        """Add whole rows, as in `statistics` and `ResponseGradients.add`. On a GPU nothing waits for the result."""
        sums, extremes = statistics(old_logprobs, rollout_logprobs, advantages, loss_mask, self._correction)
        self._sums = self._sums.to(sums.device) + sums
        self._extremes = torch.maximum(self._extremes.to(sums.device), extremes)
        if self.gradients is not None:
            self.gradients.add(index, sketches, old_logprobs, rollout_logprobs, advantages, loss_mask, repeats)

    def joined(self, group: dist.ProcessGroup) -> Tensor:
        """The gradients' sums and `join` of all microbatches so far, on the CPU."""
        joined = join(self._sums.cpu(), self._extremes.cpu(), group)
        return joined if self.gradients is None else torch.cat([self.gradients.sums(), joined])

    def split(self, vector: Tensor) -> tuple[Diagnostics, GradientSums | None]:
        """The figures from a reduced `joined`."""
        if self.gradients is None:
            return split(vector), None
        sums, joined = vector.tensor_split([self.gradients.length])
        return split(joined), GradientSums.of(sums)
