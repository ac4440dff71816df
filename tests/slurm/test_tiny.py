"""Real training on the pretended cluster: two nodes over gloo, a requeue in the middle, and a scaling experiment."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers.paths import ROOT
from tests.slurm.conftest import SMALL, Slurm

TIMES = ("time/", "idle/", "tokens_per_second")  # differ from run to run


def rows(run_dir: Path) -> list[dict[str, object]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(TIMES)} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run folder and output of ``sbatch slurm/tiny.sbatch``."""
    slurm = Slurm(tmp_path_factory.mktemp("uninterrupted"))
    job = slurm.submit("tiny.sbatch", *SMALL, "train.steps=60")
    return slurm.run_dir(job) if (output := slurm.wait(job)) else Path(), output


def test_tiny_trains_on_two_nodes(uninterrupted: tuple[Path, str]) -> None:
    run_dir, output = uninterrupted
    assert len(rows(run_dir)) == 60 and (run_dir / "summary.json").is_file() and (run_dir / "report" / "index.html").is_file()
    assert (run_dir / "layout.tsv").read_text() == "trainer\tnode1\t1\ntrainer\tnode2\t1\n"
    assert "step 60/60" in (run_dir / "logs" / "trainer-0.log").read_text() and (run_dir / "logs" / "trainer-1.log").exists()
    assert (run_dir / "exit_status").read_text() == "0\n" and f"finished: {run_dir}" in output


def test_a_signal_and_a_requeue_change_nothing(uninterrupted: tuple[Path, str], slurm: Slurm) -> None:
    job = slurm.submit("tiny.sbatch", *SMALL, "train.steps=60", "metrics.wandb=offline")
    slurm.until(lambda: bool(list(slurm.folder.glob("runs/*"))) and len(rows(slurm.run_dir(job))) >= 5, job)
    subprocess.run(["scancel", "--signal=USR1", "--batch", job], check=True)
    output = slurm.wait(job)
    assert "requeueing" in output and "before it could save" not in output, output
    log = (slurm.run_dir(job) / "logs" / "trainer-0.log").read_text()
    assert log.count("held-out pass@1 at the start: ") == 2, "it started twice"
    assert rows(slurm.run_dir(job)) == rows(uninterrupted[0]), "to the last bit"
    name = (slurm.run_dir(job) / "wandb_id").read_text().strip()
    starts = [path.name for path in (slurm.run_dir(job) / "wandb").glob("offline-run-*")]
    assert len(starts) == 2 and all(start.endswith(f"-{name}") for start in starts), "two starts of one Weights & Biases run"


def test_a_scaling_array_becomes_a_report(slurm: Slurm) -> None:
    grid = slurm.folder / "grid.tsv"
    grid.write_text("strong\tdp1\t1\t0\tparallel.dp=1\nstrong\tdp2\t2\t0\tparallel.dp=2\nweak\ttp3\t1\t0\tparallel.dp=1 parallel.tp=3\n")
    parent = slurm.folder / "runs" / "scaling"
    env = slurm.environment | {
        **{"AIS_GRID": str(grid), "AIS_PARENT": str(parent), "AIS_GPUS_PER_NODE": "0", "AIS_CONFIG": "configs/tiny_countdown.yaml"}
    }
    command = ["slurm/scaling.sh", f"--output={slurm.folder}/%A_%a.out", *SMALL, "train.steps=3"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    words = [line.split() for line in done.stdout.splitlines()]
    slurm.jobs += [w[-1] for w in words[:2]] + [words[2][2].rstrip(",")]
    slurm.wait(slurm.jobs[0], "COMPLETED", "FAILED")
    slurm.wait(slurm.jobs[1])
    slurm.wait(slurm.jobs[2])
    report = (parent / "scaling.md").read_text()
    assert "2 of 3 tasks finished" in report and "03-weak-tp3: missing" in report or "03-weak-tp3: failed" in report, report
    assert (parent / "scaling.png").is_file() and report.count("100%") >= 1


def test_an_array_task_gives_surplus_nodes_back(stand_in: Slurm) -> None:
    (grid := stand_in.folder / "grid.tsv").write_text("strong\tdp1\t1\t0\tparallel.dp=1\n")
    environment = {"AIS_GRID": grid, "AIS_GPUS_PER_NODE": 0, "AIS_CONFIG": "configs/tiny_countdown.yaml", "STAND_IN_TRAIN": "finish"}
    job = stand_in.submit("scaling.sbatch", *SMALL, options=("--array=1-2", "--nodes=3"), **environment)
    output = stand_in.wait(job, "COMPLETED", "FAILED")
    assert (
        "task 1 needs 1 of 3 nodes" in output
        and "array task 2: " in output
        and "has only 1 lines; submit with sbatch --array=1-1" in output
    )
    assert [path.name for path in (stand_in.folder / "runs").glob("scaling-*/0*")] == ["01-strong-dp1"]


def test_a_comparison_array_becomes_a_table(slurm: Slurm) -> None:
    """Two arms, one of which fails in its own job; afterwards the command finds both, and a second array nothing to do."""
    overrides = dict(item.split("=", 1) for item in SMALL) | {"train.steps": "2"}
    comparison = {
        "base": str(ROOT / "configs" / "tiny_countdown.yaml"),
        "dir": str(slurm.folder / "out"),
        "seeds": [5],
        "overrides": {key: yaml.safe_load(value) for key, value in overrides.items()},
        "arms": {"ais": {"parallel.dp": 1}, "broken": {"parallel.dp": 1, "task.train_path": str(slurm.folder / "none.jsonl")}},
    }
    (slurm.folder / "none.jsonl").write_text("no JSON\n")  # (a file that is not there would end the job before its parts start)
    (path := slurm.folder / "compare.yaml").write_text(yaml.safe_dump(comparison))
    environment = {"AIS_COMPARISON": path, "AIS_GPUS_PER_NODE": 0}
    slurm.wait(slurm.submit("compare.sbatch", options=("--array=1-2",), **environment), "COMPLETED", "FAILED")
    command = [sys.executable, "-m", "ais_megatron", "compare", str(path), "--report"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=360, check=False)
    assert done.returncode == 1 and "1 of 2 runs finished" in done.stdout, done.stdout + done.stderr
    assert "countdown/broken/5: crashed (status 2 after 0 steps): error: " in done.stdout and "none.jsonl" in done.stdout
    again = slurm.submit("compare.sbatch", options=("--array=1",), AIS_ONLY="ais", **environment)
    assert "finished already" in slurm.wait(again)
