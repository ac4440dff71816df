"""Turns the next prompts of the stream into a batch: generate, judge, and compute advantages within groups.

With dynamic sampling (DAPO, arXiv 2503.14476) groups whose rewards are all equal have no signal. They are replaced by groups of the
stream's next prompts, in at most `objective.max_refills` further rounds. If there are still too few groups with a signal, groups
without one fill the batch. The choice depends only on the stream and not on the layout. Candidates are numbered by their position in
the stream, and one all-reduce per round tells every rank which of them have a signal and where they are.

Then groups may change places between data-parallel ranks, so that all have about the same work (`policy.balance`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ais_megatron.algorithm.advantages import advantages_of, has_signal
from ais_megatron.batch import Batch, Prompt, Rollout, assemble
from ais_megatron.config import TaskConfig
from ais_megatron.distributed import all_reduce_sum, gather_batch, rank, rank_consistent
from ais_megatron.policy.balance import balance
from ais_megatron.policy.parallel import model_parallel_group
from ais_megatron.prompts import training_prompts
from ais_megatron.rollout.engine import SamplingParams
from ais_megatron.runs.metrics import PhaseTimer
from ais_megatron.session import Session
from ais_megatron.tasks import Reward


@dataclass(frozen=True)
class Collected:
    """The result of `collect`."""

    batch: Batch
    """This data-parallel rank's rows."""
    rollouts: list[Rollout]
    """All responses that this rank generated, whether they are in a batch or not."""
    rewards: list[Reward]
    """Their rewards."""
    values: Tensor
    """The values of `rewards`."""
    rows: list[int | None]
    """The row of `batch` that holds each of `rollouts`. None if it trains on another data-parallel rank, or was not chosen."""
    next_prompt: int
    """The position in the stream after this batch."""
    prompts_sampled: int
    """How many prompts of the stream this batch used."""


@dataclass
class _Candidates:
    """What this rank has generated so far. For every candidate group of the step: its owner (a rank), and whether it has a signal."""

    rollouts: list[Rollout] = field(default_factory=list)
    rewards: list[Reward] = field(default_factory=list)
    owner: list[int] = field(default_factory=list)
    signal: list[bool] = field(default_factory=list)

    @property
    def values(self) -> Tensor:
        return torch.tensor([r.value for r in self.rewards], dtype=torch.float32)

    def choose(self, wanted: int) -> list[int]:
        """The candidates for the batch, in the order of the stream: first those with a signal, then those without."""
        by_signal = sorted(range(len(self.signal)), key=lambda i: not self.signal[i])
        return sorted(by_signal[:wanted])


def collect(session: Session, first: int, timer: PhaseTimer) -> Collected:
    """The batch that begins at position `first` of the prompt stream. Collective.

    Raises:
        ValueError, RuntimeError: a problem, the engine or a response is corrupt. All ranks raise it together.
    """
    wanted, objective = session.config.rollout.prompts_per_step, session.config.objective
    candidates = _Candidates()
    _sample(session, candidates, first, wanted, timer)
    if objective.resolved.dynamic_sampling:
        for _ in range(objective.max_refills):
            _find_signals(candidates, first, session.config.rollout.group_size)
            missing = wanted - sum(candidates.signal)
            if missing <= 0:
                break
            _sample(session, candidates, first + len(candidates.owner), missing, timer)
        _find_signals(candidates, first, session.config.rollout.group_size)
    mine = _mine(session, candidates)
    with timer.phase("reward"):
        batch = _chosen_rows(session, candidates, mine, first) if objective.resolved.dynamic_sampling else _own_rows(session, candidates)
        batch, mine = balance(batch, mine, session.config)
        batch = _by_view(batch, session.config.rows_per_response)
    sampled = len(candidates.owner)
    rows = _rows_of(session, candidates, mine, first)
    return Collected(batch, candidates.rollouts, candidates.rewards, candidates.values, rows, first + sampled, sampled)


def batches_ahead(session: Session, first: int, steps_left: int) -> Iterator[tuple[range, list[Prompt], SamplingParams]]:
    """What is to be generated now, because `collect` will want it: `rollout.ahead` batches from position `first` of the stream on, without
    what was started before. In each part are its positions, this rank's prompts, and the sampling. Collective."""
    size = session.config.rollout.prompts_per_step
    last = first + min(session.config.rollout.ahead, steps_left) * size
    for position in range(max(first, session.generator.end), last, size):
        positions = range(position, min(position + size, last))
        yield positions, _prompts(session, positions), session.sampling


def _prompts(session: Session, positions: range) -> list[Prompt]:
    with rank_consistent():
        return training_prompts(session.task, session.tokenizer, positions.start, len(positions), session.share)


