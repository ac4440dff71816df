"""Variables that CUDA, NCCL and torch's allocator read once, as they start in a process: set beforehand, where nobody has."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from ais_megatron.cluster.nccl import match_sglang_nccl_environment
from ais_megatron.config import Config

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the name before torch 2.9
MAX_CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


def prepare_cuda(config: Config, environment: MutableMapping[str, str] = os.environ) -> None:
    """Call it before torch is imported. It changes nothing that is set already, and nothing for a job on CPUs.

    One hardware queue (Megatron-Core's advice with tensor parallelism, before Blackwell) keeps launches in their order, so that
    communication overlaps with the product that it was launched beside. Expandable segments waste less memory on batches of
    changing lengths. The NCCL switches are SGLang's.
    """
    if config.run.backend == "cpu":
        return
    if config.parallel.tp > 1:
        environment.setdefault(MAX_CONNECTIONS, "1")
    if not any(name in environment for name in ALLOCATOR_VARIABLES):
        environment[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    if config.rollout.engine_traits.has_servers:
        match_sglang_nccl_environment(config.rollout.sglang, environment)
