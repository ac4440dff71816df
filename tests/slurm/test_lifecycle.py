"""How a job begins and ends, whatever happens to it: real Slurm and srun, with parts that only pretend to work."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from tests.slurm.conftest import Slurm, fake_model

SERVERS = {"AIS_TRAINER_NODES": 2, "AIS_ROLLOUT_NODES": 2}
WITH_SERVERS = ("rollout.engine=sglang", "rollout.sglang.device=cpu", "rollout.quantization=none")
FOUR_NODES = ("--nodes=4",)


def notes(slurm: Slurm, job: str) -> list[str]:
    path = slurm.run_dir(job) / "notes"
    return path.read_text().splitlines() if path.exists() else []


def wait_until_training(slurm: Slurm, job: str, ranks: int = 2) -> None:
    slurm.until(lambda: bool(list(slurm.folder.glob(f"runs/*-{job}"))) and notes(slurm, job).count("ready") >= ranks, job)


def test_ranks_and_servers_find_each_other(stand_in: Slurm) -> None:
    job = stand_in.submit("tiny.sbatch", *WITH_SERVERS, "rollout.sglang.port=30100", options=FOUR_NODES, **SERVERS)
    wait_until_training(stand_in, job)
    stand_in.until(lambda: sum(line.startswith("serve ") for line in notes(stand_in, job)) >= 2, job)
    written = notes(stand_in, job)
    subprocess.run(["scancel", job], check=True)
    output = stand_in.wait(job, "CANCELLED")
    trainers = [line for line in written if line.startswith("train ")]
    assert sorted(line.split()[1:4] for line in trainers) == [["node1", "-", "0/2"], ["node2", "-", "1/2"]]
    addresses = ("master=node1 ", " rollout.sglang.servers=[http://node3:30100,http://node4:30100] ")
    assert all(address in line for address in addresses for line in trainers)
    servers = [line for line in written if line.startswith("serve ")]
    assert sorted(line.split()[1] for line in servers) == ["node3", "node4"]
    run_dir = stand_in.run_dir(job)
    key = run_dir / "key"
    assert key.stat().st_mode & 0o777 == 0o600 and len(key.read_text()) == 64
    assert all(f"rollout.sglang.key_file={key}" in line for line in trainers + servers)
    assert key.read_text() not in output + stand_in.logs()
    assert {path.name for path in (run_dir / "logs").iterdir()} >= {"trainer-0.log", "trainer-1.log", "server-node3-30100.log"}


def test_one_failing_part_ends_all(stand_in: Slurm) -> None:
    started = time.monotonic()
    job = stand_in.submit("tiny.sbatch", *WITH_SERVERS, options=FOUR_NODES, STAND_IN_SERVE="fail", **SERVERS)
    output = stand_in.wait(job, "FAILED")
    assert "ended with status 7; ending everything else" in output and "server node" in output
    assert (stand_in.run_dir(job) / "exit_status").read_text() == "7\n"
    assert time.monotonic() - started < 300, "the other parts would have lasted 600 s"


def test_signal_saves_requeues_and_continues(stand_in: Slurm) -> None:
    job = stand_in.submit("tiny.sbatch", *WITH_SERVERS, options=FOUR_NODES, **SERVERS)
    wait_until_training(stand_in, job)
    key = (stand_in.run_dir(job) / "key").read_text()
    subprocess.run(["scancel", "--signal=USR1", "--batch", job], check=True)
    output = stand_in.wait(job)
    written = notes(stand_in, job)
    assert {"saved 0", "saved 1"} <= set(written)
    assert sum("resumed=True" in line and line.startswith("train") for line in written) == 2, "both ranks came back to the same folder"
    assert (stand_in.run_dir(job) / "key").read_text() == key
    assert "signal USR1" in output and "requeueing" in output and "finished" in output and "before it could save" not in output


def test_preemption_lets_the_ranks_save_and_requeues(stand_in: Slurm) -> None:
    """Slurm ends the servers at once, with the same signal that the ranks get, and tells the batch script nothing."""
    low = stand_in.submit("tiny.sbatch", *WITH_SERVERS, options=("--partition=preempt", "--exclusive", *FOUR_NODES), **SERVERS)
    wait_until_training(stand_in, low)
    stand_in.submit("tiny.sbatch", options=("--exclusive", *FOUR_NODES), AIS_DRY_RUN=1)
    output = stand_in.wait(low)
    written = notes(stand_in, low)
    assert {"saved 0", "saved 1"} <= set(written) and sum("resumed=True" in line and line.startswith("train") for line in written) == 2
    assert "requeueing" in output


def test_cancelling_does_not_requeue(stand_in: Slurm) -> None:
    job = stand_in.submit("tiny.sbatch")
    wait_until_training(stand_in, job)
    subprocess.run(["scancel", job], check=True)
    stand_in.wait(job, "CANCELLED")
    time.sleep(3)
    assert stand_in.states(job) == ["CANCELLED"] and not any("resumed=True" in line for line in notes(stand_in, job))


def test_heterogeneous_job(stand_in: Slurm, tmp_path: Path) -> None:
    model = fake_model(tmp_path)
    job = stand_in.submit("qwen3_8b_ais_het.sbatch", AIS_MODEL=model, STAND_IN_TRAIN="finish")
    output = stand_in.wait(job)
    written = notes(stand_in, job)
    (trainer,) = {line.split()[1] for line in written if line.startswith("train ")}
    (server,) = {line.split()[1] for line in written if line.startswith("serve ")} or {None}
    assert trainer != server and sum(line.startswith("train ") for line in written) == 8, output
