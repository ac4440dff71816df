"""Tokenised prompts of the training stream and the held-out set, and which rank generates for which prompt.

A problem depends only on the seed and its index, so a single number records the position in the stream. Prompts of a file that are too
long are found once, before the first step (`within_limit`), so that leaving them out does not disturb this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ais_megatron.batch import Prompt
from ais_megatron.config import Config
from ais_megatron.tasks import Problem, Task
from ais_megatron.tasks.own_reward import RewardedTask
from ais_megatron.tasks.streams import StreamTask
from ais_megatron.tokenizer import Tokenizer

MOST_TOKENS_PER_BYTE = 3  # a token stands for at least one byte of text, and Unicode's normal form NFC at most triples the bytes


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


def within_limit(task: Task, tokenizer: Tokenizer, config: Config, splits: Sequence[str] = ("train", "test")) -> tuple[Task, list[str]]:
    """The task without the problems of its files whose prompts are too long, and a line for people about each file that had some.

    The result depends only on the files, the tokenizer and the configuration, so it is the same on all ranks and after a resume.
    Generated puzzles, and tasks of the user's own that are no `StreamTask`, stay as they are; the engine refuses prompts that are too long.

    Raises:
        ValueError: a prompt is too long and `task.long_prompts` is "error", or no prompt is short enough. The message names the first
            one's file and line.
    """
    if isinstance(task, RewardedTask):
        inner, notes = within_limit(task.task, tokenizer, config, splits)
        return replace(task, task=inner), notes
    if not isinstance(task, StreamTask):
        return task, []
    limit, why = _limit(config)
    around = len(tokenizer.encode_prompt("1"))
    notes = []

    def keep(split: str, problems: list[Problem]) -> list[Problem]:
        if split not in splits:
            return problems
        lengths = [_length(problem, tokenizer, limit, around) for problem in problems]
        short = [problem for problem, length in zip(problems, lengths, strict=True) if length <= limit]
        if len(short) == len(problems):
            return short
        where, length = next((problem.where, length) for problem, length in zip(problems, lengths, strict=True) if length > limit)
        what = f"{len(problems) - len(short)} of {len(problems)} {'training' if split == 'train' else 'held-out'} prompts"
        if config.task.long_prompts == "error" or not short:
            remedy = "set task.long_prompts=drop to leave such prompts out, or make room" if short else "make room"
            raise ValueError(f"{where}: the prompt has {length} tokens, but at most {limit} fit ({why}); {what} are too long; {remedy}")
        notes.append(f"{what} are longer than {limit} tokens ({why}) and were dropped")
        return short

    return task.filtered(keep), notes


def _limit(config: Config) -> tuple[int, str]:
    """The most tokens of a prompt, and which keys say so."""
    if config.task.max_prompt_tokens is not None:
        return config.task.max_prompt_tokens, f"task.max_prompt_tokens={config.task.max_prompt_tokens}"
    context, response = config.architecture.max_position_embeddings, config.rollout.max_response_tokens
    return context - response, f"model.architecture.max_position_embeddings={context} less rollout.max_response_tokens={response}"


def _length(problem: Problem, tokenizer: Tokenizer, limit: int, around: int) -> int:
    """The number of tokens of a prompt, or an upper bound that is within the limit, because tokenising a large file takes minutes."""
    bound = around + MOST_TOKENS_PER_BYTE * len(problem.text.encode())
    return bound if problem.messages is None and bound <= limit else len(encode(problem, tokenizer))


def to_prompt(problem: Problem, index: int, tokenizer: Tokenizer) -> Prompt:
    return Prompt(index=index, text=problem.text, token_ids=encode(problem, tokenizer), truth=problem.truth)


def encode(problem: Problem, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens of the problem's prompt. If the chat template refuses its turns, the message names the problem's file and line."""
    try:
        return tuple(tokenizer.encode_prompt(problem.messages or problem.text))
    except ValueError as error:
        raise ValueError(f"{problem.where}: {error}") from error if problem.where else error
