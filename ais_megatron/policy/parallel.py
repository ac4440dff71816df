"""The process groups of a job, and which of them share what.

tensor- and pipeline-parallel ranks   parts of the weights, the same rows
context-parallel ranks                parts of every row, the same weights
data-parallel ranks                   other rows, the same weights
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from torch import Tensor

from ais_megatron.config import Config
from ais_megatron.distributed import device
from ais_megatron.policy import cpu_backend


class Context(NamedTuple):
    """This rank's place among the ranks that share the tokens of a row (`parallel.cp`)."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @staticmethod
    def of_this_rank() -> Context:
        group = parallel_state.get_context_parallel_group()
        return Context(dist.get_rank(group), dist.get_world_size(group), group)

    def total(self, parts: Tensor) -> Tensor:
        """The sum over the ranks, differentiable. Every rank must compute the same from it.

        So the gradient that a rank gets is that of its own part already, and the backward pass communicates nothing."""
        return parts if self.size == 1 else _Total.apply(parts, self.group)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = parts.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


ALONE = Context()
_copies: dict[str, dist.ProcessGroup] = {}  # "model": the group of `model_parallel_group`, if Megatron has none


def initialize_parallel(config: Config) -> None:
    """Create Megatron's process groups for the running job.

    Raises:
        ValueError: the number of ranks is not tp * pp * cp * dp.
    """
    if device().type == "cpu":
        cpu_backend.install()
    parallel, world = config.parallel, dist.get_world_size()
    size = parallel.model_parallel_size
    if world % size or (parallel.dp and world != size * parallel.dp):
        raise ValueError(
            f"this job has {world} ranks, but parallel.tp={parallel.tp} * pp={parallel.pp} * cp={parallel.cp} * "
            f"dp={parallel.dp or 'any'} needs {'a multiple of ' if not parallel.dp else ''}{size * (parallel.dp or 1)}"
        )
    with cpu_backend.active():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tp,
            pipeline_model_parallel_size=parallel.pp,
            context_parallel_size=parallel.cp,
            expert_model_parallel_size=parallel.ep,
            expert_tensor_parallel_size=parallel.etp,
            distributed_timeout_minutes=config.run.timeout_minutes,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(config.run.seed)
    _copies.clear()
    if parallel.cp > 1:
        _copies["model"] = _group_of_the_same_rows()


def _group_of_the_same_rows() -> dist.ProcessGroup:
    """Megatron has no group of TP x PP x CP. Every rank creates all of them, as torch requires, and keeps its own."""
    replicas = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device())
    replicas[dist.get_rank()] = parallel_state.get_data_parallel_rank()
    dist.all_reduce(replicas)
    groups = [dist.new_group((replicas == number).nonzero()[:, 0].tolist()) for number in range(int(replicas.max()) + 1)]
    return groups[parallel_state.get_data_parallel_rank()]


def model_parallel_group() -> dist.ProcessGroup:
    """The ranks that together have one copy of the model and the rows of one data-parallel rank (TP x PP x CP)."""
    return _copies.get("model") or parallel_state.get_model_parallel_group()


def data_parallel_group() -> dist.ProcessGroup:
    """The ranks over which the sums of a batch are reduced. Context-parallel ranks have the same rows and the same sums, so they are not
    in it. (Only gradients are parts, which Megatron adds up over both.)"""
    return parallel_state.get_data_parallel_group()
