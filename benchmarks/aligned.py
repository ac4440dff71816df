"""What an aligned forward pass costs: CPU seconds of a trainer step with the engine's quantised weights, against those of `model.dtype`.

    python benchmarks/aligned.py [--rounds 4]

A step is the old-logprob pass and one update, on grpo_step.py's model and half of its batch, in one process with one thread. The
aligned policies quantise their weights once per update, as they are meant to, or at every forward pass of a microbatch, as one without
the cache would have to. All arms take turns within one run, and the first round is warm-up. Seconds are those of the CPU, so that other
work on the machine counts little. On a CPU FP8 is emulated.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from time import process_time

import torch
from contract import emit, machine, plain
from grpo_step import config_data

from ais_megatron.algorithm.scaler import LossScaler
from ais_megatron.batch import Batch
from ais_megatron.config import Config, build_config
from ais_megatron.distributed import init_process_group
from ais_megatron.policy.parallel import initialize_parallel
from ais_megatron.policy.policy import Policy

ROWS, PROMPT, RESPONSE = 128, 24, 48
ARMS = {  # policy.forward_precision, rank of LoRA, whether the quantised weights are kept until the next update
    "bf16": ("bf16", 0, True),
    "aligned": ("fp8_aligned", 0, True),
    "aligned without cache": ("fp8_aligned", 0, False),
    "weights alone": ("fp8_weights_aligned", 0, True),
    "bf16 with LoRA": ("bf16", 16, True),
    "aligned with LoRA": ("fp8_aligned", 16, True),
}


def config_of(folder: Path, precision: str, rank: int) -> Config:
    sections = {"parallel": {"dp": 1}, "policy": {"forward_precision": precision, "lora": {"rank": rank}}, "sft": {"steps": 1}}
    return build_config(config_data(folder, sections, quantization="fp8_e4m3"))


def policy_of(config: Config, keeps_weights: bool) -> Policy:
    policy = Policy(config, config.train.optimizer, 100, 1.0, None)
    if not keeps_weights:
        aligned = policy.aligned
        assert aligned is not None

        def quantise_again(*_: object) -> None:
            aligned.weights_changed()
            aligned.refresh()

        policy.model.register_forward_pre_hook(quantise_again)
    return policy


def random_batch(vocabulary: int) -> Batch:
    generator, columns = torch.Generator().manual_seed(0), PROMPT + RESPONSE
    return Batch(
        tokens=torch.randint(0, vocabulary, (ROWS, columns), generator=generator),
        loss_mask=(torch.arange(columns) >= PROMPT).expand(ROWS, columns).clone(),
        lengths=torch.full((ROWS,), columns),
        rollout_logprobs=torch.zeros(ROWS, columns),
        advantages=torch.randn(ROWS, generator=generator),
        rewards=torch.zeros(ROWS),
    )


def step(policy: Policy, batch: Batch) -> None:
    old = policy.logprobs(batch)
    policy.train_step(replace(batch, rollout_logprobs=old), old, LossScaler(alpha=0.5, aggregation="token"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    init_process_group("cpu")
    seconds: dict[str, list[float]] = {name: [] for name in ARMS}
    with tempfile.TemporaryDirectory() as folder:
        configs = {name: config_of(Path(folder), precision, rank) for name, (precision, rank, _) in ARMS.items()}
        initialize_parallel(configs["bf16"])
        policies = {name: policy_of(config, ARMS[name][2]) for name, config in configs.items()}
        batch = random_batch(configs["bf16"].architecture.vocab_size)
        for number in range(rounds + 1):
            for name, policy in policies.items():
                start = process_time()
                step(policy, batch)
                if number:
                    seconds[name].append(process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"machine: {machine()}; {rounds} rounds, medians")
    figures = {"trainer step, bf16": plain(medians["bf16"], "CPU s")}
    for name in ("aligned", "aligned without cache", "weights alone"):
        figures[f"trainer step, {name}"] = plain(medians[name] / medians["bf16"], "times bf16", "FP8 is emulated on a CPU")
    figures["trainer step, aligned with LoRA"] = plain(medians["aligned with LoRA"] / medians["bf16 with LoRA"], "times bf16 with LoRA")
    emit(figures)


if __name__ == "__main__":
    main()
