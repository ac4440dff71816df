"""Asking the engine for responses: again until none is missing, and if wanted one batch ahead of the trainer.

With `rollout.ahead = 1` the responses for step k+1 are generated in a thread while step k trains, so they are one version
old when they are used, and servers that take an update in the middle of a response make some of them younger in part.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ais_megatron.batch import Prompt, Rollout
from ais_megatron.config import RolloutConfig
from ais_megatron.distributed import all_reduce_sum, device, rank_consistent, use_device
from ais_megatron.rollout.engine import RolloutEngine, SamplingParams, WeightsLost
from ais_megatron.weight_sync import WeightSync


class Generator:
    """One engine, the sync that can bring its weights back, and what is being generated ahead."""

    def __init__(self, engine: RolloutEngine, sync: WeightSync, rollout: RolloutConfig) -> None:
        self._engine, self._sync, self._rollout = engine, sync, rollout
        self._thread = ThreadPoolExecutor(1, "rollouts-ahead", initializer=use_device, initargs=(device(),))
        self._ahead: tuple[Sequence[Prompt], SamplingParams, Future[list[Rollout]]] | None = None

    def start(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        """Begin with responses that `rollouts` will be asked for later."""
        assert self._ahead is None, "one batch ahead is the limit"
        if prompts:
            self._ahead = (prompts, sampling, self._thread.submit(self._engine.generate, prompts, sampling))

    def rollouts(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """`sampling.num_samples` responses to each of this rank's prompts, grouped. Collective.

        Raises:
            ValueError, RuntimeError: a prompt or the engine; also when more responses than
                `rollout.sglang.max_dropped_fraction` came without usable log-probabilities. On all ranks together.
        """
        while True:
            with rank_consistent():
                rollouts = self._try(prompts, sampling)
            dropped = sum(rollout.is_dropped for rollout in rollouts or ())
            lost, all_dropped, total = all_reduce_sum(
                torch.tensor([rollouts is None, dropped, len(rollouts or ())], dtype=torch.float64)
            ).tolist()
            if not lost:
                assert rollouts is not None  # `lost` counts this rank too
                break
            self._sync.repeat()
        limit = self._rollout.sglang.max_dropped_fraction
        if all_dropped > limit * total:
            raise RuntimeError(
                f"{all_dropped:.0f} of {total:.0f} responses came without finite log-probabilities, more than "
                f"rollout.sglang.max_dropped_fraction={limit:g}: the engine's weights or kernels are corrupt"
            )
        return rollouts

    def settle(self) -> None:
        """Before an update: wait for what is being generated, if the engine cannot do both."""
        if self._ahead is not None and not self._engine.takes_updates_while_generating:
            self._ahead[2].exception()  # waits; an error is raised, on all ranks together, where the result is asked for

    def _try(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout] | None:
        """None: the engine has lost its weights; what is finished is kept for the next try."""
        if not prompts:
            return []
        try:
            if self._ahead is not None and self._ahead[:2] == (prompts, sampling):
                future, self._ahead = self._ahead[2], None
                return future.result()
            return self._engine.generate(prompts, sampling)
        except WeightsLost:
            return None
