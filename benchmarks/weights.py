"""Export of a policy's weights and their FP8 quantisation in GB of BF16 per second, against memcpy of the same bytes.

    python benchmarks/weights.py [--rounds 7]

A 60 M parameter Qwen3 on one rank, one thread: what happens between an optimizer step and the first byte sent.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from contract import against_peer, emit, stopwatch

from ais_megatron.config import build_config
from ais_megatron.distributed import init_process_group
from ais_megatron.policy.parallel import initialize_parallel
from ais_megatron.policy.policy import Policy
from ais_megatron.quantization.fp8 import quantize_bucket
from ais_megatron.rollout.sglang.transport import FlatBucket

ARCHITECTURE = dict(
    vocab_size=4096,
    hidden_size=768,
    intermediate_size=2304,
    num_hidden_layers=7,
    num_attention_heads=12,
    num_key_value_heads=12,
    head_dim=64,
)
BUCKET = 16 * 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    init_process_group("cpu")
    config = build_config({"model": {"architecture": ARCHITECTURE}})
    initialize_parallel(config)
    policy = Policy(config, config.train.optimizer, 10, 1.0, None)
    source = [p.detach() for p in policy.model.parameters()]
    target = [torch.empty_like(p) for p in source]
    nbytes = sum(p.nbytes for p in source)
    flat = torch.empty(2 * BUCKET, dtype=torch.uint8)
    seconds: dict[str, list[float]] = {"memcpy": [], "export": [], "quantise": [], "flatten": []}
    for _ in range(rounds + 1):
        with stopwatch(seconds["memcpy"]):
            for one, other in zip(source, target, strict=True):
                other.copy_(one)
        with stopwatch(seconds["export"]):
            buckets = list(policy.export_buckets(BUCKET))
        with stopwatch(seconds["quantise"]):
            buckets = [quantize_bucket(bucket) for bucket in buckets]
        with stopwatch(seconds["flatten"]):
            for bucket in buckets:
                parts = FlatBucket.of(bucket)
                parts.copy_into(flat[: parts.nbytes])
    rate = {name: nbytes / statistics.median(values[1:]) / 1e9 for name, values in seconds.items()}
    both = 1 / (1 / rate["export"] + 1 / rate["quantise"])
    note = f"{nbytes / 2e6:.0f} M parameters"
    figures = {"export and FP8 quantisation, against memcpy": against_peer(both, rate["memcpy"], "GB/s", note=note)}
    for name in ("export", "quantise", "flatten"):
        figures[f"    {name}"] = against_peer(rate[name], rate["memcpy"], "GB/s", note="of BF16 weights")
    emit(figures)


if __name__ == "__main__":
    main()
