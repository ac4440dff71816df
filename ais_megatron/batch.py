"""The data that the phases pass on: `Prompt` -> `Rollout` -> `Batch`, all frozen, and weights in a `Bucket`.

`assemble` is the only place that aligns tokens and log-probabilities. After it, index t of every ``[batch, seq]`` tensor describes
token t. ``logprobs[b, t]`` is log p(token t | tokens before t). So column 0 has no value, and no later code shifts anything by one.
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

DROPPED = "dropped"  # the finish_reason of a response without finite log-probabilities
STALE = "stale"  # that of a response with tokens older than `rollout.max_staleness`


@dataclass(frozen=True)
class Prompt:
    """One prompt."""

    index: int
    """Its position in the prompt stream. Sampling depends on it, so a prompt gets the same responses on any rank."""
    text: str
    """The prompt as a person reads it."""
    token_ids: tuple[int, ...]
    """What the model reads: `text` or the turns behind it, and what the chat template adds."""
    truth: Mapping[str, Any]
    """What the task's reward needs to judge a response, such as numbers and target, or the gold answer."""


@dataclass(frozen=True)
class View:
    """What a diffusion model reads to score some tokens of a response, and how the engine scored them."""

    hidden: Tensor
    """bool ``[prompt + canvas]``, the tokens in whose place it reads the mask token."""
    scored: Tensor
    """bool ``[canvas]``."""
    logprobs: Tensor
    """float32 ``[canvas]``, log mu of the scored tokens, 0 elsewhere."""


@dataclass(frozen=True)
class Canvas:
    """All that a diffusion model wrote after a prompt. The tokens behind the first end of a sequence are context, and not response."""

    token_ids: tuple[int, ...]
    """All tokens, also those behind the end."""
    reveal_steps: tuple[int, ...]
    """The step of the sampler in which each token was revealed, from 0. Empty for a solution of the task."""
    views: tuple[View, ...]
    """The masks of `diffusion.likelihood`; empty if no likelihood was asked for."""
    mask_id: int
    """The mask token."""
    repeats: int = 1
    """How often each view counts, see `algorithm.masking`."""


@dataclass(frozen=True)
class Rollout:
    """One sampled response."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    """The response's tokens, including the end-of-sequence token if the model produced it."""
    rollout_logprobs: tuple[float, ...]
    """log mu of each of these tokens, at the sampling temperature."""
    finish_reason: str
    """"stop" (end of sequence), "length" (cut at the limit), `DROPPED`, or `STALE`. A dropped response has no finite log-probabilities, or
    is too old. Its tokens are placeholders, and it is in neither the loss nor the baseline."""
    weight_version: int
    """The version of the weights that the engine sampled with; the oldest one if they changed during the response."""
    routed_experts: Tensor | None = None
    """`routes_dtype` ``[prompt + response - 1, num_layers, experts_per_token]``, the experts that the engine chose for every token that
    it read (all but the last sampled one). None for a dense model, or if the engine does not report them."""
    version_spans: tuple[tuple[int, int], ...] = ()
    """(weight version, number of tokens sampled with it), in order; empty if all tokens have `weight_version`."""
    canvas: Canvas | None = None
    """What a diffusion model wrote. `rollout_logprobs` are then those with which its sampler chose the tokens. Importance weights need
    `View.logprobs` instead."""

    @property
    def is_dropped(self) -> bool:
        return self.finish_reason in (DROPPED, STALE)

    def as_stale(self) -> Rollout:
        """A placeholder for this response, which is too old to train on."""
        prompt = self.prompt.token_ids
        routed = None if self.routed_experts is None else self.routed_experts[: len(prompt)]
        return Rollout(self.prompt, prompt[-1:], (0.0,), STALE, self.weight_version, routed)

    @property
    def versions_by_token(self) -> list[tuple[int, int]]:
        """(weight version, number of tokens), also if the engine reported no spans."""
        return list(self.version_spans) or [(self.weight_version, len(self.token_ids))]


@dataclass(frozen=True)
class Batch:
    """The responses that one data-parallel rank trains on."""

    tokens: Tensor
    """int64 ``[batch, seq]``: prompt, response, then padding (zeros)."""
    loss_mask: Tensor
    """bool ``[batch, seq]``, True on response tokens."""
    lengths: Tensor
    """int64 ``[batch]``, number of tokens before the padding."""
    rollout_logprobs: Tensor
    """float32 ``[batch, seq]``, 0 outside `loss_mask`."""
    advantages: Tensor
    """float32 ``[batch]``, one for all tokens of a response."""
    rewards: Tensor
    """float32 ``[batch]``."""
    routed_experts: Tensor | None = None
    """`routes_dtype` ``[batch, seq, num_layers, experts_per_token]``, the experts that the engine chose for each token. -1 where it chose
    none: in padding, and for the last token of a response. None if routing is not replayed."""
    inputs: Tensor | None = None
    """int64 ``[batch, seq]``, what a diffusion model reads: `tokens`, of which some are masked. None: `tokens`."""
    repeats: Tensor | None = None
    """int64 ``[batch]``, how often the loss counts each token of a row, for a diffusion model. None: once."""

    @property
    def read(self) -> Tensor:
        """int64 ``[batch, seq]``, what the model reads."""
        return self.tokens if self.inputs is None else self.inputs

    @property
    def padding(self) -> Tensor:
        """bool ``[batch, 1, 1, seq]``, True in padding, to which no token of a bidirectional model attends. A row of padding counts as one
        token, because attention to nothing would be NaN."""
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return (columns >= self.lengths.clamp(min=1)[:, None])[:, None, None]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def rows(self, index: Tensor, seq: int | None = None) -> Batch:
        """The given rows, with only the first `seq` columns (all columns if None)."""
        return self._map(lambda t: t[index][:, :seq] if t.dim() > 1 else t[index])

    def without(self, dropped: Tensor) -> Batch:
        """The same rows, but those in `dropped` (bool ``[batch]``) have no token in the loss."""
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
        """The batch with `count` rows of padding below it, which have no loss token, no real token and no routing."""
        if not count:
            return self
        return self._map(lambda t: torch.cat([t, t.new_full((count, *t.shape[1:]), _filler(t))]))

    def joined(self, other: Batch) -> Batch:
        """The rows of both. If only one has routes, the rows of the other have no choice."""
        width = max(self.tokens.shape[1], other.tokens.shape[1])
        first, second = self.pad_columns(width)._with_routes_like(other), other.pad_columns(width)._with_routes_like(self)
        names = [f.name for f in fields(self) if getattr(first, f.name) is not None]
        return replace(first, **{name: torch.cat([getattr(first, name), getattr(second, name)]) for name in names})

    def to(self, device: torch.device) -> Batch:
        return self._map(lambda t: t.to(device))

    def _with_routes_like(self, other: Batch) -> Batch:
        if self.routed_experts is not None or other.routed_experts is None:
            return self
        return replace(self, routed_experts=other.routed_experts.new_full((*self.tokens.shape, *other.routed_experts.shape[2:]), -1))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return replace(self, **{f.name: function(t) for f in fields(self) if (t := getattr(self, f.name)) is not None})


