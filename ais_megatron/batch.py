"""What travels between the phases: `Prompt` -> `Rollout` -> `Batch`, all frozen; and weights, in a `Bucket`.

`assemble` is the ONE place that aligns tokens and log-probabilities. The convention everywhere after it: in every
``[batch, seq]`` tensor, index t describes token t. ``logprobs[b, t]`` is log p(token t | tokens before t), so column 0
never carries a value, and no later code shifts anything by one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Bucket = list[tuple[str, Tensor]]
"""Whole weights under Hugging Face names, on their way from the policy to a rollout engine or into a file."""

DROPPED = "dropped"  # finish_reason of a response without usable log-probabilities


@dataclass(frozen=True)
class Prompt:
    """One question.

    index: its position in the prompt stream; sampling noise is a function of it, so that a prompt gets the same
    responses on whatever rank it lands.
    token_ids: the tokenised `text`.
    truth: what the task's reward needs to judge a response (numbers and target, gold answer, …).
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    truth: Mapping[str, Any]


@dataclass(frozen=True)
class Rollout:
    """One sampled response.

    token_ids: the response's tokens, the end-of-sequence token included where the model produced it.
    rollout_logprobs: log mu of each of those tokens, float, at the sampling temperature.
    finish_reason: "stop" (end of sequence), "length" (cut at the limit), or `DROPPED`: the engine gave no usable
        log-probabilities; tokens are stand-ins then, and neither loss nor baseline sees the response.
    weight_version: the version of the weights that the engine sampled with; the oldest, if they changed on the way.
    routed_experts: `routes_dtype` ``[prompt + response - 1, num_layers, experts_per_token]``, the experts that the engine chose
        for every token it was given (all but the last one sampled); None from a dense model or an engine that does not tell.
    version_spans: (weight version, tokens sampled with it) in their order; empty where all are `weight_version`'s.
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    finish_reason: str
    weight_version: int
    routed_experts: Tensor | None = None
    version_spans: tuple[tuple[int, int], ...] = ()

    @property
    def is_dropped(self) -> bool:
        return self.finish_reason == DROPPED

    @property
    def versions_by_token(self) -> list[tuple[int, int]]:
        """(weight version, tokens) whatever the engine told."""
        return list(self.version_spans) or [(self.weight_version, len(self.token_ids))]


@dataclass(frozen=True)
class Batch:
    """The responses that one data-parallel rank trains on.

    tokens: int64 ``[batch, seq]``, prompt then response then padding (zeros), left-aligned.
    loss_mask: bool ``[batch, seq]``, True on response tokens.
    lengths: int64 ``[batch]``, tokens before the padding.
    rollout_logprobs: float32 ``[batch, seq]``, 0 outside loss_mask.
    advantages: float32 ``[batch]``, one for all tokens of a response.
    rewards: float32 ``[batch]``.
    routed_experts: `routes_dtype` ``[batch, seq, num_layers, experts_per_token]``, the experts the engine chose for each token,
        -1 where it chose none (padding, and the last token of a response); None where routing is not replayed.
    """

    tokens: Tensor
    loss_mask: Tensor
    lengths: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    rewards: Tensor
    routed_experts: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def rows(self, index: Tensor, seq: int | None = None) -> Batch:
        """The given rows, cut to the first `seq` columns (all of them if None)."""
        return self._map(lambda t: t[index][:, :seq] if t.dim() > 1 else t[index])

    def without(self, dropped: Tensor) -> Batch:
        """The same rows, of which those in `dropped` (bool ``[batch]``) have no token in the loss."""
        mask = self.loss_mask & ~dropped[:, None]
        return replace(self, loss_mask=mask, rollout_logprobs=self.rollout_logprobs.masked_fill(~mask, 0.0))

    def pad_columns(self, width: int) -> Batch:
        """The batch with its columns padded to `width`."""
        short = width - self.tokens.shape[1]
        if not short:
            return self

        def pad(tensor: Tensor) -> Tensor:
            return tensor if tensor.dim() == 1 else F.pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, short), value=_filler(tensor))

        return self._map(pad)

    def pad_rows(self, count: int) -> Batch:
        """The batch with `count` rows behind its own that count for nothing: no loss token, no real token, no routing."""
        if not count:
            return self
        return self._map(lambda t: torch.cat([t, t.new_full((count, *t.shape[1:]), _filler(t))]))

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda t: t.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return replace(self, **{f.name: function(t) for f in fields(self) if (t := getattr(self, f.name)) is not None})


def _filler(tensor: Tensor) -> int:
    """What padding holds in a field of `Batch`: 0, and "no choice" in `routed_experts`, the only one with four dimensions."""
    return -1 if tensor.dim() == 4 else 0


def routes_dtype(num_experts: int) -> torch.dtype:
    """The smallest integer that holds the experts 0 to num_experts - 1, and -1 for "no choice": int8 for up to 128 experts.

    At 48 layers of 8 experts per token, int32 would be 1.5 KB a token, and gigabytes a step.
    """
    return next(dtype for dtype in (torch.int8, torch.int16, torch.int32) if num_experts - 1 <= torch.iinfo(dtype).max)


def assemble(rollouts: Sequence[Rollout], rewards: Tensor, advantages: Tensor) -> Batch:
    """Lay rollouts out as one `Batch`.

    Args:
        rollouts: N responses; N may be 0, on a rank that had no prompt to answer.
        rewards, advantages: float32 ``[N]``.
    Raises:
        ValueError: an empty response, a number of log-probabilities that differs from the number of tokens, or a
            log-probability that is not finite: such a response would poison every statistic of the batch.
    """
    for rollout in rollouts:
        _check(rollout)
    lengths = torch.tensor([len(r.prompt.token_ids) + len(r.token_ids) for r in rollouts], dtype=torch.int64)
    batch, seq = len(rollouts), int(lengths.max()) if rollouts else 0
    tokens = torch.zeros(batch, seq, dtype=torch.int64)
    loss_mask = torch.zeros(batch, seq, dtype=torch.bool)
    rollout_logprobs = torch.zeros(batch, seq, dtype=torch.float32)
    for row, rollout in enumerate(rollouts):
        start, end = len(rollout.prompt.token_ids), int(lengths[row])
        tokens[row, :end] = torch.tensor(rollout.prompt.token_ids + rollout.token_ids)
        loss_mask[row, start:end] = not rollout.is_dropped
        rollout_logprobs[row, start:end] = torch.tensor(rollout.rollout_logprobs)
    routed_experts = _align_experts(rollouts, seq)
    return Batch(tokens, loss_mask, lengths, rollout_logprobs, advantages.float(), rewards.float(), routed_experts)


def _align_experts(rollouts: Sequence[Rollout], seq: int) -> Tensor | None:
    """`Batch.routed_experts`, if every rollout brings its routing."""
    routes = [r.routed_experts for r in rollouts if r.routed_experts is not None]
    if not routes or len(routes) < len(rollouts):
        return None
    dtype = reduce(torch.promote_types, {r.dtype for r in routes})  # old recordings may be wider than new ones
    aligned = torch.full((len(routes), seq, *routes[0].shape[1:]), -1, dtype=dtype)
    for row, chosen in enumerate(routes):
        aligned[row, : len(chosen)] = chosen
    return aligned


def _check(rollout: Rollout) -> None:
    where = f"rollout of prompt {rollout.prompt.index} (weight version {rollout.weight_version})"
    if not rollout.token_ids:
        raise ValueError(f"{where}: the response is empty; an engine must return at least one token")
    if len(rollout.rollout_logprobs) != len(rollout.token_ids):
        raise ValueError(
            f"{where}: {len(rollout.rollout_logprobs)} logprobs for {len(rollout.token_ids)} tokens; there must be one for each"
        )
    bad = [t for t, value in enumerate(rollout.rollout_logprobs) if not -float("inf") < value <= 1e-3]
    if bad:
        raise ValueError(
            f"{where}: logprob {rollout.rollout_logprobs[bad[0]]} at response token {bad[0]}; the engine must return finite values <= 0 "
            "(NaN here usually means corrupt weights or KV scales after a sync)"
        )
