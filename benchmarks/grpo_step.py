"""One GRPO step beside TRL's, on the same model and batch: 256 responses x 48 tokens, BF16 rollouts, one update.

    python benchmarks/grpo_step.py                        ours alone
    python benchmarks/grpo_step.py --peer-python PATH     and TRL, alternating, in one run
    python benchmarks/grpo_step.py --pretrained models/SmolLM2-135M-Instruct --data data/gsm8k/train.jsonl [--dtype fp32]
                                                          a real model on GSM8K: 64 responses x 128 tokens

The model is a 0.9 M parameter Qwen3 (hidden 128, 4 layers, vocabulary 512) with random weights, so most responses run
to their limit. TRL is installed in an environment of its own (`peers/setup.sh trl`). Both use all cores. The first step
of each is warm-up and left out.

With one update per batch TRL makes no forward pass for old log-probabilities, because they are those of the training pass. `ais.lag=1` does
the same here, and still measures D, the ESS ratio and alpha. So the run has both: ours as it is by default, and ours with as many
passes as TRL. (TRL's prompts have 6 tokens here and ours 12 on average. This favours TRL.)
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from contract import Figure, against_peer, emit, machine, plain

STEPS = 6
PRETRAINED_STEPS = 3
PHASES = ("generate", "reward", "logprobs", "diagnose", "train", "calibrate", "sync")
MODEL = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=128,
)


def pretrained_sections(folder: str, data: str, dtype: str, **train: object) -> dict[str, object]:
    """The configuration of a pretrained model on the questions of a GSM8K file. train: further keys of this section."""
    return {
        "model": {"path": str(Path(folder).resolve()), "dtype": dtype},
        "tokenizer": {"kind": "hf"},
        "task": {"name": "qa", "train_path": data, "test_path": str(Path(data).with_name("test.jsonl")), "instruction": ""},
        "rollout": {"quantization": "none", "prompts_per_step": 8, "group_size": 8, "max_response_tokens": 128},
        "train": {"steps": PRETRAINED_STEPS, "tokens_per_microbatch": 2048, "optimizer": {"lr": 1e-5}, **train},
    }


def config_data(folder: Path, sections: dict[str, object] | None = None, **rollout: object) -> dict[str, Any]:
    return {
        "run": {"dir": str(folder / "run")},
        "parallel": {"dp": os.cpu_count()},
        "model": {"architecture": MODEL},
        "task": {"name": "countdown"},
        "rollout": {"quantization": "none", "prompts_per_step": 32, "group_size": 8, "max_response_tokens": 48, **rollout},
        "train": {"steps": STEPS, "optimizer": {"lr": 1e-4}},
        "sft": {"cache_dir": str(folder / "cache")},
        "eval": {"num_prompts": 2},
        "metrics": {"progress_bar": False},
        **(sections or {}),
    }


def ours(sections: dict[str, object] | None = None, **rollout: object) -> list[dict[str, float]]:
    """The metrics rows of a run, without the first; `sections` go into its configuration as they are."""
    from omegaconf import OmegaConf

    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(OmegaConf.to_yaml(OmegaConf.create(config_data(Path(folder), sections, **rollout))))
        subprocess.run([sys.executable, "-m", "ais_megatron", "train", str(config)], check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    return rows[1:]


def peer(python: str, *arguments: str) -> list[float]:
    script = str(Path(__file__).parent / "peers" / "trl_grpo.py")
    output = subprocess.run([python, script, *arguments], check=True, capture_output=True, text=True).stdout
    line = next(line for line in output.splitlines() if line.startswith("steps "))
    return ast.literal_eval(line.removeprefix("steps "))[1:]


def compare_pretrained(arguments: argparse.Namespace) -> None:
    sections = pretrained_sections(arguments.pretrained, arguments.data, arguments.dtype)
    whole_rows = pretrained_sections(arguments.pretrained, arguments.data, arguments.dtype, share_prefixes=False)
    rows: list[dict[str, float]] = []
    unshared: list[dict[str, float]] = []
    theirs: list[float] = []
    for _ in range(arguments.rounds):
        rows += ours(sections)
        unshared += ours(whole_rows)
        if arguments.peer_python:
            theirs += peer(arguments.peer_python, arguments.pretrained, arguments.data, arguments.dtype, str(PRETRAINED_STEPS))
    step = statistics.median(row["time/step"] for row in rows)
    print(f"machine: {machine()}; {arguments.rounds} rounds of {PRETRAINED_STEPS - 1} steps, medians, {arguments.dtype}")
    tokens = statistics.median(row["response_length_mean"] for row in rows)
    figures: dict[str, Figure] = {"GRPO step": plain(step, "s", f"64 responses of {tokens:.0f} tokens on average")}
    if theirs:
        figures = {"GRPO step, against TRL 1.16": against_peer(step, statistics.median(theirs), "s", goal=1.3, note=arguments.dtype)}
    for name in PHASES:
        figures[f"    {name}"] = plain(statistics.median(row[f"time/{name}"] for row in rows), "s")
    figures["GRPO step, train.share_prefixes=false"] = plain(statistics.median(row["time/step"] for row in unshared), "s", "whole rows")
    emit(figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="of an environment with TRL")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pretrained", metavar="FOLDER", help="a model to use instead of random weights, with --data")
    parser.add_argument("--data", metavar="FILE", help="GSM8K's train.jsonl, beside its test.jsonl")
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of the pretrained model, on both sides")
    arguments = parser.parse_args()
    if arguments.pretrained:
        compare_pretrained(arguments)
        return
    rows: list[dict[str, float]] = []
    lagged: list[dict[str, float]] = []
    fp8: list[dict[str, float]] = []
    theirs: list[float] = []
    for _ in range(arguments.rounds):
        rows += ours()
        lagged += ours({"ais": {"lag": 1}})
        if arguments.peer_python:
            theirs += peer(arguments.peer_python)
        fp8 += ours(quantization="fp8_e4m3")

    step, lagged_step = (statistics.median(row["time/step"] for row in part) for part in (rows, lagged))
    print(f"machine: {machine()}; {arguments.rounds} rounds of {STEPS - 1} steps, medians")
    figures: dict[str, Figure] = {"GRPO step": plain(step, "s"), "GRPO step, ais.lag=1": plain(lagged_step, "s")}
    if theirs:
        other = statistics.median(theirs)
        figures = {
            "GRPO step, against TRL 1.16": against_peer(step, other, "s", goal=1.5, note="with an old-logprob pass, which TRL has not"),
            "GRPO step, ais.lag=1, against TRL 1.16": against_peer(lagged_step, other, "s", goal=1.5, note="as many passes as TRL"),
        }
    for name in PHASES:
        figures[f"    {name}"] = plain(statistics.median(row[f"time/{name}"] for row in rows), "s")
    figures["GRPO step, FP8 rollouts"] = plain(statistics.median(row["time/step"] for row in fp8), "s", "FP8 is emulated on a CPU")
    emit(figures)


if __name__ == "__main__":
    main()
