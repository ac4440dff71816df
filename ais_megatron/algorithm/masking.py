"""Which tokens a masked diffusion model does not see when a likelihood is estimated, or when it learns from a solution.

    one_step      all response tokens are masked, and each prompt token with a small probability; every response token is scored
                  (d1, arXiv 2504.12216, section 4.1)
    trajectory    the canvas before one step of the sampler; the tokens that this step revealed are scored
    supervised    n of the L response tokens, n uniform in 1..L; these are scored with weight L / n (LLaDA, arXiv 2502.09992, eq. 3)

Every mask is a pure function of its arguments and of a generator that is seeded with (seed, prompt, sample, number). So engine and trainer
score the same masks, and importance weights compare equal estimators. Weights between different estimators, or different masks, would
mostly measure the estimators.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor


class Mask(NamedTuple):
    """One state of a canvas, of which one row of a batch is made."""

    hidden: Tensor
    """bool ``[prompt + response]``, the tokens in whose place the model reads the mask token."""
    scored: Tensor
    """bool ``[response]``, the tokens whose log-probabilities count. All of them are hidden."""


def mask_generator(seed: int, prompt: int, sample: int) -> torch.Generator:
    """A generator on the CPU for the masks of one response, from these numbers only."""
    digest = hashlib.blake2b(f"mask/{seed}/{prompt}/{sample}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)


def one_step(prompt_length: int, is_response: Tensor, probability: float, num: int, generator: torch.Generator) -> list[Mask]:
    """`num` masks, one for each update.

    Args:
        is_response: bool ``[response]``, False behind the first end-of-sequence token. Such tokens are hidden too, but not scored.
        probability: of each prompt token to be hidden.
    """
    everything = torch.ones_like(is_response)
    draws = torch.rand(num, prompt_length, generator=generator)
    return [Mask(torch.cat([row < probability, everything]), is_response) for row in draws]


def trajectory(
    prompt_length: int, reveal_steps: Tensor, is_response: Tensor, num: int, generator: torch.Generator
) -> tuple[list[Mask], int]:
    """The canvas before `num` of the sampler's steps, drawn without replacement from those that revealed a response token.

    Args:
        reveal_steps: int64 ``[response]``, the step in which each token was revealed.
        is_response: bool ``[response]``, as in `one_step`. Tokens behind the end are read where they were revealed, but not scored.
    Returns:
        The masks, and how often each of them counts. With T such steps, a sum over the masks times this number has as its mean `num` times
        the sum over all T steps. If T is smaller than `num`, the last masks score nothing.
    """
    steps = reveal_steps[is_response].unique()
    chosen = steps[torch.randperm(len(steps), generator=generator)[:num]]
    nothing = torch.zeros(prompt_length, dtype=torch.bool)
    masks = [Mask(torch.cat([nothing, reveal_steps >= step]), is_response & (reveal_steps == step)) for step in chosen.tolist()]
    empty = Mask(torch.cat([nothing, torch.ones_like(is_response)]), torch.zeros_like(is_response))
    return masks + [empty] * (num - len(masks)), max(len(steps), num)


def supervised(prompt_length: int, response_length: int, generator: torch.Generator) -> Mask:
    """A mask for learning from a solution."""
    count = int(torch.randint(1, response_length + 1, (), generator=generator))
    hidden = torch.zeros(response_length, dtype=torch.bool)
    hidden[torch.randperm(response_length, generator=generator)[:count]] = True
    return Mask(torch.cat([torch.zeros(prompt_length, dtype=torch.bool), hidden]), hidden)
