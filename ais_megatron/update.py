"""Turns a batch into new weights: the steps of the algorithm between the reward and the sync, in two orders.

`update` measures the batch before it chooses alpha for it. `lagged_update` (`ais.lag = 1`) uses the previous batch's alpha, and measures
this batch in the training forward pass. This saves the forward pass for old_logprobs. Both get the batch of this data-parallel rank and
are collective over the job.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ais_megatron.algorithm import ais
from ais_megatron.algorithm.ais import AISState
from ais_megatron.algorithm.correction import Correction
from ais_megatron.algorithm.diagnostics import Diagnostics, diagnose_with
from ais_megatron.algorithm.gradients import GradientSums
from ais_megatron.batch import Batch
from ais_megatron.policy.calibration import Calibration
from ais_megatron.policy.parallel import data_parallel_group
from ais_megatron.policy.policy import Policy
from ais_megatron.runs.metrics import PhaseTimer


@dataclass(frozen=True)
class Update:
    """The result of an update."""

    alpha: float
    """The alpha with which this batch was weighted."""
    correction: Correction
    """What this alpha scaled. It says how the batch's weights were limited."""
    diagnostics: Diagnostics
    """Of this batch."""
    metrics: dict[str, float]
    """Of the optimizer steps."""
    calibration: Calibration
    state: AISState
    """For the next batch."""
    old_logprobs: Tensor | None
    """float32 ``[batch, seq]`` on the CPU, at the sampling temperature, 0 outside the loss. None after a `lagged_update` that was not asked
    to keep them."""


def update(policy: Policy, batch: Batch, state: AISState, timer: PhaseTimer, keep_logprobs: bool = False) -> Update:
    """`train.updates_per_batch` optimizer steps with this batch's own alpha. The log-probabilities are kept in any case."""
    config = policy.config
    with timer.phase("logprobs"):
        gradients = policy.response_gradients(batch)
        old_logprobs, calibration = policy.logprobs_and_calibration(batch, gradients)
        reference_logprobs = policy.reference_logprobs(batch)
    with timer.phase("diagnose"):
        parts = (old_logprobs, batch.rollout_logprobs, batch.advantages, batch.loss_mask)
        own_sums = torch.zeros(0, dtype=torch.float64) if gradients is None else policy.gradient_sums(gradients)
        diagnostics, sums = diagnose_with(own_sums, *parts, Correction.of(config), data_parallel_group())
        scaler, state = ais.loss_scaler(diagnostics, config, state, None if gradients is None else GradientSums.of(sums))
    with timer.phase("train"):
        metrics = policy.train_step(batch, old_logprobs, scaler, reference_logprobs)
    return Update(scaler.alpha, scaler.correction, diagnostics, metrics, calibration, state, old_logprobs)


def lagged_update(policy: Policy, batch: Batch, state: AISState, timer: PhaseTimer, keep_logprobs: bool = False) -> Update:
    """One optimizer step with the previous batch's choice; for the first batch see `ais.lagged_loss_scaler`."""
    with timer.phase("logprobs"):
        reference_logprobs = policy.reference_logprobs(batch)
    with timer.phase("train"):
        scaler = ais.lagged_loss_scaler(policy.config, state)
        metrics, diagnostics, gradients, calibration, old_logprobs = policy.lagged_train_step(
            batch, scaler, reference_logprobs, keep_logprobs
        )
    with timer.phase("diagnose"):
        _, state = ais.step(state, diagnostics, policy.config.ais, gradients)
    return Update(scaler.alpha, scaler.correction, diagnostics, metrics, calibration, state, old_logprobs)
