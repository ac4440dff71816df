"""The objectives: J_t of every token, before importance weights. `loss` sums them.

With r_t = exp(logprobs - old_logprobs), R_i = exp(mean over response i of (logprobs - old_logprobs)), e_l = clip_low,
e_h = clip_high, clip(x) = clip(x, 1 - e_l, 1 + e_h), and sg the stop-gradient:

    grpo, dr_grpo, dapo    min(r_t A, clip(r_t) A)                        arXiv 2402.03300, 2503.20783, 2503.14476
    gspo                   min(R_i A, clip(R_i) A)                        2507.18071
    cispo                  sg(clip(r_t)) A log pi_t                       2506.13585
    tbpo                   min(R_i A, clip(R_i) A) if A > 0, else clip(R_i) A    2604.07853

dr_grpo and dapo differ from grpo only in advantages, clipping and aggregation, which are settings. The sequence-level objectives (gspo,
tbpo) give all tokens of a response the same J. The sequence mean of `LossScaler` is then the paper's sum, the gradient flows through R_i
to all tokens, and token-level weights act by their mean over the response. In TBPO a response with a negative advantage changes the
policy only while R_i is inside the trust band, so that a garbled response cannot push it without limit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ais_megatron.algorithm.correction import MAX_LOG_RATIO, response_mean
from ais_megatron.config import doors
from ais_megatron.config.algorithm import ObjectiveConfig


class Surrogate(NamedTuple):
    """The result of an objective. Each field is ``[batch, seq]``."""

    objective: Tensor
    """J, with grad."""
    policy_ratio: Tensor
    """The ratio that the objective uses, detached."""
    clipped: Tensor
    """bool: where clipping changed J."""


Objective = Callable[[Tensor, Tensor, Tensor, Tensor, float, float], Surrogate]
"""The signature of an objective, ours and the user's own (``objective.name=module:function``).

Args, in this order:
    logprobs: float32 ``[batch, seq]`` with grad, of the policy that is trained, at the sampling temperature.
    old_logprobs: float32 ``[batch, seq]``, no grad, of the policy before this batch's first update.
    advantages: float32 ``[batch, 1]``, one for each response.
    loss_mask: bool ``[batch, seq]``, the response tokens; a row may have none. For the user's own function both logprobs are 0
        outside it, and what the function returns there is ignored if it is finite.
    clip_low, clip_high: `objective.clip_low` and `objective.clip_high`, or the preset's.

Returns:
    A `Surrogate`. The loss is minus the weighted sum of its objective; importance weights, masks and the normalisation are
    applied outside.
