"""Puts gradients and optimizer state away while rollout servers use the same GPUs (`rollout.colocated`). Not yet run on a GPU.

Gradients are freed, because every update begins with zeros. Moments and master weights go to the host's memory. The weights stay, because
they are exported and compute log-probabilities meanwhile. On a CPU there is no memory to hand over.

Source: Megatron-Core 0.16, `MegatronOptimizer.offload_to_cpu` and `DistributedDataParallel.offload_grad_buffers`.
"""

from __future__ import annotations

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer

from ais_megatron.distributed import device


def put_away(ddp: DistributedDataParallel, optimizer: ChainedOptimizer) -> None:
    if device().type == "cuda":
        ddp.offload_grad_buffers()
        optimizer.offload_to_cpu()


def take_back(ddp: DistributedDataParallel, optimizer: ChainedOptimizer) -> None:
    """The reverse of `put_away`. The gradients are zeros."""
    if device().type == "cuda":
        optimizer.restore_from_cpu()
        ddp.restore_grad_buffers()
