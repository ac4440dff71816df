"""Samples from a masked diffusion model, and scores its responses.

The canvas is a prompt followed by mask tokens. It is filled block by block from the left. Each step reads the whole canvas once and, in the
current block, chooses a token for every mask and reveals the most confident ones:

    token        argmax of exp(z) / (-ln u)^T, with u uniform in float64: a draw from softmax(z / T)
    confidence   softmax(z) of that token, without a temperature; or a random number

Source: LLaDA (arXiv 2502.09992, algorithm 5 and its reference code). The mask token itself is never chosen. There is no classifier-free
guidance. Every random number belongs to a response (`response_seed`), so a prompt gets the same responses on any rank and in any batch.

Scoring reads canvases under the masks of `algorithm.masking`, which the trainer then reads too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ais_megatron.algorithm.masking import mask_generator, one_step, trajectory
from ais_megatron.batch import Canvas, Prompt, Rollout, View
from ais_megatron.rollout.engine import Denoising, SamplingParams
from ais_megatron.rollout.local.decoding import Model, SampleId
from ais_megatron.rollout.local.kv_cache import container_dtype
from ais_megatron.rollout.sampling import response_seed

BIDIRECTIONAL = "ais_megatron_bidirectional"
_LOGITS = 1 << 26  # numbers of logits that are held in float32 at a time


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *, scaling: float, **kwargs: object
) -> tuple[Tensor, None]:
    """Attention in both directions, under transformers' interface.

    Args:
        query: ``[rows, heads, tokens, head_dim]``. key, value: the same with kv_heads.
        attention_mask: bool ``[rows, 1, 1, tokens]``, False in padding.
    Returns:
        ``[rows, tokens, heads, head_dim]`` in query's dtype.
    """
    dtype = container_dtype(query.dtype, query.device)
    q, k, v = (x.to(dtype) for x in (query, key, value))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).to(query.dtype), None


ALL_ATTENTION_FUNCTIONS.register(BIDIRECTIONAL, attention)


@dataclass(frozen=True)
class _Frame:
    """Prompts that are padded on the left, so that all canvases begin in the same column."""

    prompts: Tensor
    """int64 ``[rows, start]``."""
    positions: Tensor
    """int64 ``[rows, start + response]``."""
    visible: Tensor
    """bool ``[rows, 1, 1, start + response]``."""

    @property
    def start(self) -> int:
        return self.prompts.shape[1]

    def states(self, model: Model, tokens: Tensor) -> Tensor:
        """The model's last hidden states over whole rows ``[rows, start + response]``, before the head."""
        out = model.causal_lm.model(input_ids=tokens, attention_mask=self.visible, position_ids=self.positions, use_cache=False)
        states: Tensor = out.last_hidden_state
        return states


def diffuse_wave(
    model: Model, prompts: Sequence[Prompt], rows: Sequence[SampleId], sampling: SamplingParams, mask_id: int, version: int
) -> Iterator[Rollout]:
    """Sample and score the responses of `rows`, in their order.

    Raises:
        RuntimeError: the model's logits are not finite.
    """
    denoising = sampling.denoising
    assert denoising is not None, "a diffusion model needs SamplingParams.denoising"
    own = [prompts[i] for i, _ in rows]
    frame = _frame(model, own, sampling.max_tokens)
    tokens, steps, logprobs = _sample(model, frame, own, rows, sampling, denoising, mask_id)
    is_end = torch.isin(tokens, model.eos_ids.cpu())
    stopped = is_end.any(-1)
    lengths = torch.where(stopped, is_end.int().argmax(-1) + 1, tokens.shape[1])
    if not logprobs.isfinite().all():
        bad = own[int((~logprobs.isfinite()).any(-1).nonzero()[0])].index
        raise RuntimeError(
            f"prompt {bad}: the logits are not finite (weight version {version}); the weights are corrupt, so push them again"
        )
    views, repeats = _views(model, frame, own, rows, tokens, steps, lengths, sampling, denoising, mask_id)
    for row, (prompt, count) in enumerate(zip(own, lengths.tolist(), strict=True)):
        canvas = Canvas(tuple(tokens[row].tolist()), tuple(steps[row].tolist()), tuple(views[row]), mask_id, repeats[row])
        yield Rollout(
            prompt=prompt,
            token_ids=canvas.token_ids[:count],
            rollout_logprobs=tuple(logprobs[row, :count].tolist()),
            finish_reason="stop" if stopped[row] else "length",
            weight_version=version,
            canvas=canvas,
        )


def _frame(model: Model, prompts: Sequence[Prompt], response: int) -> _Frame:
    start = max(len(prompt.token_ids) for prompt in prompts)
    padding = torch.tensor([start - len(prompt.token_ids) for prompt in prompts], device=model.device)
    padded = [(model.pad_id,) * (start - len(prompt.token_ids)) + tuple(prompt.token_ids) for prompt in prompts]
    column = torch.arange(start + response, device=model.device)
    positions = (column - padding[:, None]).clamp_(min=0)
    return _Frame(torch.tensor(padded, device=model.device), positions, (column >= padding[:, None])[:, None, None])


