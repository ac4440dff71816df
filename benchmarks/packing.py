"""Packed rows against padded rows: tokens per second of an update, on lengths with a long tail.

    python benchmarks/packing.py [--rounds 3] [--rows 32] [--budget 16384]

An update is one optimizer step of the tiny model of grpo_step.py, or of a MoE model of its size, over the rows of one data-parallel rank.
Their lengths are drawn from a log-normal distribution, as responses that think differ: most have a hundred tokens, and few a thousand.
Both ways get the same rows, no row shares its beginning with another, and the ways alternate. The first update of each is warm-up. Seconds
are those of the processor, because one thread computes and other processes may run beside it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from contract import against_peer, emit, machine, plain
from grpo_step import MODEL

from ais_megatron.batch import Batch
from ais_megatron.config import build_config
from ais_megatron.distributed import init_process_group
from ais_megatron.policy.parallel import initialize_parallel
from ais_megatron.policy.policy import Policy

PROMPT, MEDIAN, SIGMA, LONGEST = 32, 100.0, 1.0, 1024
MODELS: dict[str, dict[str, Any]] = {
    "dense": MODEL,
    "MoE": MODEL | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
}


def batch_of(rows: int, vocab_size: int) -> Batch:
    generator = torch.Generator().manual_seed(0)
    responses = (MEDIAN * torch.randn(rows, generator=generator).mul(SIGMA).exp()).long().clamp(4, LONGEST - PROMPT)
    lengths = PROMPT + responses
    columns = torch.arange(int(lengths.max()))
    real = columns < lengths[:, None]
    zeros = torch.zeros(rows)
    tokens = torch.randint(0, vocab_size, real.shape, generator=generator) * real
    return Batch(tokens, real & (columns >= PROMPT), lengths, torch.zeros(real.shape), zeros, zeros)


def compare(kind: str, rows: int, budget: int, rounds: int) -> tuple[float, float, dict[str, float]]:
    """(tokens per second packed, padded, and how many tokens each way computed per real one)."""
    policies = {}
    for packing in (True, False):
        train = {"packing": packing, "share_prefixes": False, "tokens_per_microbatch": budget}
        config = build_config({"model": {"architecture": MODELS[kind] | {"max_position_embeddings": LONGEST}}, "train": train})
        policies[packing] = Policy(config, config.train.optimizer, 100, 1.0, None)
    batch = batch_of(rows, config.architecture.vocab_size)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    computed: dict[str, float] = {}
    for _ in range(rounds + 1):
        for packing, policy in policies.items():
            start = time.process_time()
            policy.sft_step(batch)
            seconds[packing].append(time.process_time() - start)
            computed["packed" if packing else "padded"] = policy.work_metrics["computed_over_real_tokens"]
    packed, padded = (int(batch.lengths.sum()) / statistics.median(seconds[packing][1:]) for packing in (True, False))
    return packed, padded, computed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--budget", type=int, default=16384)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    init_process_group("cpu")
    initialize_parallel(build_config({"model": {"architecture": MODEL}}))
    print(f"machine: {machine()}; {arguments.rows} rows, {arguments.rounds} rounds, medians")
    figures = {}
    for kind in MODELS:
        packed, padded, computed = compare(kind, arguments.rows, arguments.budget, arguments.rounds)
        note = f"computed per real token: {computed['packed']:.2f}, padded {computed['padded']:.2f}"
        figures[f"{kind}, packed rows against padded"] = against_peer(packed, padded, "tokens/s", 1.5, note)
    figures["rows"] = plain(arguments.rows, "rows", f"at most {arguments.budget} tokens in a microbatch")
    emit(figures)


if __name__ == "__main__":
    main()
