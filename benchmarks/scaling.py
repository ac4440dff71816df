"""How trainer time (old logprobs and one update) grows when tokens, vocabulary or layers are doubled: 2 is proportional.

    python benchmarks/scaling.py [--rounds 3]

One process, one thread; the base is hidden 128, 4 layers, vocabulary 4,096, 64 rows of 64 tokens. Sizes alternate; medians.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from contract import emit, plain, stopwatch
from grpo_step import MODEL

from ais_megatron.algorithm.scaler import LossScaler
from ais_megatron.batch import Batch
from ais_megatron.config import build_config
from ais_megatron.distributed import init_process_group
from ais_megatron.policy.parallel import initialize_parallel
from ais_megatron.policy.policy import Policy

BASE = {"rows": 64, "vocab_size": 4096, "num_hidden_layers": 4}


def make(rows: int, vocab_size: int, num_hidden_layers: int) -> tuple[Policy, Batch]:
    architecture = MODEL | {"vocab_size": vocab_size, "num_hidden_layers": num_hidden_layers}
    config = build_config({"model": {"architecture": architecture}, "train": {"tokens_per_microbatch": 4096}})
    policy = Policy(config, config.train.optimizer, 100, 1.0, None)
    tokens = torch.randint(0, vocab_size, (rows, 64))
    mask = (torch.arange(64) >= 16).expand(rows, 64).contiguous()
    return policy, Batch(tokens, mask, torch.full((rows,), 64), torch.full((rows, 64), -8.0) * mask, torch.randn(rows), torch.zeros(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    init_process_group("cpu")
    initialize_parallel(build_config({"model": {"architecture": MODEL}}))
    variants = {"base": BASE, "tokens": BASE | {"rows": 128}, "vocabulary": BASE | {"vocab_size": 8192}}
    variants["layers"] = BASE | {"num_hidden_layers": 8}
    made = {name: make(**sizes) for name, sizes in variants.items()}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds + 1):
        for name, (policy, batch) in made.items():
            with stopwatch(seconds[name]):
                policy.train_step(batch, policy.logprobs(batch), LossScaler(0.5))
            if number == 0:
                seconds[name].clear()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    figures = {"trainer time of the base": plain(medians["base"], "s", "4,096 tokens, vocabulary 4,096, 4 layers")}
    for name in ("tokens", "vocabulary", "layers"):
        figures[f"trainer time, twice the {name}"] = plain(medians[name] / medians["base"], "times", "2 is proportional")
    emit(figures)


if __name__ == "__main__":
    main()
