"""Tokenised prompts of the training stream and the held-out set, and which rank generates for which prompt.

A problem depends only on the seed and its index, so a single number records the position in the stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from ais_megatron.batch import Prompt
from ais_megatron.tasks import Problem, Task
from ais_megatron.tokenizer import Tokenizer


@dataclass(frozen=True)
class Share:
    """This rank's part of the prompts of a step.

    A data-parallel rank trains on what its own model-parallel group generated. So the prompts of a step are split into one contiguous
    range per data-parallel rank, and each range is split over the ranks of its group. One rank generates all responses to a prompt, so
    a group's baseline needs no other rank.
    """

    dp_rank: int
    dp_size: int
    mp_rank: int
    mp_size: int

    def of(self, count: int) -> range:
        """The positions in 0..count for which this rank generates. `count` need not be divisible."""
        low, high = (count * (self.dp_rank + i) // self.dp_size for i in (0, 1))
        size = high - low
        return range(low + size * self.mp_rank // self.mp_size, low + size * (self.mp_rank + 1) // self.mp_size)


def training_prompts(task: Task, tokenizer: Tokenizer, first: int, count: int, share: Share) -> list[Prompt]:
    """This rank's part of the `count` prompts of the stream from position `first` on (counted from 0)."""
    return [to_prompt(task.train_problem(first + i), first + i, tokenizer) for i in share.of(count)]


def held_out_prompts(task: Task, tokenizer: Tokenizer, num: int, share: Share, first_index: int = -1) -> list[Prompt]:
    """This rank's part of the held-out prompts. Their indices count down from `first_index`. They are negative, so they never share random
    numbers with training prompts."""
    problems = task.test_problems(num)
    return [to_prompt(problems[i], first_index - i, tokenizer) for i in share.of(len(problems))]


def to_prompt(problem: Problem, index: int, tokenizer: Tokenizer) -> Prompt:
    return Prompt(index=index, text=problem.text, token_ids=tuple(tokenizer.encode_prompt(problem.text)), truth=problem.truth)
