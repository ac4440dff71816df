"""An objective of your own: a smooth gate in place of GRPO's clipping.

    J_t = A * band * tanh((r_t - 1) / band) + A,      r_t = exp(logprobs - old_logprobs)

Near r = 1 its gradient is that of r A, as in GRPO. Far from 1 the gradient fades out, while GRPO's stops at a corner.

    ais-megatron train configs/tiny_countdown.yaml run.dir=runs/soft objective.name=examples.soft_gate_objective:soft_gate
"""

from __future__ import annotations

import torch
from torch import Tensor

from ais_megatron.algorithm.objectives import Surrogate
from ais_megatron.config.algorithm import ObjectivePreset


def soft_gate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, loss_mask: Tensor, clip_low: float, clip_high: float
) -> Surrogate:
    """J of every token.

    Args:
        logprobs: float32 ``[batch, seq]`` with grad; old_logprobs: the same shape, no grad. Both are 0 outside loss_mask.
        advantages: float32 ``[batch, 1]``, one for each response.
        loss_mask: bool ``[batch, seq]``, the response tokens.
        clip_low, clip_high: `objective.clip_low` and `objective.clip_high`, here the widths of the gate on either side.
    """
    ratio = (logprobs - old_logprobs).exp()
    band = torch.where(ratio < 1.0, clip_low, clip_high)
    gated = 1.0 + band * torch.tanh((ratio - 1.0) / band)
    outside = ((ratio - 1.0).abs() > band) & loss_mask
    return Surrogate(objective=gated * advantages, policy_ratio=ratio.detach(), clipped=outside)


# What `objective.clip_low` and the others are where the configuration leaves them empty. It is read without running this file,
# so it must be one call with plain values.
soft_gate.preset = ObjectivePreset(clip_low=0.2, clip_high=0.3, aggregation="token", advantages="group_std")
