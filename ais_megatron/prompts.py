"""Prompts by number: the training stream and the held-out set, tokenised, and which rank generates which.

A problem is a pure function of the seed and its index, so "where was I" is one number and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from ais_megatron.batch import Prompt
from ais_megatron.tasks import Problem, Task
from ais_megatron.tokenizer import Tokenizer


@dataclass(frozen=True)
class Share:
    """This rank's part of the prompts of a step.

    A data-parallel rank trains on what its own model-parallel group generated, so a step's prompts are cut into one
    contiguous range per data-parallel rank, and that range into one per rank of the group. All responses to a prompt
    come from one rank: a group's baseline never crosses ranks.
    """

    dp_rank: int
    dp_size: int
    mp_rank: int
    mp_size: int

    def of(self, count: int) -> range:
        """The positions in 0..count that this rank generates; `count` need not divide evenly."""
        low, high = (count * (self.dp_rank + i) // self.dp_size for i in (0, 1))
        size = high - low
        return range(low + size * self.mp_rank // self.mp_size, low + size * (self.mp_rank + 1) // self.mp_size)


def training_prompts(task: Task, tokenizer: Tokenizer, first: int, count: int, share: Share) -> list[Prompt]:
    """This rank's part of the `count` prompts of the stream that begin at position `first` (from 0)."""
    return [to_prompt(task.train_problem(first + i), first + i, tokenizer) for i in share.of(count)]


def held_out_prompts(task: Task, tokenizer: Tokenizer, num: int, share: Share) -> list[Prompt]:
    """This rank's part of the held-out prompts; their indices are negative, so that they never share sampling noise with training."""
    problems = task.test_problems(num)
    return [to_prompt(problems[i], -1 - i, tokenizer) for i in share.of(len(problems))]


def to_prompt(problem: Problem, index: int, tokenizer: Tokenizer) -> Prompt:
    return Prompt(index=index, text=problem.text, token_ids=tuple(tokenizer.encode_prompt(problem.text)), truth=problem.truth)
