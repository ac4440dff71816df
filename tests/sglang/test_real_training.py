"""configs/tiny_countdown_sglang.yaml as a user runs it, with a server that is killed on the way; then on servers that run already."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
import pytest

from ais_megatron.cluster.ports import free_port
from ais_megatron.config import Config, load_config
from tests.helpers.paths import ROOT
from tests.helpers.ranks import RankPool
from tests.helpers.runs import trained
from tests.helpers.sglang import SGLANG_PYTHON, RunningServer

pytestmark = pytest.mark.sglang

CONFIG = ROOT / "configs" / "tiny_countdown_sglang.yaml"
RESPONSES = 16 * 8
Servers = Callable[[str, str], RunningServer]

COMMON = ["sft.steps=60", "eval.num_prompts=32", "ais.coefficient=product"]  # whose alpha follows D, which is what is compared
SHORT = "sft.steps=20"  # where nothing is said about what was learnt


def rows_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def on_running(server: RunningServer, folder: Path, *overrides: str) -> Config:
    """The same run of a server's own model on this server, which somebody else has started: a start takes longer than the run."""
    common = [f"run.dir={folder}", f"sft.cache_dir={folder.parent / 'cache'}", *COMMON, f"rollout.sglang.servers=['{server.url}']"]
    architecture = server.architecture.model_dump_json(exclude_none=True)
    ours = [f"model.architecture={architecture}", f"rollout.sglang.key_file={server.config.rollout.sglang.key_file}"]
    return load_config(CONFIG, [*common, SHORT, *ours, *overrides])


class Run:
    """`ais-megatron train CONFIG` in a process of its own, which starts its own server."""

    def __init__(self, folder: Path, cache: Path, *overrides: str) -> None:
        self.folder = folder
        common = [f"run.dir={folder}", f"sft.cache_dir={cache}", f"rollout.sglang.port={free_port()}", *COMMON]
        command = [
            sys.executable,
            "-m",
            "ais_megatron",
            "train",
            str(CONFIG),
            f"rollout.sglang.python={SGLANG_PYTHON}",
            *common,
            *overrides,
        ]
        self.log = folder.parent / f"{folder.name}.log"
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=self.log.open("a"), stderr=subprocess.STDOUT)

    def rows(self) -> list[dict[str, Any]]:
        return rows_of(self.folder)

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 1200
        while len(self.rows()) < step:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def kill_server(self) -> None:
        """kill -9 of a process that holds the model; SGLang's other processes then end too."""
        scheduler, *_ = [p for p in psutil.Process(self.process.pid).children(recursive=True) if "scheduler" in " ".join(p.cmdline())]
        os.kill(scheduler.pid, signal.SIGKILL)

    def finish(self, status: int = 0) -> str:
        assert self.process.wait(timeout=1200) == status, self.log.read_text()[-3000:]
        return self.log.read_text()


def test_twenty_steps_with_a_server_killed_on_the_way(ranks: RankPool, tmp_path: Path) -> None:
    run = Run(tmp_path / "sglang", tmp_path / "cache")
    run.wait_for_step(8)
    time.sleep(0.5)  # within step 9, most of which is generation
    run.kill_server()
    log = run.finish()
    assert "restart 1 of 3" in log
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert all(row["num_responses"] == RESPONSES and row["dropped_fraction"] == 0 for row in rows), "every prompt is answered once"
    assert all(row["staleness"] == 0 for row in rows)

    local = tmp_path / "local"
    same = [f"run.dir={local}", f"sft.cache_dir={tmp_path / 'cache'}", *COMMON]
    ranks.run(1, trained, config=load_config(CONFIG, [*same, "rollout.engine=local"]))
    for name, tolerance in (("alpha", 0.25), ("weight_reliability", 0.01), ("divergence_severity", 2e-3), ("accuracy", 0.15)):
        ours, theirs = (mean(row[name] for row in some) for some in (rows, rows_of(local)))
        print(f"{name}: SGLang {ours:.4g}, local engine {theirs:.4g}")
        assert abs(ours - theirs) < tolerance, name
    assert 0.05 < mean(row["alpha"] for row in rows) < 0.99 and 2e-4 < mean(row["divergence_severity"] for row in rows) < 5e-3


def test_only_the_factors_of_lora_travel(tmp_path: Path) -> None:
    """The run itself stops if the server with its adapter differs from the policy by more than 0.3 nats per token at any sync. D, over all
    tokens of a step, is that of FP8. After a restart the server gets the frozen weights again, and the adapter. Its two ranks share the
    layers, whose halves are blocks of 64."""
    lora = ["policy.lora.rank=8", "rollout.lora_sync=adapter", "train.optimizer.lr=1e-2", "rollout.sglang.verify_tolerance=0.3"]
    run = Run(tmp_path / "adapter", tmp_path / "cache", SHORT, *lora, "train.steps=5", "rollout.sglang.tp=2", "rollout.weight_block=64")
    run.wait_for_step(2)
    run.kill_server()
    assert "restart 1 of 3" in run.finish()
    rows = run.rows()
    assert [(row["step"], row["num_responses"], row["staleness"]) for row in rows] == [(step, RESPONSES, 0) for step in range(1, 6)]
    assert all(0 < row["divergence_severity"] < 5e-3 for row in rows)