def _sample(
    model: Model,
    frame: _Frame,
    prompts: Sequence[Prompt],
    rows: Sequence[SampleId],
    sampling: SamplingParams,
    denoising: Denoising,
    mask_id: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, step in which each was revealed, log-probability with which it was chosen), each ``[rows, max_tokens]`` on the CPU."""
    size, count = sampling.max_tokens, len(rows)
    generators = [
        torch.Generator(model.device).manual_seed(response_seed(sampling, prompt.index, sample))
        for prompt, (_, sample) in zip(prompts, rows, strict=True)
    ]
    canvas = torch.cat([frame.prompts, torch.full((count, size), mask_id, device=model.device)], 1)
    steps = torch.zeros(count, size, dtype=torch.int64, device=model.device)
    logprobs = torch.zeros(count, size, dtype=torch.float32, device=model.device)
    for block in range(0, size, denoising.block_length):
        columns = slice(frame.start + block, frame.start + block + denoising.block_length)
        for step in range(denoising.steps_per_block):
            states = frame.states(model, canvas)[:, columns].contiguous()  # of a slice torch would copy the head for every row
            logits = model.causal_lm.lm_head(states).double()
            del states
            chosen, confidence = choose(logits, generators, sampling.temperature, denoising.remasking, mask_id)
            masked = canvas[:, columns] == mask_id
            # Every row has equally many masks: the steps of a block share them as evenly as possible, and the first ones have one more.
            reveals = denoising.block_length // denoising.steps_per_block + (step < denoising.block_length % denoising.steps_per_block)
            order = confidence.masked_fill(~masked, -1.0).argsort(dim=-1, descending=True, stable=True)[:, :reveals]
            row = torch.arange(count, device=model.device)[:, None]
            canvas[row, frame.start + block + order] = chosen[row, order]
            steps[row, block + order] = block // denoising.block_length * denoising.steps_per_block + step
            tempered = logits[row, order] / (sampling.temperature or 1.0)
            logprobs[row, block + order] = tempered.log_softmax(-1).gather(-1, chosen[row, order][..., None])[..., 0].float()
    return canvas[:, frame.start :].cpu(), steps.cpu(), logprobs.cpu()


def choose(
    logits: Tensor, generators: Sequence[torch.Generator], temperature: float, remasking: str, mask_id: int
) -> tuple[Tensor, Tensor]:
    """A token for every position of a block, and how confident it is, both ``[rows, block]``.

    Args:
        logits: float64 ``[rows, block, vocab]``.
        generators: one for each row.
    """
    allowed = logits.clone()
    allowed[..., mask_id] = -torch.inf
    if temperature:
        noise = torch.stack([torch.rand(logits.shape[1:], generator=g, dtype=torch.float64, device=logits.device) for g in generators])
        allowed -= temperature * noise.log_().neg_().log_()  # the logarithm of exp(z) / (-ln u)^T
    chosen = allowed.argmax(-1)
    if remasking == "random":
        shape = logits.shape[1:2]
        return chosen, torch.stack([torch.rand(shape, generator=g, dtype=torch.float64, device=logits.device) for g in generators])
    return chosen, logits.softmax(-1).gather(-1, chosen[..., None])[..., 0]


def _views(
    model: Model,
    frame: _Frame,
    prompts: Sequence[Prompt],
    rows: Sequence[SampleId],
    tokens: Tensor,
    steps: Tensor,
    lengths: Tensor,
    sampling: SamplingParams,
    denoising: Denoising,
    mask_id: int,
) -> tuple[list[list[View]], list[int]]:
    """The views of each row, and how often they count. One forward pass for each view of all rows."""
    is_response = torch.arange(tokens.shape[1]) < lengths[:, None]
    masks, repeats = [], []
    for row, (prompt, (_, sample)) in enumerate(zip(prompts, rows, strict=True)):
        generator, length = mask_generator(sampling.seed, prompt.index, sample), len(prompt.token_ids)
        if denoising.likelihood == "one_step":
            masks.append(one_step(length, is_response[row], denoising.prompt_mask, denoising.num_views, generator))
            repeats.append(1)
        else:
            found, count = trajectory(length, steps[row], is_response[row], denoising.num_views, generator)
            masks.append(found)
            repeats.append(count)
    canvas = torch.cat([frame.prompts, tokens.to(model.device)], 1)
    views: list[list[View]] = [[] for _ in rows]
    for number in range(denoising.num_views):
        chosen = [of_row[number] for of_row in masks]
        hidden = torch.stack([F.pad(mask.hidden, (canvas.shape[1] - len(mask.hidden), 0)) for mask in chosen]).to(model.device)
        scored = torch.stack([mask.scored for mask in chosen]).to(model.device)
        states = frame.states(model, canvas.masked_fill(hidden, mask_id))[:, frame.start :]
        logprobs = torch.zeros(scored.shape, dtype=torch.float32, device=model.device)
        logprobs[scored] = _logprobs(model, states[scored], canvas[:, frame.start :][scored], denoising.likelihood_temperature)
        for row, (mask, values) in enumerate(zip(chosen, logprobs.cpu(), strict=True)):
            views[row].append(View(mask.hidden, mask.scored, values))
    return views, repeats


def _logprobs(model: Model, states: Tensor, tokens: Tensor, temperature: float) -> Tensor:
    """log p of `tokens`, ``[n]``, from the states at their own positions ``[n, hidden]``. float32."""
    size = max(1, _LOGITS // model.architecture.vocab_size)
    parts = [
        (model.causal_lm.lm_head(some).float() / temperature).log_softmax(-1).gather(-1, of[:, None])[:, 0]
        for some, of in zip(states.split(size), tokens.split(size), strict=True)
    ]
    return torch.cat(parts)
