"""configs/tiny_countdown_sglang.yaml as a user runs it, with a server that is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import psutil
import pytest

from ais_megatron.cluster.ports import free_port
from tests.helpers.paths import ROOT
from tests.helpers.sglang import SGLANG_PYTHON

pytestmark = pytest.mark.sglang

CONFIG = ROOT / "configs" / "tiny_countdown_sglang.yaml"
RESPONSES = 16 * 8


class Run:
    """`ais-megatron train CONFIG` in a process of its own."""

    def __init__(self, folder: Path, cache: Path, *overrides: str) -> None:
        self.folder = folder
        common = [
            f"run.dir={folder}",
            f"sft.cache_dir={cache}",
            "sft.steps=60",
            "eval.num_prompts=32",
            f"rollout.sglang.port={free_port()}",
        ]
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
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def wait_for_step(self, step: int) -> None:
        deadline = time.monotonic() + 1200
        while len(self.rows()) < step:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.05)

    def kill_server(self) -> None:
        """kill -9 of the process that holds the model; SGLang's other processes then end too."""
        (scheduler,) = [p for p in psutil.Process(self.process.pid).children(recursive=True) if "scheduler" in " ".join(p.cmdline())]
        os.kill(scheduler.pid, signal.SIGKILL)

    def finish(self, status: int = 0) -> str:
        assert self.process.wait(timeout=1200) == status, self.log.read_text()[-3000:]
        return self.log.read_text()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The warm start, made once for all runs."""
    return tmp_path_factory.mktemp("cache")


def test_twenty_steps_with_a_server_killed_on_the_way(tmp_path: Path, cache: Path) -> None:
    run = Run(tmp_path / "sglang", cache)
    run.wait_for_step(8)
    time.sleep(0.5)  # within step 9, most of which is generation
    run.kill_server()
    log = run.finish()
    assert "restart 1 of 3" in log
    rows = run.rows()
    assert [row["step"] for row in rows] == list(range(1, 21))
    assert all(row["num_responses"] == RESPONSES and row["dropped_fraction"] == 0 for row in rows), "every prompt is answered once"
    assert all(row["staleness"] == 0 for row in rows)

    local = Run(tmp_path / "local", cache, "rollout.engine=local")
    local.finish()
    for name, tolerance in (("alpha", 0.25), ("weight_reliability", 0.01), ("divergence_severity", 2e-3), ("accuracy", 0.15)):
        ours, theirs = (mean(row[name] for row in some) for some in (rows, local.rows()))
        print(f"{name}: SGLang {ours:.4g}, local engine {theirs:.4g}")
        assert abs(ours - theirs) < tolerance, name
    assert 0.05 < mean(row["alpha"] for row in rows) < 0.95 and 2e-4 < mean(row["divergence_severity"] for row in rows) < 5e-3


def test_without_servers_the_run_is_saved_and_can_go_on(tmp_path: Path, cache: Path) -> None:
    limits = ["train.steps=6", "rollout.sglang.max_restarts=0", "rollout.sglang.recovery_timeout_s=5"]
    run = Run(tmp_path / "run", cache, *limits)
    run.wait_for_step(2)
    run.kill_server()
    log = run.finish(status=2)
    assert "recovery_timeout_s" in log and "continue it with run.resume=true" in log
    done = len(run.rows())
    assert 2 <= done < 6
    Run(run.folder, cache, *limits, "run.resume=true").finish()
    assert [row["step"] for row in run.rows()] == list(range(1, 7))


def test_one_batch_ahead_of_a_pipeline(tmp_path: Path, cache: Path) -> None:
    """Two ranks, two pipeline stages: staleness is measured, and servers take updates while both ranks have requests there."""
    run = Run(tmp_path / "ahead", cache, "train.steps=6", "rollout.ahead=1", "parallel.pp=2")
    run.finish()
    staleness = [row["staleness"] for row in run.rows()]
    assert staleness[0] == 0 and all(0.0 < value <= 1.0 for value in staleness[1:]), staleness
    assert all(row["num_responses"] == RESPONSES for row in run.rows())


def test_experts_with_routing_replay(tmp_path: Path, cache: Path) -> None:
    """Qwen3-MoE over two expert-parallel ranks, the trainer using the experts that SGLang chose."""
    moe = "{model_type: qwen3_moe, num_experts: 4, num_experts_per_tok: 2, moe_intermediate_size: 128}"
    replay = ["rollout.return_routed_experts=true", "moe.routing_replay=true"]
    run = Run(
        tmp_path / "moe", cache, "train.steps=5", f"model.architecture={moe}", *replay, "parallel.ep=2", "parallel.dp=2", "sft.steps=20"
    )
    run.finish()
    rows = run.rows()
    assert len(rows) == 5 and all(row["num_responses"] == RESPONSES for row in rows)
    assert mean(row["divergence_severity"] for row in rows) < 5e-3