def test_without_servers_the_run_is_saved_and_can_go_on(sglang_server: Servers, ranks: RankPool, tmp_path: Path) -> None:
    """It goes on with a server that somebody else has started."""
    other = sglang_server("dense", "fp8")
    limits = ["train.steps=6", "rollout.sglang.recovery_timeout_s=5"]
    architecture = f"model.architecture={other.architecture.model_dump_json(exclude_none=True)}"
    run = Run(tmp_path / "run", tmp_path / "cache", architecture, SHORT, *limits, "rollout.sglang.max_restarts=0")
    run.wait_for_step(2)
    run.kill_server()
    log = run.finish(status=2)
    assert "recovery_timeout_s" in log and "continue it with run.resume=true" in log
    done = len(run.rows())
    assert 2 <= done < 6
    ranks.run(1, trained, config=on_running(other, run.folder, *limits, "run.resume=true"))
    assert [row["step"] for row in run.rows()] == list(range(1, 7))


@pytest.mark.parametrize(("ahead", "objective"), [(1, "grpo"), (2, "dapo")])
def test_batches_ahead_of_a_pipeline(sglang_server: Servers, ranks: RankPool, tmp_path: Path, ahead: int, objective: str) -> None:
    """Two ranks, two pipeline stages: staleness is measured, and servers take updates while both ranks have requests there. With dynamic
    sampling a step may use prompts that were started for the next one."""
    folder, pipeline = tmp_path / "ahead", ["train.steps=5", f"rollout.ahead={ahead}", "parallel.pp=2"]
    dynamic = [f"objective.name={objective}", "objective.max_refills=1", f"rollout.max_staleness={ahead}"]
    ranks.run(2, trained, config=on_running(sglang_server("dense", "fp8"), folder, *pipeline, *dynamic))
    rows = rows_of(folder)
    staleness = [row["staleness"] for row in rows]
    assert len(rows) == 5 and staleness[0] == 0 and all(0.0 < value <= ahead for value in staleness[1:]), staleness
    assert all(row["num_responses"] == 8 * row["prompts_sampled"] and row["stale_fraction"] == row["dropped_fraction"] == 0 for row in rows)
    sampled = [row["prompts_sampled"] for row in rows]
    assert sampled == [16] * 5 if objective == "grpo" else max(sampled) > 16, sampled


def test_servers_and_trainer_take_turns(sglang_server: Servers, ranks: RankPool, tmp_path: Path) -> None:
    """A real server releases its memory and takes it back in every step and for every checkpoint, also after a resume. (On a CPU it frees
    nothing, but asserts that it is idle.) Every response is new, and the mismatch is that of FP8."""
    server, folder = sglang_server("dense", "fp8"), tmp_path / "turns"
    colocated = ["rollout.colocated=true", "rollout.sglang.max_restarts=0", "parallel.dp=2", "checkpoint.every=2"]

    def asked() -> list[int]:
        text = server.server.log_path.read_text()
        return [text.count(f'POST /{name}_memory_occupation HTTP/1.1" 200') for name in ("release", "resume")]

    before = asked()
    ranks.run(2, trained, config=on_running(server, folder, *colocated, "train.steps=5"))
    # Five steps, the checkpoints after steps 2 and 4, and the one after step 5, with which the run ends in the trainer's turn.
    assert [now - then for now, then in zip(asked(), before, strict=True)] == [8, 7]
    rows = rows_of(folder)
    assert [(row["step"], row["num_responses"], row["staleness"], row["dropped_fraction"]) for row in rows] == [
        (step, RESPONSES, 0, 0) for step in range(1, 6)
    ]
    assert all(0 < row["divergence_severity"] < 5e-3 for row in rows)
    ranks.run(2, trained, config=on_running(server, folder, *colocated, "train.steps=6", "run.resume=true"))
    assert [row["step"] for row in rows_of(folder)] == list(range(1, 7))


def test_experts_with_routing_replay(sglang_server: Servers, ranks: RankPool, tmp_path: Path) -> None:
    """Qwen3-MoE over two expert-parallel ranks, the trainer using the experts that SGLang chose."""
    replay = ["rollout.return_routed_experts=true", "moe.routing_replay=true", "parallel.ep=2", "parallel.dp=2"]
    config = on_running(sglang_server("moe", "fp8"), tmp_path / "moe", "train.steps=5", *replay)
    ranks.run(2, trained, config=config)
    rows = rows_of(tmp_path / "moe")
    assert len(rows) == 5 and all(row["num_responses"] == RESPONSES for row in rows)
    assert mean(row["divergence_severity"] for row in rows) < 5e-3


def test_layers_with_a_recurrent_state(sglang_server: Servers, ranks: RankPool, tmp_path: Path) -> None:
    """Qwen3.5 with LoRA, which is sent merged: what the server sampled is as far from the policy as FP8 makes it, with new weights too."""
    lora = ["policy.lora.rank=8", "train.optimizer.lr=1e-2", "train.optimizer.warmup_steps=1"]
    config = on_running(sglang_server("qwen3_5", "fp8"), tmp_path / "recurrent", "train.steps=3", *lora)
    ranks.run(1, trained, config=config)
    rows = rows_of(tmp_path / "recurrent")
    assert [(row["step"], row["num_responses"], row["staleness"]) for row in rows] == [(step, RESPONSES, 0) for step in (1, 2, 3)]
    print("D", [row["divergence_severity"] for row in rows])
    assert all(1e-5 < row["divergence_severity"] < 5e-3 for row in rows)
