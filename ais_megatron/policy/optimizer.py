"""Megatron's Adam and learning-rate schedule from our configuration, and a guard against updates that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from ais_megatron.config import Config, OptimizerConfig


def optimizer_config(config: Config, optimizer: OptimizerConfig) -> MegatronOptimizerConfig:
    bf16 = config.model.dtype == "bf16"
    return MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.lr * optimizer.min_lr_ratio,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.eps,
        clip_grad=optimizer.grad_clip,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
    )


class NonFiniteUpdate(Exception):
    """The loss or gradient of this update is not finite. All ranks raise this, and the caller of the update catches it."""


class Guard:
    """Checks every optimizer step. All ranks together skip an update that is not finite, and too many of them in a row end the run.

    (Otherwise clipping would multiply every gradient by a NaN norm. Megatron's loss scaler can skip updates, but exists only for FP16.)

    limit: number of skipped updates in a row that ends the run.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.skipped_in_a_row = 0
        self.grad_norm = math.nan
        self._loss = 0.0

    def watch(self, get_grad_norm: Callable[[], float]) -> Callable[[], float]:
        """Wrap the function from which Megatron gets the global norm, which is equal on all ranks, before it clips and steps."""

        def guarded() -> float:
            self.grad_norm = float(get_grad_norm())
            if not (math.isfinite(self.grad_norm) and math.isfinite(self._loss)):
                raise NonFiniteUpdate
            return self.grad_norm

        return guarded

    def step(self, optimizer_step: Callable[[], object], loss: float) -> int:
        """Run the optimizer step unless its gradient or the global loss is not finite. Returns the number of skipped updates.

        Raises:
            RuntimeError: `limit` updates in a row were skipped. All ranks raise it together, and the weights have not changed.
        """
        self._loss = loss
        try:
            optimizer_step()
        except NonFiniteUpdate:
            self.skipped_in_a_row += 1
            if self.skipped_in_a_row >= self.limit:
                raise RuntimeError(
                    f"{self.skipped_in_a_row} updates in a row had a loss or gradient that is not finite (now loss {loss}, gradient "
                    f"norm {self.grad_norm}); each was skipped on all ranks, so the weights are those before the first of them. "
                    f"Lower train.optimizer.lr, or inspect the batch; train.max_skipped_updates={self.limit} is the limit"
                ) from None
            return 1
        self.skipped_in_a_row = 0
        return 0


def schedule(megatron_optimizer: object, optimizer: OptimizerConfig, total_steps: int) -> OptimizerParamScheduler:
    return OptimizerParamScheduler(
        megatron_optimizer,
        init_lr=0.0,
        max_lr=optimizer.lr,
        min_lr=optimizer.lr * optimizer.min_lr_ratio,
        lr_warmup_steps=optimizer.warmup_steps,
        lr_decay_steps=total_steps + 1,
        lr_decay_style=optimizer.decay,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=total_steps + 1,
        wd_incr_style="constant",
    )