"""


def surrogate(
    name: str, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, clip_low: float, clip_high: float
) -> Surrogate:
    """J of every token.

    Args:
        name: of `OBJECTIVES`, or the user's ``module:function``.
        logprobs: float32 ``[batch, seq]`` with grad; old_logprobs: the same shape, no grad.
        advantages: float32 ``[batch]``; loss_mask: bool ``[batch, seq]``, whole responses.
    """
    if doors.is_own(name):  # so that its author need not handle padding
        logprobs, old_logprobs = (x.masked_fill(~loss_mask, 0.0) for x in (logprobs, old_logprobs))
    return _function(name)(logprobs, old_logprobs, advantages[:, None], loss_mask, clip_low, clip_high)


def grpo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, clip_low: float, clip_high: float) -> Surrogate:
    ratio = _log_ratio(logprobs, old_logprobs, loss_mask).exp()
    return _pessimistic(ratio, advantages, loss_mask, clip_low, clip_high)


def gspo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, clip_low: float, clip_high: float) -> Surrogate:
    ratio = _response_ratio(logprobs, old_logprobs, loss_mask)
    return _pessimistic(ratio, advantages, loss_mask, clip_low, clip_high)


def tbpo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, clip_low: float, clip_high: float) -> Surrogate:
    ratio = _response_ratio(logprobs, old_logprobs, loss_mask)
    unclipped, clipped = ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    objective = torch.where(advantages < 0, clipped, torch.minimum(unclipped, clipped))
    return Surrogate(objective, ratio.detach(), ((objective != unclipped) & loss_mask).detach())


def cispo(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, clip_low: float, clip_high: float) -> Surrogate:
    ratio = _log_ratio(logprobs, old_logprobs, loss_mask).exp()
    inside = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    objective = inside.detach() * advantages * logprobs.masked_fill(~loss_mask, 0.0)
    return Surrogate(objective, ratio.detach(), (inside != ratio) & loss_mask)


OBJECTIVES: dict[str, Objective] = {"grpo": grpo, "dr_grpo": grpo, "dapo": grpo, "gspo": gspo, "cispo": cispo, "tbpo": tbpo}


def _log_ratio(logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
    """The log ratio, 0 outside the mask. It is set before the exponential, so that padding gives neither inf nor a gradient."""
    return (logprobs - old_logprobs).masked_fill(~loss_mask, 0.0)


def _response_ratio(logprobs: Tensor, old_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
    """R_i at every token of response i, ``[batch, seq]``."""
    log_ratio = _log_ratio(logprobs, old_logprobs, loss_mask)
    return response_mean(log_ratio, loss_mask)[:, None].expand_as(log_ratio).exp()


def _pessimistic(ratio: Tensor, advantages: Tensor, loss_mask: Tensor, clip_low: float, clip_high: float) -> Surrogate:
    """min(ratio A, clip(ratio) A)."""
    unclipped, clipped = ratio * advantages, ratio.clamp(1.0 - clip_low, 1.0 + clip_high) * advantages
    objective = torch.minimum(unclipped, clipped)
    return Surrogate(objective, ratio.detach(), ((objective != unclipped) & loss_mask).detach())


@lru_cache
def _function(name: str) -> Objective:
    return doors.load("objective.name", name) if doors.is_own(name) else OBJECTIVES[name]


def check_objective(config: ObjectiveConfig) -> None:
    """Try an objective of the user's own on two short responses before training. Built-in objectives need no trial.

    Raises:
        RuntimeError: the function, or the import of its module, raised; this exception is the cause.
        ValueError: the result is not a `Surrogate` of ``[batch, seq]`` tensors, is not finite, or does not depend on logprobs; or
            the preset cannot be read in the module's source.
    """
    if not doors.is_own(config.name):
        return
    where, function = f"objective.name={config.name}", _function(config.name)
    if getattr(function, "preset", config.preset) != config.preset:
        raise ValueError(f"{where}: its preset is read from the module's source; assign function.preset = ObjectivePreset(...) there")
    loss_mask = torch.tensor([[False, True, True, True], [False, True, True, False]])
    old_logprobs = torch.full((2, 4), -1.0)
    logprobs = (old_logprobs + torch.tensor([[0.0, 0.1, -0.2, 0.0], [0.0, 0.3, -0.1, 0.0]])).requires_grad_()
    clip = config.resolved
    try:
        found = surrogate(config.name, logprobs, old_logprobs, torch.tensor([1.0, -0.5]), loss_mask, clip.clip_low, clip.clip_high)
    except Exception as error:
        raise RuntimeError(f"{where}: raised {type(error).__name__}: {error} on a trial batch of shape [2, 4]") from error
    if not isinstance(found, Surrogate):
        raise ValueError(f"{where}: returned {type(found).__name__}; return an ais_megatron.algorithm.objectives.Surrogate")
    for field, value in zip(Surrogate._fields, found, strict=True):
        if not isinstance(value, Tensor) or value.shape != loss_mask.shape:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{where}: its {field} must be a tensor of shape [batch, seq], here [2, 4], got {got}")
        if not value.isfinite().all():
            raise ValueError(f"{where}: its {field} is not finite on a trial batch with ratios between 0.8 and 1.4: {value.tolist()}")
    if not found.objective.requires_grad:
        raise ValueError(f"{where}: its objective does not depend on logprobs, so there would be no gradient; compute it from logprobs")


def kl_penalty(estimator: str, logprobs: Tensor, reference_logprobs: Tensor, loss_mask: Tensor) -> Tensor:
    """Per-token estimate of KL(pi_theta || pi_ref), ``[batch, seq]`` with grad, 0 outside the mask.

    With d = logprobs - reference_logprobs, k3 is exp(-d) - 1 + d with its own gradient (GRPO). k1 is d. The gradient of d has expectation 0
    and would penalise nothing, so k1 has the gradient of d^2 / 2, which is unbiased on policy.
    """
    d = (logprobs - reference_logprobs).masked_fill(~loss_mask, 0.0).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k3":
        return torch.expm1(-d) + d
    half_square = 0.5 * d.square()
    return d.detach() + (half_square - half_square.detach())
