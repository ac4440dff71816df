"""`Policy`: the model that is trained, with Megatron-Core.

    logprobs(batch)                      BF16 forward passes, no gradient
    train_step(batch, old, scaler)       the objective's loss, gradients reduced in FP32, optimizer on FP32 master weights
    lagged_train_step(batch, scaler)     the same without `old`, which comes from its own forward pass
    export_buckets()                     weights under Hugging Face names, bucket by bucket
    calibrate(batch)                     ranges of Q, K and V

All methods are collective over the job. Their tensors have the rows of this data-parallel rank, and are the same on all ranks of its
model-parallel group (`model_parallel_group`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from torch import Tensor

from ais_megatron.algorithm.correction import Correction
from ais_megatron.algorithm.diagnostics import Diagnostics, RunningStatistics
from ais_megatron.algorithm.gradients import GradientSums, ResponseGradients
from ais_megatron.algorithm.loss import POLICY_METRICS, policy_loss
from ais_megatron.algorithm.measured import limits
from ais_megatron.algorithm.scaler import LossScaler
from ais_megatron.batch import Batch, Bucket
from ais_megatron.config import Config, OptimizerConfig
from ais_megatron.distributed import all_reduce_sum, device, rank_consistent
from ais_megatron.export.adapter import AdapterReader
from ais_megatron.policy import cpu_backend
from ais_megatron.policy.aligned import Aligned
from ais_megatron.policy.balance import Work
from ais_megatron.policy.calibration import Calibration, Calibrator
from ais_megatron.policy.hf_weights import export_buckets, export_factor_buckets, load_hf
from ais_megatron.policy.layers import uses_transformer_engine
from ais_megatron.policy.lora import LoRA
from ais_megatron.policy.microbatches import Microbatches
from ais_megatron.policy.model import build_model
from ais_megatron.policy.optimizer import Guard, optimizer_config, schedule
from ais_megatron.policy.parallel import Context, data_parallel_group
from ais_megatron.policy.passes import LossFunction, Passes
from ais_megatron.policy.resting import put_away, take_back
from ais_megatron.policy.routing import Routing, attach
from ais_megatron.quantization.kv_scales import KVScales


class Policy:
    """A model under training.

    Args:
        optimizer: learning rate and so on.
        total_steps: number of optimizer steps, for the learning-rate schedule.
        temperature: log-probabilities are computed at this temperature.
        path: Hugging Face folder to load; None keeps random weights.
    """

    def __init__(self, config: Config, optimizer: OptimizerConfig, total_steps: int, temperature: float, path: str | None) -> None:
        self.config = config
        self.routing_metrics: dict[str, float] = {}
        self.work_metrics: dict[str, float] = {}
        self._is_resting = False
        torch.manual_seed(config.run.seed)
        with rank_consistent():
            self.transformer_engine = uses_transformer_engine(config)
        self.microbatches = Microbatches(config, Context.of_this_rank(), self.transformer_engine)
        with cpu_backend.active():
            self.model = build_model(config, temperature, self.transformer_engine)
            with rank_consistent():
                if path is not None:
                    load_hf(self.model, config.architecture, path, self.transformer_engine)
                self.lora = LoRA(self.model, config) if config.policy.lora.rank else None
                if self.lora and config.model.adapter is not None:
                    self.lora.load_adapter(AdapterReader(config.model.adapter, config))
            ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
            self.ddp = DistributedDataParallel(self.model.config, ddp_config, self.model)
            self.ddp.broadcast_params()
            self.optimizer = get_megatron_optimizer(optimizer_config(config, optimizer), [self.ddp], use_gloo_process_groups=False)
            self.schedule = schedule(self.optimizer, optimizer, total_steps)
        self.guard = Guard(config.train.max_skipped_updates)
        self.optimizer.get_grad_norm = self.guard.watch(self.optimizer.get_grad_norm)
        self.model.config.finalize_model_grads_func = finalize_model_grads
        self.model.config.grad_scale_func = self.optimizer.scale_loss
        self.routing = _routing(config) if config.architecture.is_moe else None
        if self.routing is not None:
            attach(self.model, self.routing)
        recomputes = config.model.recompute == "full"
        self.calibrator = Calibrator(self.model, config.architecture.num_hidden_layers, config.calibration.margin, recomputes)
        self.passes = Passes(self.ddp, self.microbatches, self.calibrator, self.routing)
        self.aligned = Aligned(self.model, config, self.lora) if config.policy.is_aligned else None
        keeps_reference = config.objective.kl_coefficient > 0.0
        self._reference = [p.detach().to("cpu", copy=True) for p in self._trained()] if keeps_reference else None

    def rest(self) -> None:
        """Free the memory of gradients and optimizer state until `wake`. Weights can be used and exported, but not updated."""
        if not self._is_resting:
            put_away(self.ddp, self.optimizer)
            self._is_resting = True

    def wake(self) -> None:
        """The reverse of `rest`."""
        if self._is_resting:
            take_back(self.ddp, self.optimizer)
            self._is_resting = False

    @property
    def is_last_stage(self) -> bool:
        return parallel_state.is_pipeline_last_stage()

    def response_gradients(self, batch: Batch) -> ResponseGradients | None:
        """What sketches the gradients of the batch's responses; None if they are not measured (`Config.measures_gradients`)."""
        config = self.config
        if not config.measures_gradients:
            return None
        mean_of_responses = config.objective.resolved.aggregation == "sequence"
        return ResponseGradients(limits(config), len(batch), config.rollout.group_size, mean_of_responses, config.rows_per_response)

    def gradient_sums(self, gradients: ResponseGradients) -> Tensor:
        """`ResponseGradients.sums` of the last pipeline stage, on every stage."""
        return self._from_last_stage(gradients.sums())

    def logprobs(self, batch: Batch, gradients: ResponseGradients | None = None) -> Tensor:
        """log pi of every token in the mask, float32 ``[batch, seq]`` on the CPU, 0 elsewhere. Equal on all ranks of the model-parallel
        group. `gradients` is filled on the last pipeline stage."""
        padded = self.microbatches.pad(batch)
        result = torch.zeros(padded.tokens.shape, dtype=torch.float32)

        def collect(rows: Batch, index: Tensor, logprobs: Tensor, entropy: Tensor, sketches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            result[index, : logprobs.shape[1]] = logprobs.cpu()
            if gradients is not None:
                gradients.add(index, sketches, logprobs, rows.rollout_logprobs, rows.advantages, rows.loss_mask, rows.repeats)
            return logprobs.sum(), rows.loss_mask.sum(), logprobs.new_zeros(0)

        with torch.no_grad():
            self._run(padded, collect, forward_only=True, sketched=gradients is not None)
        return self._from_last_stage(result)[:, : batch.tokens.shape[1]]

    def logprobs_and_calibration(self, batch: Batch, gradients: ResponseGradients | None = None) -> tuple[Tensor, Calibration]:
        """`logprobs`, and the ranges of Q, K and V in the same pass. For a MoE model also which experts got the tokens."""
        with self._recording():
            logprobs = self.logprobs(batch, gradients)
        return logprobs, self._recorded()

    @contextmanager
    def _recording(self) -> Iterator[None]:
        """Within this context, forward passes record the ranges of Q, K and V, and for a MoE model which experts get the tokens."""
        with self.calibrator.recording(), self.routing.recording() if self.routing else nullcontext():
            yield

    def _recorded(self) -> Calibration:
        if self.routing is not None:
            self.routing_metrics = self.routing.finish_recording()
        return self.calibrator.result()

    def calibrate(self, batch: Batch) -> Calibration:
        """The ranges of Q, K and V with the current weights, over `calibration.fresh_tokens` tokens of each data-parallel rank's rows."""
        rows = max(1, int((batch.lengths.cumsum(0) <= self.config.calibration.fresh_tokens).sum()))
        return self.logprobs_and_calibration(batch.rows(torch.arange(rows), int(batch.lengths[:rows].max())))[1]

    def reference_logprobs(self, batch: Batch) -> Tensor | None:
        """`logprobs` of the starting policy, of which the CPU keeps what is trained: with LoRA only factors. None without a KL penalty."""
        if self._reference is None:
            return None
        current = [p.detach().clone() for p in self._trained()]
        try:
            self._set_parameters(self._reference)
            return self.logprobs(batch)
        finally:
            self._set_parameters(current)

    @torch.no_grad()
    def _set_parameters(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._trained(), values, strict=True):
            parameter.copy_(value)
        self._weights_changed()

    def _weights_changed(self) -> None:
        if self.aligned is not None:
            self.aligned.weights_changed()

    def engine_has(self, scales: KVScales | None) -> None:
        """The rollout engine has the present weights, and these scales for its FP8 cache."""
        if self.aligned is not None:
            self.aligned.use_scales(scales)

    def _trained(self) -> list[torch.nn.Parameter]:
        """All parameters, or with LoRA the factors."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def sharded_weights(self) -> dict[str, Any]:
        """What is trained, for Megatron's distributed checkpoint."""
        state: dict[str, Any] = self.lora.sharded_state_dict() if self.lora else self.model.sharded_state_dict()
        return state

    def load_weights(self, state: dict[str, Any]) -> None:
        """Copy what a distributed checkpoint gave for `sharded_weights`."""
        if self.lora:
            self.lora.load(state)
        else:
            self.model.load_state_dict(state)
        self._weights_changed()

    def train_step(
        self, batch: Batch, old_logprobs: Tensor, scaler: LossScaler, reference_logprobs: Tensor | None = None
    ) -> dict[str, float]:
        """`train.updates_per_batch` optimizer steps over this batch.

        Returns:
            Means over the updates of `POLICY_METRICS` and grad_norm, and lr; and
            skipped_updates, the number of updates that were skipped because their loss or gradient was not finite.
        Raises:
            RuntimeError: too many updates in a row were skipped (`Guard`). All ranks raise it together.
        """
        updates = torch.arange(len(batch)).chunk(self.config.train.updates_per_batch)
        results = [
            self._update(batch.rows(rows), old_logprobs[rows], scaler, None if reference_logprobs is None else reference_logprobs[rows])[0]
            for rows in updates
        ]
        means = {name: sum(r[name] for r in results) / len(results) for name in results[0]}
        return means | {"skipped_updates": sum(r["skipped_updates"] for r in results)} | self.routing_metrics

    def lagged_train_step(
        self, batch: Batch, scaler: LossScaler, reference_logprobs: Tensor | None = None, keep_logprobs: bool = False
    ) -> tuple[dict[str, float], Diagnostics, GradientSums | None, Calibration, Tensor | None]:
        """One optimizer step whose own forward pass gives old_logprobs, this batch's diagnostics and the ranges of Q, K and V.

        Nothing is computed twice, and the policy ratio is exactly 1. Returns and raises as `train_step`. It also returns the sums of the
        responses' gradients if they are measured, and with `keep_logprobs` old_logprobs, as `logprobs` does."""
        running = RunningStatistics(Correction.of(self.config), self.response_gradients(batch))
        kept = torch.zeros(self.microbatches.pad(batch).tokens.shape) if keep_logprobs else None
        with self._recording():
            metrics, reduced = self._update(batch, None, scaler, reference_logprobs, running, kept)
        calibration = self._recorded()
        old_logprobs = None if kept is None else self._from_last_stage(kept)[:, : batch.tokens.shape[1]]
        figures, gradients = running.split(reduced)
        return metrics | self.routing_metrics, figures, gradients, calibration, old_logprobs

    def _update(
        self,
        batch: Batch,
        old_logprobs: Tensor | None,
        scaler: LossScaler,
        reference_logprobs: Tensor | None,
        running: RunningStatistics | None = None,
        kept: Tensor | None = None,
    ) -> tuple[dict[str, float], Tensor]:
        """One optimizer step. If old_logprobs is None, those of the forward pass are used, and `running` records them. The last stage
        also writes them to `kept`, float32 ``[batch, padded seq]``, if it is given."""
        batch = self.microbatches.pad(batch)
        width = batch.tokens.shape[1]
        old_logprobs, reference_logprobs = (
            None if x is None else F.pad(x, (0, width - x.shape[1])) for x in (old_logprobs, reference_logprobs)
        )
        if old_logprobs is not None:  # known beforehand, so rejected responses are removed from the batch's mask
            batch = replace(batch, loss_mask=scaler.kept(old_logprobs, batch.rollout_logprobs, batch.loss_mask))
        if scaler.needs_totals:
            local = torch.stack([batch.loss_mask.sum(), batch.loss_mask.any(1).sum()]).double()
            scaler = scaler.for_update(*all_reduce_sum(local, data_parallel_group()).tolist())

        def loss_function(rows: Batch, index: Tensor, logprobs: Tensor, entropy: Tensor, sketches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            old = logprobs.detach() if old_logprobs is None else _cut(old_logprobs, index, logprobs)
            if kept is not None:
                kept[index, : old.shape[1]] = old.cpu()
            reference = None if reference_logprobs is None else _cut(reference_logprobs, index, logprobs)
            if running is not None:
                running.add(old, rows.rollout_logprobs, rows.advantages, rows.loss_mask, index, sketches, rows.repeats)
            factors = scaler.factors(old, rows.rollout_logprobs, rows.loss_mask, rows.repeats)
            loss = policy_loss(self.config.objective, logprobs, entropy, old, reference, rows.advantages, factors)
            return loss.total, factors.counts.sum(), loss.metric_sums

        return self._optimize(batch, loss_function, POLICY_METRICS, running)

    def sft_step(self, batch: Batch) -> dict[str, float]:
        """One optimizer step on the cross-entropy of the tokens in the mask. Returns loss (nats per token), grad_norm and lr. Of rows with
        masked tokens, the advantages are weights of the cross-entropy."""

        def loss_function(rows: Batch, index: Tensor, logprobs: Tensor, entropy: Tensor, sketches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logprobs = logprobs if rows.inputs is None else logprobs * rows.advantages[:, None]
            loss = -logprobs.masked_fill(~rows.loss_mask, 0.0).sum()
            return loss, rows.loss_mask.sum(), loss.detach().double()[None]

        return self._optimize(self.microbatches.pad(batch), loss_function, ("loss",))[0]

    def _optimize(
        self, batch: Batch, loss_function: LossFunction, names: tuple[str, ...], running: RunningStatistics | None = None
    ) -> tuple[dict[str, float], Tensor]:
        """Forward and backward over all microbatches, then one optimizer step.

        Returns:
            metric means per token over the whole job, and the statistics of `running`, reduced by the same all-reduce.
        """
        if self.routing is not None:
            counts = torch.stack([batch.loss_mask.sum(), batch.lengths.sum()]).double()
            loss_tokens, real_tokens = all_reduce_sum(counts, data_parallel_group()).tolist()
            self.routing.tokens_scale = loss_tokens / max(real_tokens, 1.0)
        with cpu_backend.active():
            self.ddp.zero_grad_buffer()
            self.optimizer.zero_grad()
        sums = self._run(batch, loss_function, forward_only=False, sketched=running is not None and running.gradients is not None)
        local = sums.sum(0) if self.is_last_stage else torch.zeros(len(names) + 1, dtype=torch.float64)
        work = self.microbatches.work()
        local = torch.cat([local.cpu(), work, *([running.joined(data_parallel_group())] if running else [])])
        sizes = [len(names) + 1, len(work), len(local) - len(names) - 1 - len(work)]
        totals, work_sums, reduced = self._from_last_stage(all_reduce_sum(local, data_parallel_group())).split(sizes)
        self.work_metrics = Work.of(work_sums).metrics
        num_tokens = max(totals[-1].item(), 1.0)
        metrics = {name: value / num_tokens for name, value in zip(names, totals.tolist(), strict=False)}
        with cpu_backend.active():
            # Before the update, so that with warm-up the first update does not have learning rate 0. A skipped update counts too.
            self.schedule.step(1)
            skipped = self.guard.step(self.optimizer.step, metrics["loss"])
        self._weights_changed()
        lr = self.schedule.get_lr(self.optimizer.param_groups[0])
        return {**metrics, "grad_norm": self.guard.grad_norm, "lr": lr, "skipped_updates": skipped}, reduced

    def _run(self, batch: Batch, loss_function: LossFunction, forward_only: bool, sketched: bool = False) -> Tensor:
        """See `Passes.run`."""
        if self.aligned is not None:
            self.aligned.refresh()
        return self.passes.run(batch, loss_function, forward_only, sketched)

    def _from_last_stage(self, tensor: Tensor) -> Tensor:
        """The tensor of the last pipeline stage, on every stage."""
        if parallel_state.get_pipeline_model_parallel_world_size() == 1:
            return tensor
        shared = tensor.to(device())
        group = parallel_state.get_pipeline_model_parallel_group()
        dist.broadcast(shared, src=parallel_state.get_pipeline_model_parallel_last_rank(), group=group)
        return shared.to(tensor.device)

    def export_buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        """See `hf_weights.export_buckets`. With LoRA the product of the factors is added."""
        return export_buckets(self.model, self.config.architecture, bucket_bytes, self.transformer_engine, self.lora)

    def export_frozen_buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        """The weights that LoRA has frozen, as `export_buckets`."""
        return export_buckets(self.model, self.config.architecture, bucket_bytes, self.transformer_engine)

    def export_factor_buckets(self, bucket_bytes: int) -> Iterator[Bucket]:
        """See `hf_weights.export_factor_buckets`."""
        assert self.lora is not None, "there are no factors"
        return export_factor_buckets(self.lora, self.config, bucket_bytes)


def _routing(config: Config) -> Routing:
    architecture, moe = config.architecture, config.moe
    return Routing(
        num_layers=architecture.num_hidden_layers,
        num_experts=architecture.num_experts,
        top_k=architecture.num_experts_per_tok,
        aux_coefficient=moe.aux_coefficient,
        z_coefficient=moe.z_coefficient,
        replay=moe.routing_replay,
    )


def _cut(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """The rows of a microbatch, with the width and device of `like`."""
    return values[index, : like.shape[1]].to(like.device)
