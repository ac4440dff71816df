"""Decodes responses in waves.

A wave holds up to `max_batch` responses that are decoded together. Its prompts are left-padded, so that all end in the same column,
and go through the model once. The cache row of a prompt is then repeated for its responses. Every step appends one column to all
rows. Rows that have ended are dropped together, once there are enough of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ais_megatron.batch import Prompt
from ais_megatron.config import Architecture
from ais_megatron.rollout.engine import SamplingParams
from ais_megatron.rollout.local.experts import RoutingRecord
from ais_megatron.rollout.local.kv_cache import KVCache, container_dtype
from ais_megatron.rollout.sampling import choose_tokens, uniform_draws

SampleId = tuple[int, int]  # (position in the list of prompts, sample number)

_DROP_SHARE = 4  # rows are dropped once a quarter has ended, because copying the cache of the others costs about half a step
_DROP_MIN_STEPS = 4  # and at least this many steps may follow
_GPU_CHECK_STEPS = 8  # asking a GPU how many rows have ended waits for it, so it is done only every this many steps


@dataclass(frozen=True)
class Model:
    """What decoding needs to know about the engine."""

    causal_lm: PreTrainedModel
    """transformers' causal language model, with the attention of `kv_cache`."""
    architecture: Architecture
    kv_scales: Tensor | None
    """float32 ``[num_layers, 2]`` of an FP8 cache; None for a cache that is not quantised."""
    dtype: torch.dtype
    device: torch.device
    eos_ids: Tensor
    """int64 ``[number of tokens that end a response]``."""
    pad_id: int
    routing: RoutingRecord | None = None
    """The experts of the latest forward pass; None if they are not recorded."""

    def forward(self, tokens: Tensor, positions: Tensor, mask: Tensor, cache: KVCache, is_real: Tensor | None = None) -> Tensor:
        """Extend `cache` by `tokens`, int64 ``[rows, new]``. Returns the logits after the last token, float32 ``[rows, vocab]``.

        mask: additive, ``[rows, 1, new, cache.length + new]``. Some families expect a mapping from kinds of layers to masks, which
        transformers would otherwise build again in every step. The others take the tensor itself.
        is_real: bool ``[rows, new]``, which tokens are no padding; None: all. Layers with a recurrent state need to know.
        """
        decoder = self.causal_lm.model
        by_kind = {"full_attention": mask, "linear_attention": is_real}
        attention_mask = by_kind if self.architecture.family.takes_mask_by_kind else mask
        out = decoder(input_ids=tokens, attention_mask=attention_mask, position_ids=positions, past_key_values=cache, use_cache=True)
        cache.advance(tokens.shape[1])
        return self.causal_lm.lm_head(out.last_hidden_state[:, -1]).float()


@dataclass(frozen=True)
class Responses:
    """What a wave sampled, on the CPU. Values after the first end-of-sequence token of a row have no meaning."""

    tokens: Tensor
    """int64 ``[rows, max_tokens]``."""
    logprobs: Tensor
    """float32 ``[rows, max_tokens]``."""
    routed_experts: Tensor | None
    """`routes_dtype` ``[rows, longest prompt + max_tokens - 1, num_layers, experts_per_token]``. Prompts are left-padded, so the first
    response token of every row is in column `longest prompt`. None if they are not recorded."""


@dataclass
class _Decoding:
    """State of the rows that are still being decoded. Dropping rows shortens every field."""

    logits: Tensor
    """float32 ``[rows, vocab]``."""
    origin: Tensor
    """int64 ``[rows]``, the number of each row in the wave."""
    positions: Tensor
    """int64 ``[rows, 1]``, the position of the next token."""
    mask: Tensor
    """Additive, ``[rows, 1, 1, max_len]``."""
    draws: Tensor
    """float64 ``[rows, max_tokens]``."""
    ended: Tensor
    """bool ``[rows]``."""

    def keep_rows(self, rows: Tensor) -> None:
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name)[rows])


