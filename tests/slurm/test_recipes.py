"""launch/recipes.py with the real nemo-run, in an environment of its own, on this machine's pretended cluster."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.slurm.conftest import ENDED, SMALL, Slurm

REQUIREMENTS = ROOT / "launch" / "requirements.txt"


@pytest.fixture(scope="session")
def nemo_python() -> Path:
    """An interpreter with nemo-run; made once for each state of launch/requirements.txt."""
    folder = ROOT / ".cache" / f"nemo-{hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", REQUIREMENTS]
        done = subprocess.run(install, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr
        (folder / "ready").touch()
    return python


def launch(python: Path, folder: Path, *arguments: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
    env |= {
        "NEMORUN_HOME": str(folder / "nemo"),
        "PATH": f"{python.parent}:{os.environ['PATH']}",
        "COLUMNS": "1000",
        "OMP_NUM_THREADS": "1",
    }
    command = [python, "launch/recipes.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def tiny(folder: Path, *overrides: str) -> list[str]:
    """Arguments of a run of two steps whose folder is runs/`folder.name`… below `folder`."""
    (folder / "configs").symlink_to(ROOT / "configs")
    listed = ",".join(repr(item) for item in ("run.backend=cpu", *SMALL, "train.steps=2", *overrides))
    python = folder / "python"  # job.workdir is the test's folder, where the package is not
    python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return ["tiny", "-y", f"job.workdir={folder}", f"job.python={python}", f"job.overrides=[{listed}]"]


def test_tiny_on_slurm(nemo_python: Path, slurm: Slurm) -> None:
    arguments = [*tiny(slurm.folder), "--detach", "run.executor=slurm", "run.executor.account=acct"]
    launch(nemo_python, slurm.folder, *arguments)
    queued = subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True, text=True, timeout=240, check=True).stdout.split()
    slurm.jobs += queued
    slurm.until(lambda: ENDED.issuperset(slurm.states(queued[-1])), queued[-1], 120)
    output = "".join(path.read_text(errors="replace") for path in slurm.folder.glob("nemo/**/*.out"))
    assert slurm.states(queued[-1]) == ["COMPLETED"], output
    (run_dir,) = (slurm.folder / "runs").glob("tiny-*")
    assert (run_dir / "summary.json").is_file() and "step 2/2" in output


def test_tiny_here(nemo_python: Path, tmp_path: Path) -> None:
    assert "SUCCEEDED" in launch(nemo_python, tmp_path, *tiny(tmp_path), "run.executor=local")
    assert (tmp_path / "runs" / "tiny" / "summary.json").is_file()


def test_dry_runs_show_trainer_and_servers(nemo_python: Path, tmp_path: Path, cluster: None) -> None:
    dense = launch(nemo_python, tmp_path, "qwen3_8b_ais", "-y", "run.executor=slurm", "run.executor.account=acct", "--dryrun")
    assert "#SBATCH hetjob" in dense and "srun --het-group=1" in dense and "--signal=USR1@600" in dense
    moe = launch(nemo_python, tmp_path, "qwen3_30b_a3b_ais", "-y", "run.executor=slurm", "job.model=/models/x", "--dryrun")
    assert moe.count("#SBATCH --nodes=2") == 2 and "--ntasks-per-node=4" in moe
    compare = launch(nemo_python, tmp_path, "compare", "-y", "run.executor=slurm", "corrections=['ais']", "--dryrun")
    assert "tiny-bf16" in compare and "tiny-ais" in compare and "tiny-tis" not in compare
    scaling = launch(nemo_python, tmp_path, "scaling", "-y", "run.executor=slurm", "--dryrun")
    assert "scaling-01-strong-tp4-1+1" in scaling and "scaling-10-weak-tp4-4+4" in scaling
