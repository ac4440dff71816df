"""Gets responses from the engine, until none is missing, and if configured up to `rollout.ahead` batches ahead of the trainer.

With `rollout.ahead = N` threads generate the responses for the steps up to k+N while step k trains. When they are used, their oldest
tokens are at most N versions old. If servers get an update in the middle of a response, its later tokens have the newer version.
Responses with tokens older than `rollout.max_staleness` are dropped.

The prompt stream is used in order, and a batch begins where the one before it ended. If that one needed more prompts than expected
(dynamic sampling), it has used some that were started for its successors. All ranks know what was started (`end`), and every prompt belongs
to the rank that started it.

A checkpoint has the responses that are finished but not used, so a
run that is resumed trains on the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ais_megatron.batch import Prompt, Rollout
from ais_megatron.config import RolloutConfig
from ais_megatron.distributed import all_reduce_sum, device, rank, rank_consistent, reduce_metrics, use_device
from ais_megatron.rollout.engine import RolloutEngine, SamplingParams, WeightsLost
from ais_megatron.rollout.occupancy import HasOccupancy, Occupancy
from ais_megatron.rollout.recording import write_rollouts
from ais_megatron.rollout.replay import SavedResponses
from ais_megatron.weight_sync import WeightSync

AHEAD_FILES = "rollouts_ahead_"  # in a checkpoint, one file for each rank


@dataclass(frozen=True)
class _Started:
    """A stretch of the stream whose responses are generated ahead: this rank's part of it."""

    positions: range
    prompts: Sequence[Prompt]
    sampling: SamplingParams
    saved: dict[int, list[Rollout]]
    """The responses that came from a checkpoint, by the number of the prompt."""
    future: Future[list[Rollout]]
    """The other responses, in the order of the prompts."""

    def groups(self) -> dict[int, list[Rollout]]:
        """All responses, when they are there, by the number of the prompt. Raises as `RolloutEngine.generate`."""
        generated, size = iter(self.future.result()), self.sampling.num_samples
        return {p.index: self.saved.get(p.index) or [next(generated) for _ in range(size)] for p in self.prompts}


