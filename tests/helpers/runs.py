"""Whole runs of seconds: their configuration, the command line, and the rows they write."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

from ais_megatron.config import Config
from tests.helpers.paths import ROOT


def small(folder: Path, **changes: object) -> dict[str, object]:
    """A run of seconds."""
    data = {
        "run": {"dir": str(folder / "run")},
        "parallel": {"dp": 2},
        "model": {
            "architecture": {
                "vocab_size": 32,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "head_dim": 16,
                "max_position_embeddings": 64,
            }
        },
        "rollout": {"prompts_per_step": 4, "group_size": 2, "max_response_tokens": 12},
        "train": {"steps": 3, "optimizer": {"lr": 1e-3}},
        "sft": {"steps": 3, "batch_size": 8, "cache_dir": str(folder / "cache")},
        "eval": {"num_prompts": 8},
        "checkpoint": {"every": 2},
        # After so little warm start hardly an answer is right, so few advantages differ from 0: this is what moves the weights.
        "objective": {"entropy_bonus": 0.1},
    }
    return data | changes


SMALL = {"sft": {"steps": 0}}


def write(folder: Path, **changes: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(small(folder, **changes)))
    return path


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ais_megatron", *map(str, arguments)]


def run(*arguments: object, status: int = 0) -> str:
    done = subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def rows_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def samples_of(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]


def assert_same_rows(ours: Path, theirs: Path) -> None:
    """Every figure that is not a time, equal to the last bit. (An evaluation stands only in a run's last row.)"""
    assert any(row["grad_norm"] > 0.0 for row in rows_of(theirs)), "a run that learns nothing proves nothing"
    timed = ("time/", "eval/", "idle/")
    for mine, other in zip(rows_of(ours), rows_of(theirs), strict=False):
        same = {key for key in other if not key.startswith(timed) and key not in ("tokens_per_second", "held_out_accuracy")}
        assert {key: mine[key] for key in same} == {key: other[key] for key in same}


def trained(rank: int, config: Config) -> Path:
    """`train` on the ranks of a pool; returns the run folder.

    It draws no report, because that takes longer than such a run. The runs that `run` starts draw theirs.
    """
    from ais_megatron import trainer

    original = trainer.write_report
    trainer.write_report = lambda run_dir: run_dir / "report" / "index.html"
    try:
        return trainer.train(config)
    finally:
        trainer.write_report = original


def refusal(rank: int, config: Config, poison: str | None = None) -> str:
    """What `train` raises on this rank; with `poison`, rank 1's engine misbehaves."""
    from ais_megatron.batch import Rollout
    from ais_megatron.rollout import build

    class Poisoned(build.LocalEngine):
        def generate(self, prompts, sampling):  # noqa: ANN001, ANN202
            first, *others = super().generate(prompts, sampling)
            if rank == 1 and poison == "nan":
                first = Rollout(first.prompt, first.token_ids, (float("nan"),) * len(first.token_ids), "stop", 0)
            if rank == 1 and poison == "empty":
                first = Rollout(first.prompt, (), (), "stop", 0)
            return [first, *others]

    original = build.LocalEngine
    build.LocalEngine = Poisoned
    try:
        trained(rank, config)
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        build.LocalEngine = original
    return "finished"
