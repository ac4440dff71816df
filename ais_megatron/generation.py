"""Gets responses from the engine, until none is missing, and if configured one batch ahead of the trainer.

With `rollout.ahead = 1` a thread generates the responses for step k+1 while step k trains. When they are used, they are one version old.
If servers get an update in the middle of a response, its later tokens have the newer version.
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
    """An engine, the weight sync that can restore its weights, and the batch that is generated ahead."""

    def __init__(self, engine: RolloutEngine, sync: WeightSync, rollout: RolloutConfig) -> None:
        self._engine, self._sync, self._rollout = engine, sync, rollout
        self._thread = ThreadPoolExecutor(1, "rollouts-ahead", initializer=use_device, initargs=(device(),))
        self._ahead: tuple[Sequence[Prompt], SamplingParams, Future[list[Rollout]]] | None = None

    def start(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> None:
        """Start to generate responses for a later call of `rollouts`."""
        assert self._ahead is None, "one batch ahead is the limit"
        if prompts:
            self._ahead = (prompts, sampling, self._thread.submit(self._engine.generate, prompts, sampling))

    def rollouts(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """`sampling.num_samples` responses to each of this rank's prompts, grouped. Collective.

        Raises:
            ValueError, RuntimeError: a prompt is wrong or the engine failed, or a larger share of the responses than
                `rollout.sglang.max_dropped_fraction` has no finite log-probabilities. All ranks raise it together.
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
                f"{all_dropped:.0f} of {total:.0f} responses have no finite log-probabilities, more than "
                f"rollout.sglang.max_dropped_fraction={limit:g} allows; the engine's weights or kernels are corrupt"
            )
        return rollouts

    def settle(self) -> None:
        """Before an update, wait for the batch that is being generated, unless the engine can do both at the same time."""
        if self._ahead is not None and not self._engine.takes_updates_while_generating:
            self._ahead[2].exception()  # waits; an error is raised later, by all ranks together, when the result is needed

    def _try(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout] | None:
        """Generate, or return None if the engine has lost its weights. Finished responses are kept for the next try."""
        if not prompts:
            return []
        try:
            if self._ahead is not None and self._ahead[:2] == (prompts, sampling):
                future, self._ahead = self._ahead[2], None
                return future.result()
            return self._engine.generate(prompts, sampling)
        except WeightsLost:
            return None
