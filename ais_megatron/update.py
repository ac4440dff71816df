"""From a batch to new weights: the lines of the paper between the reward and the sync, in two orders.

`update` knows the batch before it weighs it; `lagged_update` saves the forward pass for old_logprobs by weighing this batch
with the previous one's alpha, and learns what this batch was like from the training forward itself (`ais.lag = 1`).
Both take the batch of this data-parallel rank and are collective over the job.
"""

from __future__ import annotations

from dataclasses import dataclass

from ais_megatron.algorithm import ais
from ais_megatron.algorithm.ais import AISState
from ais_megatron.algorithm.correction import Correction
from ais_megatron.algorithm.diagnostics import Diagnostics, diagnose
from ais_megatron.batch import Batch
from ais_megatron.policy.calibration import Calibration
from ais_megatron.policy.policy import Policy, data_parallel_group
from ais_megatron.runs.metrics import PhaseTimer


@dataclass(frozen=True)
class Update:
    """alpha: that weighed this batch. diagnostics: of this batch. metrics: of the optimizer steps. state: for the next batch."""

    alpha: float
    diagnostics: Diagnostics
    metrics: dict[str, float]
    calibration: Calibration
    state: AISState


def update(policy: Policy, batch: Batch, state: AISState, timer: PhaseTimer) -> Update:
    """`train.updates_per_batch` optimizer steps, weighed by this batch's own alpha."""
    config = policy.config
    with timer.phase("logprobs"):
        old_logprobs, calibration = policy.logprobs_and_calibration(batch)
        reference_logprobs = policy.reference_logprobs(batch)
    with timer.phase("diagnose"):
        parts = (old_logprobs, batch.rollout_logprobs, batch.advantages, batch.loss_mask)
        diagnostics = diagnose(*parts, Correction.of(config), data_parallel_group())
        scaler, state = ais.loss_scaler(diagnostics, config, state)
    with timer.phase("train"):
        metrics = policy.train_step(batch, old_logprobs, scaler, reference_logprobs)
    return Update(scaler.alpha, diagnostics, metrics, calibration, state)


def lagged_update(policy: Policy, batch: Batch, state: AISState, timer: PhaseTimer) -> Update:
    """One optimizer step, weighed by the previous batch's alpha (alpha_min before the first batch)."""
    with timer.phase("logprobs"):
        reference_logprobs = policy.reference_logprobs(batch)
    with timer.phase("train"):
        scaler = ais.lagged_loss_scaler(policy.config, state)
        metrics, diagnostics, calibration = policy.lagged_train_step(batch, scaler, reference_logprobs)
    with timer.phase("diagnose"):
        _, state = ais.step(state, diagnostics, policy.config.ais)
    return Update(scaler.alpha, diagnostics, metrics, calibration, state)
