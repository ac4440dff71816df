"""A weight sync to a real SGLang server: GB of BF16 weights per second from the policy to loaded, for every transport.

    python benchmarks/sglang_sync.py --sglang-python PATH [--rounds 3]

export -> quantise -> flatten -> send -> loaded, of a 60 M parameter Qwen3 in FP8, against memcpy of the same bytes;
where the time goes, in seconds; and from the last optimizer step to the first new token. Export and sending overlap, so the
parts may add up to more than the whole. The server's FP8 loading is the stock one; its KV
cache is BF16, to spare the first update the check of scales, slow on a CPU. Rounds alternate.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from contract import Figure, against_peer, emit, plain, stopwatch
from real_server import RealServer
from weights import ARCHITECTURE

from ais_megatron.batch import Bucket, Prompt
from ais_megatron.config import build_config
from ais_megatron.distributed import init_process_group
from ais_megatron.policy.parallel import initialize_parallel
from ais_megatron.policy.policy import Policy
from ais_megatron.quantization.fp8 import quantize_bucket
from ais_megatron.rollout.engine import SamplingParams
from ais_megatron.rollout.sglang.api import ServerAPI
from ais_megatron.rollout.sglang.client import SGLangEngine
from ais_megatron.rollout.sglang.transport import FlatBucket

TRANSPORTS = ("tensor", "distributed", "disk")
BUCKET = 16 * 2**20
EOS = 4095
Seconds = dict[str, float]


def stream(policy: Policy, seconds: Seconds) -> Iterator[Bucket]:
    """`weight_sync.weight_stream`, with a clock."""
    buckets = policy.export_buckets(BUCKET)
    while True:
        start = perf_counter()
        bucket = next(buckets, None)
        seconds["export"] += perf_counter() - start
        if bucket is None:
            break
        start = perf_counter()
        bucket = quantize_bucket(bucket)
        seconds["quantise"] += perf_counter() - start
        yield bucket


def watch(seconds: Seconds) -> None:
    """Put a clock around flattening and around the server's answers."""
    flatten, call = FlatBucket.copy_into, ServerAPI._call

    def timed_flatten(self: FlatBucket, flat: torch.Tensor) -> None:
        start = perf_counter()
        flatten(self, flat)
        seconds["flatten"] += perf_counter() - start

    async def timed_call(self: ServerAPI, method: str, path: str, *args: Any, **kwargs: Any) -> object:
        start = perf_counter()
        try:
            return await call(self, method, path, *args, **kwargs)
        finally:
            kind = "server: loading buckets" if path.startswith("/update_weights") else "server: pause, begin, end, continue"
            seconds[kind] += perf_counter() - start

    for owner, name, timed in ((FlatBucket, "copy_into", timed_flatten), (ServerAPI, "_call", timed_call)):
        setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sglang-python", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    init_process_group("cpu")
    config = build_config({"model": {"architecture": ARCHITECTURE | {"max_position_embeddings": 512}}})
    initialize_parallel(config)
    policy = Policy(config, config.train.optimizer, 10, 1.0, None)
    source = [p.detach() for p in policy.model.parameters()]
    target, nbytes = [torch.empty_like(p) for p in source], sum(p.nbytes for p in source)
    seconds: Seconds = defaultdict(float)
    watch(seconds)
    whole: dict[str, list[float]] = {name: [] for name in ("memcpy", *TRANSPORTS, "first token")}
    parts: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in TRANSPORTS}
    clients: dict[str, SGLangEngine] = {}
    prompt = [Prompt(0, "", tuple(range(3, 19)), {})]
    with tempfile.TemporaryDirectory() as folder:
        sizes = ARCHITECTURE | {"max_position_embeddings": 512}
        server = RealServer(Path(folder), arguments.sglang_python, sizes, "fp8_e4m3", kv_cache="bf16")
        try:
            version = 0
            for number in range(arguments.rounds + 1):
                with stopwatch(whole["memcpy"]):
                    for one, other in zip(source, target, strict=True):
                        other.copy_(one)
                for transport in TRANSPORTS:
                    if number == 0:  # the first update of a client also checks the server
                        clients[transport] = server.connect(transport, EOS)
                        clients[transport].update_weights(stream(policy, seconds), 0)
                        continue
                    client = clients[transport]
                    seconds.clear()
                    start = perf_counter()
                    version += 1
                    client.update_weights(stream(policy, seconds), version)
                    whole[transport].append(perf_counter() - start)
                    if transport == "tensor":
                        client.generate(prompt, SamplingParams(1, 1))
                        whole["first token"].append(perf_counter() - start)
                    for name, value in seconds.items():
                        parts[transport][name].append(value)
        finally:
            server.stop()
    memcpy = nbytes / statistics.median(whole["memcpy"][1:]) / 1e9
    figures: dict[str, Figure] = {}
    for transport in TRANSPORTS:
        rate = nbytes / statistics.median(whole[transport]) / 1e9
        note = f"{nbytes / 2e6:.0f} M parameters, against memcpy"
        figures[f"weight sync, {transport}"] = against_peer(rate, memcpy, "GB/s", note=note)
        figures[f"    {transport}, whole"] = plain(statistics.median(whole[transport]), "s")
        for name, values in parts[transport].items():
            figures[f"    {transport}, {name}"] = plain(statistics.median(values), "s")
    figures["optimizer step to first token (tensor)"] = plain(statistics.median(whole["first token"]), "s")
    emit(figures)


if __name__ == "__main__":
    main()
