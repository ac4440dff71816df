"""Megatron's Adam and learning-rate schedule from our configuration, and the guard in front of every update."""

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


def refuse_non_finite(get_grad_norm: Callable[[], float]) -> Callable[[], float]:
    """Megatron asks for the global norm, equal on all ranks, before it clips and steps: the moment to stop a NaN.
    (Clipping would multiply every gradient by it; the loss scaler that could skip the step exists for FP16 only.)"""

    def guarded() -> float:
        norm = float(get_grad_norm())
        if not math.isfinite(norm):
            raise RuntimeError(f"gradient norm is {norm}: this update was refused on all ranks before any weight changed")
        return norm

    return guarded


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
