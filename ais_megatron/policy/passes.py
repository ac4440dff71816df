"""Runs a batch through the model, microbatch by microbatch, in Megatron's schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ais_megatron.batch import Batch
from ais_megatron.policy import cpu_backend
from ais_megatron.policy.calibration import Calibrator
from ais_megatron.policy.microbatches import Microbatches
from ais_megatron.policy.routing import Routing

# (microbatch, its row numbers, logprobs, entropy, sketches) -> (loss sum with grad, number of tokens, float64 metric sums)
LossFunction = Callable[[Batch, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Passes:
    """Forward passes, or forward and backward passes, of one model."""

    def __init__(self, ddp: DistributedDataParallel, microbatches: Microbatches, calibrator: Calibrator, routing: Routing | None) -> None:
        self._ddp, self._microbatches, self._calibrator, self._routing = ddp, microbatches, calibrator, routing

    def run(self, batch: Batch, loss_function: LossFunction, forward_only: bool, sketched: bool = False) -> Tensor:
        """Run all microbatches. The batch must be padded (`Microbatches.pad`). On the last pipeline stage returns the metric sums, float64
        ``[microbatches, metrics + 1]``, whose last column is the number of tokens."""
        groups = self._microbatches.split(batch)
        # One microbatch at a time is moved to the device, because the routes of all together would take gigabytes.
        microbatches = ((self._microbatches.rows(batch, index), index) for index in groups)
        with cpu_backend.active():
            results = get_forward_backward_func()(
                forward_step_func=partial(self._forward_step, loss_function, sketched),
                data_iterator=microbatches,
                model=[self._ddp],
                num_microbatches=len(groups),
                seq_length=batch.tokens.shape[1],
                micro_batch_size=1,  # both are only hints with variable_seq_lengths
                forward_only=forward_only,
            )
        return torch.stack(results) if results else torch.zeros(0)

    def _forward_step(
        self, loss_function: LossFunction, sketched: bool, microbatches: Iterator[tuple[Batch, Tensor]], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
        """What Megatron calls for each microbatch: the model's output, and the function that turns it into a loss."""
        rows, index = next(microbatches)
        arranged = self._microbatches.arrange(rows)
        self._calibrator.see(arranged.is_real)
        if self._routing is not None:
            self._routing.see(rows, arranged)
        output = model(arranged.tokens, labels=rows.tokens, loss_mask=rows.loss_mask, arranged=arranged, sketched=sketched)

        def loss(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            total, num_tokens, sums = loss_function(rows, index, values[0], values[1], values[2:].detach())
            # Context-parallel ranks have the same loss. Megatron adds up the numbers of tokens of all ranks, so only one of them counts.
            counted = num_tokens.int() * (self._microbatches.context.rank == 0)
            return total, counted, torch.cat([sums.double(), num_tokens.double()[None]])

        return output, loss
