"""LoRA of rank 16 against training all weights: the memory that training keeps, the process's peak, and the time of an update.

    python benchmarks/lora.py [--rounds 2]

The tiny model is that of grpo_step.py in BF16, and an update is one optimizer step over 64 rows of 64 tokens. If `make smollm2` has made
SmolLM2-135M, it is measured too, in float32 with 8 rows. Every measurement is a process of its own with one rank, and both ways
alternate. The first update is warm-up and left out of the times.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from contract import Figure, emit, machine, plain, stopwatch
from grpo_step import MODEL

from ais_megatron.batch import Batch
from ais_megatron.config import build_config
from ais_megatron.distributed import init_process_group
from ais_megatron.policy.parallel import initialize_parallel
from ais_megatron.policy.policy import Policy

RANK, UPDATES, WIDTH = 16, 4, 64
PRETRAINED = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "tiny": ({"architecture": MODEL}, 64),
    "SmolLM2-135M": ({"path": str(PRETRAINED), "dtype": "fp32"}, 8),
}
KEPT = ("weights", "gradients", "optimizer")


def batch_of(rows: int, vocab_size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, WIDTH, dtype=torch.bool)
    mask[:, 0] = False
    tokens = torch.randint(0, vocab_size, (rows, WIDTH), generator=generator)
    zeros = torch.zeros(rows)
    return Batch(tokens, mask, torch.full((rows,), WIDTH), torch.zeros(rows, WIDTH), zeros, zeros)


def kept_bytes(policy: Policy) -> dict[str, int]:
    """What stays in memory between updates. The optimizer keeps float32 copies of the trained weights, and two moments."""
    buffers = policy.ddp.buffers
    known = {tensor.untyped_storage().data_ptr() for buffer in buffers for tensor in (buffer.param_data, buffer.grad_data)}
    kept = {}
    for optimizer in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer]):
        for parameter in (p for group in optimizer.optimizer.param_groups for p in group["params"]):
            for tensor in (parameter, *optimizer.optimizer.state[parameter].values()):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known:
                    kept[storage.data_ptr()] = storage.nbytes()
    weights = sum(parameter.nbytes for parameter in policy.model.parameters())
    return {"weights": weights, "gradients": sum(buffer.grad_data.nbytes for buffer in buffers), "optimizer": sum(kept.values())}


def measure(model: str, rank: int) -> None:
    """Print one measurement as JSON: bytes, and seconds of each update."""
    section, rows = MODELS[model]
    init_process_group("cpu")
    lora = {"lora": {"rank": rank}}
    config = build_config({"model": section, "policy": lora, "sft": {"steps": 1}, "tokenizer": {"kind": "hf"} if "path" in section else {}})
    initialize_parallel(config)
    policy = Policy(config, config.train.optimizer, UPDATES, 1.0, section.get("path"))
    batch = batch_of(rows, config.architecture.vocab_size)
    seconds: list[float] = []
    for _ in range(UPDATES):
        with stopwatch(seconds):
            policy.sft_step(batch)
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({**kept_bytes(policy), "peak": peak, "seconds": seconds[1:]}))


def compare(model: str, rounds: int) -> dict[str, Figure]:
    measured: dict[int, list[dict[str, Any]]] = {0: [], RANK: []}
    for _ in range(rounds):
        for rank, results in measured.items():
            command = [sys.executable, __file__, "--model", model, "--rank", str(rank)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            results.append(json.loads(output.strip().splitlines()[-1]))
    full, lora = measured[0][0], measured[RANK][0]
    seconds = {rank: statistics.median(s for result in results for s in result["seconds"]) for rank, results in measured.items()}
    figures = {}
    for name, ours, theirs in (
        ("kept", sum(lora[part] for part in KEPT), sum(full[part] for part in KEPT)),
        *((f"    {part}", lora[part], full[part]) for part in KEPT),
        ("peak of the process", lora["peak"], full["peak"]),
    ):
        figures[f"{model}, LoRA, {name}"] = plain(ours / theirs, "of full", f"{ours / 1e6:.1f} MB instead of {theirs / 1e6:.1f} MB")
    note = f"{seconds[RANK]:.3f} s instead of {seconds[0]:.3f} s"
    figures[f"{model}, LoRA, time of an update"] = plain(seconds[RANK] / seconds[0], "of full", note)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--model", choices=list(MODELS), help="with --rank: one measurement")
    parser.add_argument("--rank", type=int)
    arguments = parser.parse_args()
    if arguments.model:
        return measure(arguments.model, arguments.rank)
    print(f"machine: {machine()}; rank {RANK}, {arguments.rounds} rounds of {UPDATES - 1} updates, medians")
    models = [model for model, (section, _) in MODELS.items() if Path(section.get("path", ".")).exists()]
    emit({name: figure for model in models for name, figure in compare(model, arguments.rounds).items()})


if __name__ == "__main__":
    main()
