"""Export -> quantise -> push: the one place where policy and rollout engine meet.

Weights leave Megatron as whole tensors under Hugging Face names, a bucket at a time; each bucket is quantised here, once,
and handed to the engine together with the KV scales as one transaction. Afterwards the engine's weights equal
quantise(export(policy)), bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

from ais_megatron.config import RolloutConfig
from ais_megatron.distributed import rank_consistent
from ais_megatron.policy.policy import Policy
from ais_megatron.quantization.fp8 import quantize_bucket
from ais_megatron.quantization.kv_scales import KVScales
from ais_megatron.rollout.engine import Bucket, RolloutEngine


def push(policy: Policy, engine: RolloutEngine, rollout: RolloutConfig, scales: KVScales | None, version: int) -> None:
    """Bring the engine to `version`: the policy's weights, and `scales` where its KV cache is FP8. Collective.

    Raises:
        ValueError, RuntimeError: the engine refused; on all ranks together.
    """
    stream = weight_stream(policy, rollout, scales)
    with rank_consistent():
        try:
            engine.update_weights(stream, version)
        finally:
            for _ in stream:  # the other ranks wait in the same gathers: a rank whose engine failed still takes part
                pass


def weight_stream(policy: Policy, rollout: RolloutConfig, scales: KVScales | None) -> Iterator[Bucket]:
    """What is pushed, bucket by bucket."""
    for bucket in policy.export_buckets(int(rollout.sync_bucket_mb * 2**20)):
        yield quantize_bucket(bucket) if rollout.quantization != "none" else bucket
    if scales is not None and rollout.kv_cache_is_fp8:
        yield list(scales.named_tensors())