class Generator:
    """An engine, the weight sync that can restore its weights, and the batches that are generated ahead."""

    def __init__(self, engine: RolloutEngine, sync: WeightSync, rollout: RolloutConfig) -> None:
        self._engine, self._sync, self._rollout = engine, sync, rollout
        self._threads: ThreadPoolExecutor | None = None
        self._ahead: list[_Started] = []  # in the order of the stream
        self._used = 0  # position in the stream before which all prompts are used
        self._saved = SavedResponses()
        self._own = Occupancy(1)

    @property
    def end(self) -> int:
        """The position in the stream before which every prompt is used or was started. It is the same on all ranks."""
        return self._ahead[-1].positions.stop if self._ahead else self._used

    def start(self, positions: range, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        """Start to generate the responses to these positions of the stream, which follow `end`, for later calls of `rollouts`.

        prompts: this rank's part of them.
        """
        saved = {p.index: found for p in prompts if (found := self._saved.take(p, sampling)) is not None}
        missing = [p for p in prompts if p.index not in saved]
        self._ahead.append(_Started(positions, prompts, sampling, saved, self._submit(missing, sampling)))

    def _submit(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> Future[list[Rollout]]:
        if not prompts:
            nothing: Future[list[Rollout]] = Future()
            nothing.set_result([])
            return nothing
        if self._threads is None:  # an embedded engine answers one call at a time, servers are asked for all batches at once
            workers = self._rollout.ahead if self._engine.takes_updates_while_generating else 1
            self._threads = ThreadPoolExecutor(max(workers, 1), "rollouts-ahead", initializer=use_device, initargs=(device(),))
        return self._threads.submit(self._generate, prompts, sampling)

    def _generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        with self._own.at(0):
            return self._engine.generate(prompts, sampling)

    def rollouts(self, prompts: Sequence[Prompt], sampling: SamplingParams, until: int | None = None) -> list[Rollout]:
        """`sampling.num_samples` responses to each prompt, grouped. Collective.

        prompts: prompts of this rank that were not started.
        until: use the stream up to this position. First come the responses of this rank that were started and that nobody has used, then
            those to `prompts`. None for held-out prompts.

        Raises:
            ValueError, RuntimeError: a prompt is wrong or the engine failed, a larger share of the responses than
                `rollout.sglang.max_dropped_fraction` has no finite log-probabilities, or all responses are older than
                `rollout.max_staleness`. All ranks raise it together.
        """
        rollouts = None
        while True:
            with rank_consistent():
                rollouts = self._try(prompts, sampling, until) if rollouts is None else rollouts
            dropped = sum(rollout.is_dropped for rollout in rollouts or ())
            lost, all_dropped, total = all_reduce_sum(
                torch.tensor([rollouts is None, dropped, len(rollouts or ())], dtype=torch.float64)
            ).tolist()
            if not lost:
                assert rollouts is not None  # `lost` counts this rank too
                break
            self._sync.repeat()
            self._start_lost_again()
        limit = self._rollout.sglang.max_dropped_fraction
        if all_dropped > limit * total:
            raise RuntimeError(
                f"{all_dropped:.0f} of {total:.0f} responses have no finite log-probabilities, more than "
                f"rollout.sglang.max_dropped_fraction={limit:g} allows; the engine's weights or kernels are corrupt"
            )
        return rollouts if until is None or self._rollout.max_staleness is None else self._fresh(rollouts, self._rollout.max_staleness)

    def _fresh(self, rollouts: list[Rollout], most: int) -> list[Rollout]:
        """The responses, without the content of those that have tokens older than `most` versions. Collective."""
        fresh = [r.as_stale() if not r.is_dropped and self._engine.version - r.weight_version > most else r for r in rollouts]
        usable, total = all_reduce_sum(torch.tensor([sum(not r.is_dropped for r in fresh), len(fresh)], dtype=torch.float64)).tolist()
        if total and not usable:
            raise RuntimeError(
                f"all {total:.0f} responses of the step have tokens that are more than rollout.max_staleness={most} versions old; raise "
                f"it, or lower rollout.ahead={self._rollout.ahead}"
            )
        return fresh

    def settle(self) -> None:
        """Before an update, wait for the batches that are being generated, unless the engine can do both at the same time."""
        if not self._engine.takes_updates_while_generating:
            for started in self._ahead:
                started.future.exception()  # waits; an error is raised later, by all ranks together, when the result is needed

    def save(self, folder: Path) -> None:
        """Write this rank's responses that are finished and not used yet into a checkpoint. Raises RuntimeError if that is impossible."""
        ready = [s for s in self._ahead if s.future.done() and s.future.exception() is None]
        unused = [(p, groups[p.index]) for s in ready for groups in [s.groups()] for p in s.prompts if p.index >= self._used]
        if unused:
            prompts, rollouts = [p for p, _ in unused], [r for _, group in unused for r in group]
            path = folder / f"{AHEAD_FILES}{rank():04d}.safetensors"
            write_rollouts(path, prompts, rollouts, ready[0].sampling, self._engine.version)

    def resume(self, folder: Path, oldest: int, batches: Iterable[tuple[range, Sequence[Prompt], SamplingParams]]) -> None:
        """`start` each of `batches` (positions, prompts, sampling), with the responses in a checkpoint, whatever layout wrote it. Others
        are generated. Collective.

        oldest: the least weight version of a response that may be used.
        Raises:
            ValueError: a file of the checkpoint is damaged. All ranks raise it together.
        """
        with rank_consistent():
            self._saved = SavedResponses.of(sorted(folder.glob(f"{AHEAD_FILES}*.safetensors")), oldest)
            for positions, prompts, sampling in batches:
                self.start(positions, prompts, sampling)
        self._saved = SavedResponses()

    def idle_share(self, start: float, end: float) -> float:
        """Share of the time between two moments (of this rank's ``time.perf_counter``) in which the engine generated nothing, as a mean
        over its servers, or over the ranks' embedded engines. Collective."""
        if self._rollout.engine_traits.is_embedded or not isinstance(self._engine, HasOccupancy):
            return reduce_metrics({"idle": (1.0 - float(self._own.take(start, end).double().mean()), 1.0)})["idle"]
        busy = all_reduce_sum(self._engine.occupancy.take(start, end).int())
        return 1.0 - float((busy > 0).double().mean())

    def _start_lost_again(self) -> None:
        """Start batches again that ended because the weights were lost, after the weights were pushed again."""
        for number, started in enumerate(self._ahead):
            if started.future.done() and isinstance(started.future.exception(), WeightsLost):
                missing = [p for p in started.prompts if p.index not in started.saved]
                self._ahead[number] = replace(started, future=self._submit(missing, started.sampling))

    def _try(self, prompts: Sequence[Prompt], sampling: SamplingParams, until: int | None) -> list[Rollout] | None:
        """Generate, or return None if the engine has lost its weights. Finished responses are kept for the next try."""
        try:
            started = self._started_before(until) if until is not None else []
            rollouts = started + (self._generate(prompts, sampling) if prompts else [])
        except WeightsLost:
            return None
        if until is not None:  # (after an error nothing is used, and what was lost is started again)
            self._used = until
            self._ahead = [started for started in self._ahead if started.positions.stop > until]
        return rollouts

    def _started_before(self, until: int) -> list[Rollout]:
        """Responses that were started and not used, to this rank's prompts before position `until`. Raises as `RolloutEngine.generate`."""
        groups = [item for started in self._ahead if started.positions.start < until for item in started.groups().items()]
        return [rollout for index, group in groups if self._used <= index < until for rollout in group]
