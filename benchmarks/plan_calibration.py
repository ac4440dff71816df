"""Measures what a CPU can tell about the assumptions of `ais-megatron plan`, and writes them for its option --calibration.

    python benchmarks/plan_calibration.py [--rounds 5] [--out benchmarks/results/plan_calibration.json]
    ais-megatron plan CONFIG --sweep --calibration benchmarks/results/plan_calibration.json

train_ratio and recompute_ratio: CPU time of forward and backward passes, divided by that of a forward pass, on a model whose layers take
most of the time. request_us: CPU time of our client for one request of a weight sync to each of 64 servers, with the names, dtypes and
shapes of a bucket of 100 tensors. The other figures are printed beside what the plan assumes and are not written: how time grows with
layers and tokens, and how many times the bytes are read or written while weights are quantised (a GPU does that in one kernel).
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import aiohttp
import torch
from contract import emit, machine, plain

from ais_megatron.batch import Batch
from ais_megatron.config import build_config
from ais_megatron.distributed import init_process_group
from ais_megatron.planning.cost import Assumptions
from ais_megatron.policy.parallel import initialize_parallel
from ais_megatron.policy.policy import Policy
from ais_megatron.quantization.fp8 import quantize_block
from ais_megatron.rollout.sglang.api import ServerAPI
from ais_megatron.rollout.sglang.transport import NOT_LAST, each
from ais_megatron.runs.folder import write_json_atomic

SIZES = dict(
    vocab_size=256, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, head_dim=64
)
SERVERS, TENSORS, LENGTH = 64, 100, 128


def policy_of(layers: int, recompute: str = "none") -> Policy:
    model = {"architecture": SIZES | {"num_hidden_layers": layers}, "recompute": recompute}
    config = build_config({"model": model, "train": {"tokens_per_microbatch": 4096, "share_prefixes": False}})
    policy = Policy(config, config.train.optimizer, 10, 1.0, None)
    optimizer: Any = policy.optimizer
    optimizer.step = lambda: (True, 0.0, None)  # only the passes are measured
    return policy


def batch_of(rows: int) -> Batch:
    tokens = torch.randint(0, SIZES["vocab_size"], (rows, LENGTH))
    mask = (torch.arange(LENGTH) >= 1).expand(rows, LENGTH).contiguous()
    return Batch(tokens, mask, torch.full((rows,), LENGTH), torch.zeros(rows, LENGTH), torch.ones(rows), torch.zeros(rows))


def medians(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU seconds of each way, alternating; the first round is warm-up. (Other work on the machine would change wall seconds.)"""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            start = process_time()
            way()
            if number:
                seconds[name].append(process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


async def requests(port: int, rounds: int) -> float:
    """CPU seconds of this process for one request."""
    body = {
        "names": [f"model.layers.{i}.mlp.experts.{i}.gate_proj.weight_scale_inv" for i in range(TENSORS)],
        "dtypes": ["float8_e4m3fn"] * TENSORS,
        "shapes": [[768, 2048]] * TENSORS,
        "group_name": "bench-1",
        "load_format": "flattened_bucket",
        **NOT_LAST,
    }
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        servers = [ServerAPI(f"http://127.0.0.1:{port}", session, 60.0) for _ in range(SERVERS)]
        taken = []
        for _ in range(2 * rounds + 1):
            start = process_time()
            await each(servers, lambda server: server.update("distributed", **body))
            taken.append((process_time() - start) / SERVERS)
    return statistics.median(taken[1:])


def request_seconds(rounds: int) -> float:
    command = [sys.executable, str(Path(__file__).parent / "peers" / "stand_in_server.py"), "1", "bench-0"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None and server.stdout is not None  # both are pipes
        try:
            return asyncio.run(requests(int(server.stdout.readline()), rounds))
        finally:
            server.stdin.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="file for the measured assumptions")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    init_process_group("cpu")
    initialize_parallel(build_config({"model": {"architecture": SIZES}}))
    plain_policy, deep, recomputing = policy_of(4), policy_of(8), policy_of(4, "full")
    batch, twice = batch_of(32), batch_of(64)
    weights = [torch.randn(2304, 768).mul_(0.02).bfloat16() for _ in range(6)]
    copies = [torch.empty_like(weight) for weight in weights]
    seconds = medians(
        {
            "forward": lambda: plain_policy.logprobs(batch),
            "train": lambda: plain_policy.sft_step(batch),
            "recompute": lambda: recomputing.sft_step(batch),
            "layers": lambda: deep.sft_step(batch),
            "tokens": lambda: plain_policy.sft_step(twice),
            "quantise": lambda: [quantize_block(weight) for weight in weights],
            "memcpy": lambda: [copy.copy_(weight) for copy, weight in zip(copies, weights, strict=True)],
        },
        arguments.rounds,
    )
    measured = {
        "train_ratio": seconds["train"] / seconds["forward"],
        "recompute_ratio": seconds["recompute"] / seconds["forward"],
        "request_us": request_seconds(arguments.rounds) * 1e6,
    }
    assumed = Assumptions()
    notes = {"train_ratio": "forward and backward / forward", "recompute_ratio": "the same with recomputed layers"}
    notes["request_us"] = f"CPU time of the client, {SERVERS} servers, {TENSORS} tensors"
    figures = {
        name: plain(value, "us" if name == "request_us" else "times", f"{notes[name]}; the plan assumes {getattr(assumed, name):g}")
        for name, value in measured.items()
    }
    figures["trainer time, twice the layers"] = plain(seconds["layers"] / seconds["train"], "times", "the plan assumes 2")
    figures["trainer time, twice the rows"] = plain(seconds["tokens"] / seconds["train"], "times", "the plan assumes 2")
    passes = 2 * seconds["quantise"] / seconds["memcpy"]  # memcpy reads and writes
    figures["quantising, passes over the bytes"] = plain(
        passes, "times", f"on a CPU; for a GPU the plan assumes {assumed.quantize_passes:g}"
    )
    if arguments.out:
        rounded = {name: float(f"{value:.3g}") for name, value in measured.items()}
        write_json_atomic(arguments.out, {"machine": machine(), "torch": torch.__version__, "assumptions": rounded})
    emit(figures)


if __name__ == "__main__":
    main()
