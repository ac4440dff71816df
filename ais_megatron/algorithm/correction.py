"""Importance weights between the engine's distribution mu and the trainer's pi_old, and the corrections that use them.

    l = clamp(old_logprobs - rollout_logprobs, -20, 20),   w = exp(l),   wbar = min(w, C),   s = 1 + alpha (wbar - 1)

There is one weight per token or per response. The weight of a response is the product of its tokens' weights (`sequence`, exp(sum l))
or their geometric mean (`geometric`, exp(mean l)), and all its tokens have it. The corrections at full strength (alpha = 1) are:

    none             s = 1
    tis, ais         s = min(w, C)                     truncated importance sampling, as in verl and slime
    the same, two-sided   s = max(1/C, min(w, C))      log s within [-log C, log C], as QaRL's (arXiv 2604.07853)
    mis, icepop      s = w inside [low, high], else 0  the mask does not change: such tokens still count in the divisor of the loss
    geo_rs           a response with exp(mean l) outside [low, high] is rejected: it leaves mask and divisor; s = 1
    k3_rs            a response with mean(exp(l) - 1 - l) above the limit is rejected in the same way

These are pure functions of ``[batch, seq]`` tensors, without Megatron or process groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ais_megatron.config import Config
from ais_megatron.config.algorithm import CorrectionName, Level

MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Correction:
    """A correction with its settings."""

    name: CorrectionName = "ais"
    level: Level = "token"
    """What has one weight: a token, or a response."""
    weight_cap: float = 2.0
    """C."""
    two_sided: bool = False
    """Weights below 1 / C are raised to it."""
    low: float = 0.0
    """Lower end of the band of mis, icepop and geo_rs."""
    high: float = math.inf
    """Upper end of that band."""
    k3_limit: float = math.inf
    """Nats per token."""
    batch_normalise: bool = False
    """Weights are divided by their mean over the global batch, after truncation: over tokens, or over responses if a response has one
    weight."""

    @staticmethod
    def of(config: Config) -> Correction:
        """The correction of a configuration, with its presets."""
        options = config.correction_options
        low, high = options.band(config.correction)
        cap = config.ais.weight_cap
        two_sided = config.objective.name == "tbpo" if options.two_sided is None else options.two_sided
        return Correction(config.correction, config.weight_level, cap, two_sided, low, high, options.k3_limit, options.batch_normalise)

    def weights(self, log_ratio: Tensor, loss_mask: Tensor) -> Tensor:
        """The factor of every token at full strength, in the dtype and shape of `log_ratio`. Values outside the mask have no meaning."""
        if not METHODS[self.name].weighs:
            return torch.ones_like(log_ratio)
        return self.limited(importance_weights(log_ratio, loss_mask, self.level))

    def limited(self, w: Tensor) -> Tensor:
        """The weights of a correction that weights tokens, from raw weights: truncated, or 0 outside the band."""
        return METHODS[self.name].limit(self, w)

    @property
    def acts_on_tokens(self) -> bool:
        """Whether a token's weight depends only on that token, and no response is rejected."""
        return self.level == "token" and METHODS[self.name].weighs

    def kept(self, log_ratio: Tensor, loss_mask: Tensor) -> Tensor:
        """bool ``[batch, seq]``: the loss mask without the tokens of rejected responses."""
        accepts = METHODS[self.name].accepts
        return loss_mask if accepts is None else loss_mask & accepts(self, log_ratio, loss_mask)[:, None]


def truncated(correction: Correction, w: Tensor) -> Tensor:
    """min(w, C), and at least 1 / C if both sides are limited."""
    return w.clamp(min=1.0 / correction.weight_cap if correction.two_sided else None, max=correction.weight_cap)


def zero_outside_band(correction: Correction, w: Tensor) -> Tensor:
    return w.masked_fill((w < correction.low) | (w > correction.high), 0.0)


def geometric_mean_in_band(correction: Correction, log_ratio: Tensor, loss_mask: Tensor) -> Tensor:
    """bool ``[batch]``."""
    mean_weight = response_mean(log_ratio, loss_mask).exp()
    return (mean_weight >= correction.low) & (mean_weight <= correction.high)


def k3_below_limit(correction: Correction, log_ratio: Tensor, loss_mask: Tensor) -> Tensor:
    """bool ``[batch]``."""
    k3 = torch.special.expm1(log_ratio.double()) - log_ratio.double()
    return response_mean(k3, loss_mask) <= correction.k3_limit


class Method(NamedTuple):
    """What makes one correction different from the others."""

    weighs: bool = True
    """Tokens have importance weights; otherwise their weight is 1."""
    limit: Callable[[Correction, Tensor], Tensor] = truncated
    """(correction, w ``[batch, seq]``) -> ``[batch, seq]``, the weight that is used in place of a raw weight."""
    accepts: Callable[[Correction, Tensor, Tensor], Tensor] | None = None
    """(correction, log_ratio, loss_mask, both ``[batch, seq]``) -> bool ``[batch]``, the responses that stay in the batch; None: all."""


METHODS: dict[str, Method] = {
    "none": Method(weighs=False),
    "tis": Method(),
    "ais": Method(),
    "mis": Method(limit=zero_outside_band),
    "icepop": Method(limit=zero_outside_band),
    "geo_rs": Method(weighs=False, accepts=geometric_mean_in_band),
    "k3_rs": Method(weighs=False, accepts=k3_below_limit),
}


def log_importance_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """l in the dtype of the inputs, clamped so that a corrupt token gives neither inf nor NaN."""
    return (old_logprobs - rollout_logprobs).clamp_(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def response_mean(values: Tensor, loss_mask: Tensor) -> Tensor:
    """The mean over each response's tokens in the mask, ``[batch]``; 0 for a row without such tokens."""
    return values.masked_fill(~loss_mask, 0.0).sum(1) / loss_mask.sum(1).clamp(min=1)


def importance_weights(log_ratio: Tensor, loss_mask: Tensor, level: Level = "token") -> Tensor:
    """w, ``[batch, seq]``. If a response has one weight, all its tokens have it."""
    if level == "token":
        return log_ratio.exp()
    exponent = response_mean(log_ratio, loss_mask)
    if level == "sequence":
        exponent = log_ratio.masked_fill(~loss_mask, 0.0).sum(1).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return exponent.exp()[:, None].expand_as(log_ratio)


def mixed_weights(full_weights: Tensor, alpha: float) -> Tensor:
    """s = 1 + alpha (wbar - 1): no correction at alpha 0, the full correction at alpha 1.

    In this form a weight of exactly 1 gives exactly 1 for any alpha (Proposition 3: without mismatch nothing changes).
    """
    return torch.lerp(full_weights.new_ones(()), full_weights, alpha)