def plan_waves(prompts: Sequence[Prompt], num_samples: int, max_batch: int) -> list[list[SampleId]]:
    """Split the samples of all prompts into waves of up to `max_batch` rows. The samples of a prompt stay together if they fit, and
    prompts of similar length share a wave."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].token_ids))
    rows = [(i, sample) for i in order for sample in range(num_samples)]
    if num_samples <= max_batch:
        size = max_batch // num_samples * num_samples
        return [rows[start : start + size] for start in range(0, len(rows), size)]
    per_prompt = (rows[start : start + num_samples] for start in range(0, len(rows), num_samples))
    return [group[start : start + max_batch] for group in per_prompt for start in range(0, num_samples, max_batch)]


def decode_wave(model: Model, prompts: Sequence[Prompt], rows: Sequence[SampleId], sampling: SamplingParams) -> Responses:
    """Sample the responses of `rows`."""
    state, cache, routed = _prefill(model, prompts, rows, sampling)
    tokens = model.eos_ids[0].repeat(len(rows), sampling.max_tokens)
    logprobs = torch.zeros(len(rows), sampling.max_tokens, dtype=torch.float32, device=model.device)
    every = 1 if model.device.type == "cpu" else _GPU_CHECK_STEPS
    for step in range(sampling.max_tokens):
        chosen, chosen_logprobs = choose_tokens(state.logits, state.draws[:, step], sampling)
        tokens[state.origin, step] = chosen
        logprobs[state.origin, step] = chosen_logprobs
        state.ended |= torch.isin(chosen, model.eos_ids)
        remaining = sampling.max_tokens - step - 1
        if not remaining:
            break
        if step % every == 0:
            alive = len(chosen) - int(state.ended.sum())
            if not alive:
                break
            if (len(chosen) - alive) * _DROP_SHARE >= len(chosen) and remaining >= _DROP_MIN_STEPS:
                keep = (~state.ended).nonzero()[:, 0]
                state.keep_rows(keep)
                cache.keep_rows(keep)
                chosen = chosen[keep]
        state.logits = model.forward(chosen[:, None], state.positions, state.mask[..., : cache.length + 1], cache)
        state.positions = state.positions + 1
        if routed is not None and model.routing is not None:
            routed[state.origin, cache.length - 1] = model.routing.latest()
    return Responses(tokens.cpu(), logprobs.cpu(), None if routed is None else routed.cpu())


def _prefill(
    model: Model, prompts: Sequence[Prompt], rows: Sequence[SampleId], sampling: SamplingParams
) -> tuple[_Decoding, KVCache, Tensor | None]:
    """Run each distinct prompt of `rows` through the model once, and copy the results to its rows.

    The third result is `Responses.routed_experts`, filled for the prompts. Its columns are those of the cache.
    """
    distinct = list(dict.fromkeys(i for i, _ in rows))
    longest = max(len(prompts[i].token_ids) for i in distinct)
    padded = [(model.pad_id,) * (longest - len(prompts[i].token_ids)) + tuple(prompts[i].token_ids) for i in distinct]
    tokens = torch.tensor(padded, device=model.device)
    padding = torch.tensor([longest - len(prompts[i].token_ids) for i in distinct], device=model.device)

    column = torch.arange(longest + sampling.max_tokens, device=model.device)
    is_padding = column < padding[:, None]  # [prompts, max_len]
    # A padding token attends to itself, because a softmax over nothing would be NaN. No other token attends to it.
    prompt_columns = column[:longest]
    visible = (prompt_columns <= prompt_columns[:, None]) & ~is_padding[:, None, :longest] | torch.eye(
        longest, dtype=torch.bool, device=model.device
    )
    positions = (prompt_columns - padding[:, None]).clamp_(min=0)
    cache = KVCache.empty(model.architecture, len(distinct), longest, model.dtype, model.device, model.kv_scales)
    logits = model.forward(tokens, positions, _additive(visible[:, None], model), cache, ~is_padding[:, :longest])

    number = {prompt: row for row, prompt in enumerate(distinct)}
    source = torch.tensor([number[i] for i, _ in rows], device=model.device)
    state = _Decoding(
        logits=logits[source],
        origin=torch.arange(len(rows), device=model.device),
        positions=(longest - padding)[source, None],
        mask=_additive(~is_padding[source, None, None], model),
        draws=uniform_draws(sampling, [(prompts[i].index, sample) for i, sample in rows]).to(model.device),
        ended=torch.zeros(len(rows), dtype=torch.bool, device=model.device),
    )
    routed = None
    if model.routing is not None:
        of_prompts = model.routing.latest().unflatten(0, tokens.shape)  # [prompts, longest, num_layers, experts_per_token]
        routed = of_prompts.new_zeros(len(rows), len(column) - 1, *of_prompts.shape[2:])
        routed[:, :longest] = of_prompts[source]
    return state, cache.repeat_rows(source, len(column)), routed


def _additive(visible: Tensor, model: Model) -> Tensor:
    """0 where `visible`, minus infinity elsewhere, in the dtype of the attention."""
    mask = torch.zeros(visible.shape, dtype=container_dtype(model.dtype, model.device), device=model.device)
    return mask.masked_fill_(~visible, -torch.inf)
