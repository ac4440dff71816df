"""What is maximised per token, before any weight: J_t of the batch, of which `loss` makes a sum.

With r_t = exp(logprobs - old_logprobs), R_i = exp(mean over response i of (logprobs - old_logprobs)), e_l = clip_low,
e_h = clip_high, clip(x) = clip(x, 1 - e_l, 1 + e_h), and sg the stop-gradient:

    grpo, dr_grpo, dapo    min(r_t A, clip(r_t) A)                        arXiv 2402.03300, 2503.20783, 2503.14476
    gspo                   min(R_i A, clip(R_i) A)                        2507.18071
    cispo                  sg(clip(r_t)) A log pi_t                       2506.13585
    tbpo                   min(R_i A, clip(R_i) A) if A > 0, else clip(R_i) A    2604.07853

GRPO's relatives differ in advantages, clipping and aggregation, which are settings, not formulas. The sequence-level
objectives give every token of a response the same J, so that the sequence mean of `AISLossScaler` is the paper's sum, its
gradient flows through R_i to all tokens, and token-level weights act by their mean over the response. TBPO's trust band:
a negative response moves the policy only while R_i is inside, so that a garbled one cannot push without limit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ais_megatron.algorithm.correction import MAX_LOG_RATIO, response_mean
from ais_megatron.algorithm_config import SEQUENCE_OBJECTIVES


class Surrogate(NamedTuple):
    """``[batch, seq]`` each: the objective with grad; the ratio in use, detached; where clipping changed it, bool."""

    objective: Tensor
    policy_ratio: Tensor
    clipped: Tensor


def surrogate(
    name: str, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, clip_low: float, clip_high: float
) -> Surrogate:
    """J of every token.

    Args:
        name: of the module's table.
        logprobs: float32 ``[batch, seq]`` with grad; old_logprobs: the same shape, no grad.
        advantages: float32 ``[batch]``; loss_mask: bool ``[batch, seq]``, whole responses.
    """
    advantages = advantages[:, None]
    # Outside the mask both are set to 0 before the exponential, so that padding can produce neither inf nor a gradient.
    log_ratio = (logprobs - old_logprobs).masked_fill(~loss_mask, 0.0)
    if name in SEQUENCE_OBJECTIVES:
        log_ratio = response_mean(log_ratio, loss_mask)[:, None].expand_as(log_ratio)
    ratio = log_ratio.exp()
    inside = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    if name == "cispo":
        objective = inside.detach() * advantages * logprobs.masked_fill(~loss_mask, 0.0)
        return Surrogate(objective, ratio.detach(), (inside != ratio) & loss_mask)
    unclipped, clipped = ratio * advantages, inside * advantages
    objective = torch.minimum(unclipped, clipped)
    if name == "tbpo":
        objective = torch.where(advantages < 0, clipped, objective)
    return Surrogate(objective, ratio.detach(), ((objective != unclipped) & loss_mask).detach())


def kl_penalty(estimator: str, logprobs: Tensor, reference_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
    """Per-token estimate of KL(pi_theta || pi_ref), ``[batch, seq]`` with grad, 0 outside the mask.

    d = logprobs - reference_logprobs. k3: exp(-d) - 1 + d, differentiated as it stands (GRPO). k1: d, whose own gradient has
    expectation 0 and would penalise nothing; it carries that of d^2 / 2 instead, which is unbiased on policy.
    """
    d = (logprobs - reference_logprobs).masked_fill(~loss_mask, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k3":
        return torch.expm1(-d) + d
    half_square = 0.5 * d.square()
    return d.detach() + (half_square - half_square.detach())
