"""Sets environment variables that CUDA, NCCL and torch's allocator read only once, when they start in a process."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from ais_megatron.cluster.nccl import match_sglang_nccl_environment
from ais_megatron.config import Config

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the name before torch 2.9
EXPANDABLE = "expandable_segments:True"
MAX_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"
BLOCK_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"


def prepare_cuda(config: Config, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables for a job on GPUs. Call this before torch is imported. Variables that are already set do not change.

    With one hardware queue kernels start in the order of their launches, so communication overlaps with the matrix product that
    was launched beside it. Megatron-Core advises this for tensor parallelism on GPUs before Blackwell. Expandable segments waste
    less memory when lengths vary between batches, but servers cannot open them (rollout.sglang.transport=cuda_ipc). The NCCL variables
    get SGLang's values. Transformer Engine's blockwise recipe has float32 scales, like an FP8 engine, only if a variable says so.
    """
    if config.run.backend == "cpu":
        return
    if config.parallel.tp > 1:
        environment.setdefault(MAX_CONNECTIONS, "1")
    if not any(name in environment for name in ALLOCATOR_VARIABLES) and not config.rollout.shares_gpu_memory:
        environment[ALLOCATOR_VARIABLES[0]] = EXPANDABLE
    if config.policy.forward_precision == "fp8_te":
        environment.setdefault(BLOCK_SCALES, "1")
    if config.rollout.engine_traits.has_servers:
        match_sglang_nccl_environment(config.rollout.sglang, environment)
