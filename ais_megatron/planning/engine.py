"""What a rollout engine holds, and what a weight sync brings it: weights as they are sent, KV cache, and buckets on their way.

No torch here.
"""

from __future__ import annotations

from math import ceil

from ais_megatron.config import Config
from ais_megatron.config.policy import adapter_targets, projection
from ais_megatron.models.family import shape_of
from ais_megatron.planning.parameters import FP32, dtype_bytes, quantized_counts, total_parameters

ADAPTER_PLACES = 3  # on a server: --max-loras-per-batch of rollout/sglang/server.py


def adapter_bytes(config: Config) -> int:
    """Bytes of LoRA's factors as a server gets them, if they are sent by themselves (`rollout.lora_sync=adapter`); otherwise 0."""
    a, lora = config.architecture, config.policy.lora
    if config.rollout.lora_sync == "merged":
        return 0
    rows = {projection(row): row for row in a.family.layer}
    per_layer = sum(sum(shape_of(rows[name], a)) for name in adapter_targets(lora, a))
    return dtype_bytes(config) * a.num_hidden_layers * lora.rank * per_layer


def pushed_bytes(config: Config) -> int:
    """Bytes of a full set of weights as the engine receives it: FP8 weights and their scales, all other weights, and KV scales."""
    a, e = config.architecture, dtype_bytes(config)
    total, (quantized, blocks) = total_parameters(a), quantized_counts(a, config.rollout.weight_block)
    if config.rollout.quantization == "none":
        size = e * total
    else:
        size = quantized + FP32 * blocks + e * (total - quantized)
    has_scales = config.rollout.kv_cache_is_fp8 and (config.calibration.mode != "off" or config.rollout.engine_traits.keeps_kv_scales)
    return size + (2 * FP32 * len(a.attention_layers) if has_scales else 0)


def engine_bytes(config: Config, tp: int = 1) -> int:
    """Bytes of a rollout engine's weights on one of its `tp` GPUs. The local engine also keeps FP8 weights dequantised to FP32."""
    a = config.architecture
    size = pushed_bytes(config)
    if config.rollout.engine_traits.is_embedded and config.rollout.quantization != "none":
        size += FP32 * quantized_counts(a, config.rollout.weight_block)[0]
    return ceil((size + ADAPTER_PLACES * adapter_bytes(config)) / tp)


def kv_bytes_per_token(config: Config, cuda: bool = True) -> int:
    """Bytes of KV cache for one token on one GPU of the engine. The local engine stores it in its compute dtype. A diffusion model has
    none."""
    a, rollout = config.architecture, config.rollout
    if a.family.is_diffusion:
        return 0
    if rollout.engine_traits.is_embedded:
        return len(a.attention_layers) * 2 * a.kv_size * (dtype_bytes(config) if cuda else FP32)
    heads = max(a.num_key_value_heads // rollout.sglang.tp, 1)  # if there are more GPUs than KV heads, the heads are replicated
    return len(a.attention_layers) * 2 * heads * a.head_dim * (1 if rollout.kv_cache_is_fp8 else 2)


def sync_memory(config: Config) -> int:
    """Bytes of buckets on a trainer rank during a sync: gathered shards, whole tensors, quantised and flattened tensors, FP32 blocks."""
    a, e = config.architecture, dtype_bytes(config)
    mlp = a.moe_intermediate_size if a.is_moe else a.intermediate_size
    entry = (
        e * a.hidden_size * max(a.vocab_size, 2 * mlp * (config.parallel.ep if a.is_moe else 1))
    )  # the largest tensor, which is never split
    bucket = max(int(config.rollout.sync_bucket_mb * 2**20), entry)
    fp32 = 0 if config.rollout.quantization == "none" else 3 * FP32 * a.hidden_size * max(mlp, a.query_size)
    return 3 * min(bucket, e * total_parameters(a)) + fp32