def _filler(tensor: Tensor) -> int:
    """The padding value of a field of `Batch`: -1 ("no choice") for `routed_experts`, the only field with four dimensions, otherwise 0."""
    return -1 if tensor.dim() == 4 else 0


def routes_dtype(num_experts: int) -> torch.dtype:
    """The smallest integer dtype for the experts 0 to num_experts - 1 and -1 for "no choice": int8 for up to 128 experts.

    With 48 layers and 8 experts per token, int32 would take 1.5 KB per token, and gigabytes per step.
    """
    return next(dtype for dtype in (torch.int8, torch.int16, torch.int32) if num_experts - 1 <= torch.iinfo(dtype).max)


def assemble(rollouts: Sequence[Rollout], rewards: Tensor, advantages: Tensor) -> Batch:
    """Combine rollouts into one `Batch`.

    Args:
        rollouts: N responses. N may be 0, on a rank without prompts.
        rewards, advantages: float32 ``[N]``.
    A diffusion model's response has one row for each of its views, one after the other.

    Raises:
        ValueError: a response is empty, or does not have one log-probability per token, or has one that is not finite. Such a
            response would make every statistic of the batch wrong.
    """
    for rollout in rollouts:
        _check(rollout)
    if any(rollout.canvas is not None for rollout in rollouts):
        return _assemble_views(rollouts, rewards, advantages)
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


def _assemble_views(rollouts: Sequence[Rollout], rewards: Tensor, advantages: Tensor) -> Batch:
    """`assemble` for a diffusion model, all of whose responses have the same number of views."""
    rows = [(rollout, rollout.canvas, view) for rollout in rollouts if rollout.canvas is not None for view in rollout.canvas.views]
    views = len(rows) // len(rollouts)
    lengths = torch.tensor([len(view.hidden) for _, _, view in rows], dtype=torch.int64)
    batch, seq = len(rows), int(lengths.max()) if rows else 0
    tokens, inputs = torch.zeros(2, batch, seq, dtype=torch.int64)
    loss_mask, rollout_logprobs = torch.zeros(batch, seq, dtype=torch.bool), torch.zeros(batch, seq, dtype=torch.float32)
    for row, (rollout, canvas, view) in enumerate(rows):
        start, end = len(rollout.prompt.token_ids), len(view.hidden)
        tokens[row, :end] = torch.tensor(rollout.prompt.token_ids + canvas.token_ids)
        inputs[row, :end] = tokens[row, :end].masked_fill(view.hidden, canvas.mask_id)
        loss_mask[row, start:end] = view.scored
        rollout_logprobs[row, start:end] = view.logprobs
    return Batch(
        tokens=tokens,
        loss_mask=loss_mask,
        lengths=lengths,
        rollout_logprobs=rollout_logprobs,
        advantages=advantages.float().repeat_interleave(views),
        rewards=rewards.float().repeat_interleave(views),
        inputs=inputs,
        repeats=torch.tensor([canvas.repeats for _, canvas, _ in rows], dtype=torch.int64),
    )


def _align_experts(rollouts: Sequence[Rollout], seq: int) -> Tensor | None:
    """`Batch.routed_experts`, if every rollout has its routing."""
    routes = [r.routed_experts for r in rollouts if r.routed_experts is not None]
    if not routes or len(routes) < len(rollouts):
        return None
    dtype = reduce(torch.promote_types, {r.dtype for r in routes})  # old recordings may have a wider dtype than new ones
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
            f"{where}: {len(rollout.rollout_logprobs)} logprobs for {len(rollout.token_ids)} tokens; there must be one log-probability "
            "per token"
        )
    scored = [value for view in (rollout.canvas.views if rollout.canvas else ()) for value in view.logprobs.tolist()]
    bad = [t for t, value in enumerate((*rollout.rollout_logprobs, *scored)) if not -float("inf") < value <= 1e-3]
    if bad:
        raise ValueError(
            f"{where}: logprob {(*rollout.rollout_logprobs, *scored)[bad[0]]} at response token {bad[0]}; the engine must return finite "
            "values <= 0 (NaN usually means that weights or KV scales are corrupt after a sync)"
        )
