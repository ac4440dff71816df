"""Samples tokens, with random numbers that belong to a response, by inverting the cumulative distribution.

Every draw depends only on (seed, prompt index, sample number, position). So a prompt gets the same responses on any rank, in any batch
and with any number of other samples, up to the rounding of the forward pass.
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
    """Raise `ValueError` if a parameter is out of range."""
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
    """Raise `ValueError` if a prompt is empty, leaves no room for its response, or comes from another tokenizer."""
    length, limit = len(prompt.token_ids), architecture.max_position_embeddings
    if not length:
        raise ValueError(f"prompt {prompt.index} is empty; a prompt needs at least one token")
    if length + sampling.max_tokens > limit:
        raise ValueError(
            f"prompt {prompt.index} has {length} tokens; with max_tokens={sampling.max_tokens} this exceeds "
            f"max_position_embeddings={limit}; lower rollout.max_response_tokens or drop prompts of more than "
            f"{max(limit - sampling.max_tokens, 0)} tokens"
        )
    if not 0 <= min(prompt.token_ids) <= max(prompt.token_ids) < architecture.vocab_size:
        raise ValueError(
            f"prompt {prompt.index} has token ids outside 0..{architecture.vocab_size - 1}, so its tokenizer does not belong to this "
            "model; set tokenizer.path"
        )


def response_seed(sampling: SamplingParams, prompt: int, sample: int) -> int:
    """A 32-bit seed for the random numbers of one response, from (seed, prompt index, sample number) only."""
    digest = hashlib.blake2b(f"{sampling.seed}/{prompt}/{sample}".encode(), digest_size=4).digest()
    return int.from_bytes(digest)


def uniform_draws(sampling: SamplingParams, rows: Sequence[tuple[int, int]]) -> Tensor:
    """float64 ``[rows, max_tokens]`` on the CPU, uniform in [0, 1), for rows of (prompt index, sample number)."""
    draws = torch.empty(len(rows), sampling.max_tokens, dtype=torch.float64)
    generator = torch.Generator()
    for row, (prompt, sample) in enumerate(rows):
        # The CPU's Mersenne Twister has a seed of 32 bits and fills a tensor in order, so fewer tokens are a prefix of more.
        generator.manual_seed(response_seed(sampling, prompt, sample))
        torch.rand(sampling.max_tokens, generator=generator, dtype=torch.float64, out=draws[row])
    return draws


def choose_tokens(logits: Tensor, draws: Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """Sample one token per row, and return it with its log-probability in the full, temperature-scaled distribution.

    Args:
        logits: float32 ``[rows, vocab]``; a row with NaN gives an arbitrary token with the log-probability NaN.
        draws: float64 ``[rows]`` in [0, 1); not used when greedy.
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
    """In each row, draw column i with probability ``weights[i] / sum(weights)``: the first whose cumulated weight exceeds the draw.

    The weight of that column is above 0. It exists for any rounding of the sums, because the scaled draw is kept below the row's
    total, which is the last sum. (The clamp on the result is for rows with NaN.)
    """
    cumulated = weights.cumsum(-1, dtype=torch.float64)
    total = cumulated[:, -1]
    target = torch.minimum(draws * total, total * (1 - 2.0**-52))
    return torch.searchsorted(cumulated, target[:, None], right=True)[:, 0].clamp_(max=weights.shape[-1] - 1)


def _draw_restricted(probs: Tensor, draws: Tensor, sampling: SamplingParams) -> Tensor:
    """`_draw` from the `top_k` likeliest tokens, and only from those before which less than `top_p` of the probability lies."""
    ordered, tokens = probs.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1, dtype=torch.float64) - ordered
    ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = 0.0
    return tokens.gather(-1, _draw(ordered, draws)[:, None])[:, 0]