def _sample(session: Session, candidates: _Candidates, first: int, count: int, timer: PhaseTimer) -> None:
    """Generate and judge this rank's share of the next `count` prompts: those that it has started, and a part of the others."""
    end = first + count
    with timer.phase("generate"):
        new = _prompts(session, range(max(first, session.generator.end), end))  # empty, if all were generated ahead
        rollouts = session.generator.rollouts(new, session.sampling, until=end)
    with timer.phase("reward"):
        with rank_consistent():
            candidates.rewards += session.score(rollouts)
            candidates.rollouts += rollouts
        _check_rewards(session.config.task, candidates)
    candidates.owner += [-1] * count
    candidates.signal += [False] * count


def _check_rewards(task: TaskConfig, candidates: _Candidates) -> None:
    """Stop a run if none of the step's responses can be judged. Collective, if such responses are dropped."""
    if task.reward_errors == "stop":
        return
    judged = [reward for reward, rollout in zip(candidates.rewards, candidates.rollouts, strict=True) if not rollout.is_dropped]
    errors = [reward.reason for reward in judged if reward.is_missing]
    all_errors, total = all_reduce_sum(torch.tensor([len(errors), len(judged)], dtype=torch.int64)).tolist()
    with rank_consistent():
        if errors and all_errors == total:
            raise RuntimeError(f"task.reward_errors=drop: none of {total} responses could be judged; the first error: {errors[0]}")


def _find_signals(candidates: _Candidates, first: int, group_size: int) -> None:
    """Set owner and signal of all candidates, on every rank."""
    known = torch.zeros(2, len(candidates.owner), dtype=torch.int64)
    mine = torch.tensor([r.prompt.index - first for r in candidates.rollouts[::group_size]], dtype=torch.int64)
    known[0, mine] = rank() + 1
    known[1, mine] = has_signal(candidates.values, group_size).long()
    owner, signal = all_reduce_sum(known)
    candidates.owner, candidates.signal = (owner - 1).tolist(), signal.bool().tolist()


def _own_rows(session: Session, candidates: _Candidates) -> Batch:
    """All rows that this rank's model-parallel group generated."""
    with rank_consistent():
        local = _assemble(session, candidates.rollouts, candidates.values)
    return gather_batch(local, model_parallel_group())


def _chosen_rows(session: Session, candidates: _Candidates, mine: list[int], first: int) -> Batch:
    """This data-parallel rank's part of the chosen groups, wherever they were generated. Every rank receives all groups once."""
    size, views = session.config.rollout.group_size, session.config.rows_per_response
    chosen = candidates.choose(session.config.rollout.prompts_per_step)
    with rank_consistent():
        keep = set(chosen)
        rows = [i for i, r in enumerate(candidates.rollouts) if r.prompt.index - first in keep]
        local = _assemble(session, [candidates.rollouts[i] for i in rows], candidates.values[rows])
    everything = gather_batch(local, None)
    # The gathered groups are ordered by rank and then by position. This finds the place of each chosen group.
    stands = {group: place for place, group in enumerate(sorted(chosen, key=lambda group: candidates.owner[group]))}
    places = torch.tensor([stands[group] for group in mine], dtype=torch.int64)
    index = (places[:, None] * size * views + torch.arange(size * views)).view(-1)
    return everything.rows(index, int(everything.lengths[index].max()))


def _by_view(batch: Batch, views: int) -> Batch:
    """First one row of every response, in their order, then the second rows, and so on. So an update can have all responses in one view."""
    return batch if views == 1 else batch.rows(torch.arange(len(batch)).view(-1, views).t().flatten())


def _mine(session: Session, candidates: _Candidates) -> list[int]:
    """The candidates in this data-parallel rank's part of the batch, in the order of their rows, before it is balanced."""
    config, share = session.config, session.share
    wanted = config.rollout.prompts_per_step
    # Without dynamic sampling there is one candidate for each prompt of the batch, in the order of the stream.
    chosen = candidates.choose(wanted) if config.objective.resolved.dynamic_sampling else list(range(wanted))
    low, high = (len(chosen) * (share.dp_rank + i) // share.dp_size for i in (0, 1))
    return chosen[low:high]


def _rows_of(session: Session, candidates: _Candidates, mine: list[int], first: int) -> list[int | None]:
    """See `Collected.rows`."""
    size = session.config.rollout.group_size
    start = {group: size * place for place, group in enumerate(mine)}
    starts = [start.get(r.prompt.index - first) for r in candidates.rollouts]
    return [None if row is None else row + i % size for i, row in enumerate(starts)]


def _assemble(session: Session, rollouts: list[Rollout], values: Tensor) -> Batch:
    """Whole groups as a `Batch` with advantages. Responses that could not be judged are not in the loss. With
    `objective.overlong_filter`, those that were cut at the limit are not in it either."""
    objective, group_size = session.config.objective, session.config.rollout.group_size
    advantages = advantages_of(objective.resolved.advantages, values, group_size, objective.std_floor)
    batch = assemble(rollouts, values.nan_to_num(0.0), advantages)
    left_out = values.isnan()
    if objective.resolved.overlong_filter:
        left_out |= torch.tensor([r.finish_reason == "length" for r in rollouts], dtype=torch.bool)
    return batch.without(left_out.repeat_interleave(session.config.rows_per_response))
