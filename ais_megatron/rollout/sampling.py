"""Choosing tokens: random numbers that belong to a response, and the inverse of a distribution function.

Every draw is a function of (seed, prompt index, sample number, position) alone, so a prompt gets the same responses on
whatever rank, in whatever batch and with however many other samples it is generated (up to the forward pass's rounding).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ais_megatron.batch import Prompt
from ais_megatron.config import Architecture
from ais_megatron.rollout.engine import SamplingParams


def check_sampling(sampling: SamplingParams) -> None:
    """Raises `ValueError` for a parameter out of range."""
    for name, allowed, ok in (
        ("num_samples", "1 or more", sampling.num_samples >= 1),
        ("max_tokens", "1 or more", sampling.max_tokens >= 1),
        ("temperature", "0 (greedy) or more", 0.0 <= sampling.temperature < float("inf")),
        ("top_p", "above 0, at most 1", 0.0 < sampling.top_p <= 1.0),
        ("top_k", "0 (no limit) or more", sampling.top_k >= 0),
    ):
        if not ok:
            raise ValueError(f"sampling: {name}={getattr(sampling, name)}; allowed: {allowed}")


def check_prompt(prompt: Prompt, sampling: SamplingParams, architecture: Architecture) -> None:
    """Raises `ValueError` for a prompt that is empty, too long for its response, or another tokenizer's."""
    length, limit = len(prompt.token_ids), architecture.max_position_embeddings
    if not length:
        raise ValueError(f"prompt {prompt.index} is empty; a response needs at least one token to follow")
    if length + sampling.max_tokens > limit:
        raise ValueError(
            f"prompt {prompt.index} has {length} tokens, which with max_tokens={sampling.max_tokens} exceeds "
            f"max_position_embeddings={limit}; lower rollout.max_response_tokens or drop prompts of more than "
            f"{max(limit - sampling.max_tokens, 0)} tokens"
        )
    if not 0 <= min(prompt.token_ids) <= max(prompt.token_ids) < architecture.vocab_size:
        raise ValueError(f"prompt {prompt.index} has token ids outside 0..{architecture.vocab_size - 1}: the tokenizer is not this model's")


def response_seed(sampling: SamplingParams, prompt: int, sample: int) -> int:
    """32 bits for the random numbers of one response: of (seed, prompt index, sample number) alone."""
    digest = hashlib.blake2b(f"{sampling.seed}/{prompt}/{sample}".encode(), digest_size=4).digest()
    return int.from_bytes(digest)


def uniform_draws(sampling: SamplingParams, rows: Sequence[tuple[int, int]]) -> Tensor:
    """float64 ``[rows, max_tokens]`` on the CPU, uniform in [0, 1), for rows of (prompt index, sample number)."""
    draws = torch.empty(len(rows), sampling.max_tokens, dtype=torch.float64)
    generator = torch.Generator()
    for row, (prompt, sample) in enumerate(rows):
        # The CPU's Mersenne Twister takes 32 bits of seed and fills a tensor in order: fewer tokens are a prefix of more.
        generator.manual_seed(response_seed(sampling, prompt, sample))
        torch.rand(sampling.max_tokens, generator=generator, dtype=torch.float64, out=draws[row])
    return draws


def choose_tokens(logits: Tensor, draws: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """One token for each row and its log-probability in the full, temperature-scaled distribution.

    Args:
        logits: float32 ``[rows, vocab]``; a row with NaN gives some token and the log-probability NaN.
        draws: float64 ``[rows]`` in [0, 1), not looked at when greedy.
    Returns:
        int64 ``[rows]`` and float32 ``[rows]``.
    """
    if sampling.temperature == 0:
        logprobs = torch.log_softmax(logits, -1)
        tokens = logits.argmax(-1)
    else:
        logprobs = torch.log_softmax(logits if sampling.temperature == 1 else logits / sampling.temperature, -1)
        probs = logprobs.exp()
        restricted = sampling.top_p < 1 or 0 < sampling.top_k < logits.shape[-1]
        tokens = _draw_restricted(probs, draws, sampling) if restricted else _draw(probs, draws)
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _draw(weights: Tensor, draws: Tensor) -> Tensor:
    """Column i of each row with probability ``weights[i] / sum(weights)``: the first whose cumulated weight exceeds the draw.

    That column's own weight is above 0. However the sums were rounded there is one, because the scaled draw is kept below
    the row's total, which is the last of them. (The clamp on the result is for NaN rows.)
    """
    cumulated = weights.cumsum(-1, dtype=torch.float64)
    total = cumulated[:, -1]
    target = torch.minimum(draws * total, total * (1 - 2.0**-52))
    return torch.searchsorted(cumulated, target[:, None], right=True)[:, 0].clamp_(max=weights.shape[-1] - 1)


def _draw_restricted(probs: Tensor, draws: Tensor, sampling: SamplingParams) -> Tensor:
    """`_draw` among the `top_k` likeliest tokens and, of these, those that less than `top_p` of the probability precedes."""
    ordered, tokens = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1, dtype=torch.float64) - ordered
    ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = 0.0
    return tokens.gather(-1, _draw(ordered, draws)[:, None])[:, 0]
