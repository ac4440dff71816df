"""What ends a run before its time: signals, a killed rank, a rank that hangs, an update that is not finite. With real processes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from ais_megatron.config import build_config, load_config
from tests.helpers.paths import ROOT
from tests.helpers.policies import make_batch, make_config, make_policy, my_rows, weights_of
from tests.helpers.ranks import RankPool
from tests.helpers.runs import SMALL, assert_same_rows, command, rows_of, small, trained, write

pytestmark = pytest.mark.slow  # whole runs that are killed and go on


def started(folder: Path, *overrides: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A run that has just logged its second step, and its ranks in order."""
    arguments = command("train", write(folder, **SMALL), "train.steps=100000", *overrides)
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while not (line := process.stdout.readline()).startswith("step      2/"):
        assert line or process.poll() is None
    children = psutil.Process(process.pid).children()
    by_rank = sorted((c for c in children if "RANK" in c.environ()), key=lambda c: int(c.environ()["RANK"]))
    return process, by_rank


@pytest.mark.parametrize(("number", "to"), [(signal.SIGTERM, "launcher"), (signal.SIGUSR1, "rank 1")])
def test_a_signal_saves_and_the_run_goes_on(ranks: RankPool, tmp_path: Path, number: signal.Signals, to: str) -> None:
    """The step in progress is finished and saved, on all ranks though only one may know; status 75; then the same rows as ever."""
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    stopped.mkdir()
    process, by_rank = started(stopped, "checkpoint.every=0", "checkpoint.async_save=true")
    (process if to == "launcher" else by_rank[1]).send_signal(number)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 75, output + errors
    rows = rows_of(stopped)
    saved = [path.name for path in (stopped / "run" / "checkpoints").iterdir()]
    assert saved == [f"step_{len(rows):06d}"] and not any(rank.is_running() for rank in by_rank)
    assert f"{number.name} after step {len(rows)}, which is saved; exit status 75; continue with run.resume=true" in output
    if to == "launcher":
        steps = len(rows) + 1
        ranks.run(2, trained, config=load_config(stopped / "config.yaml", ["run.resume=true", f"train.steps={steps}"]))
        data = small(whole, **SMALL)
        data["train"] |= {"steps": steps}
        whole.mkdir()
        ranks.run(2, trained, config=build_config(data))
        assert len(rows_of(stopped)) == steps
        assert_same_rows(stopped, whole)


def test_a_killed_rank_ends_the_others_and_a_torn_row_is_written_again(ranks: RankPool, tmp_path: Path) -> None:
    process, by_rank = started(tmp_path, "checkpoint.every=1")
    before = time.monotonic()
    by_rank[1].kill()
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGKILL, output + errors
    assert "rank 1 was killed by SIGKILL (out of memory?); ending the other ranks" in errors
    assert time.monotonic() - before < 30 and not any(rank.is_running() for rank in by_rank)
    metrics = tmp_path / "run" / "metrics.jsonl"
    whole_lines = metrics.read_text().splitlines()
    metrics.write_text("\n".join(whole_lines) + '\n{"step": 9999, "al')  # as a crash of the machine leaves it
    steps = len(whole_lines) + 1
    ranks.run(2, trained, config=load_config(tmp_path / "config.yaml", ["run.resume=true", f"train.steps={steps}"]))
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(1, steps + 1))


WATCHED = """
import sys, threading, time
from pathlib import Path
from ais_megatron.cluster.watchdog import Watchdog

def stuck_in_a_collective():
    threading.Event().wait()

with Watchdog(0.01, Path(sys.argv[1]), rank=3) as watchdog:
    for _ in range(5):  # together longer than the limit
        time.sleep(0.2)
        watchdog.beat()
    print("alive", flush=True)
    if sys.argv[2] == "hang":
        stuck_in_a_collective()
time.sleep(1.5)
"""


def test_a_rank_that_hangs_ends_with_its_stacks(tmp_path: Path) -> None:
    watched = [sys.executable, "-c", WATCHED, str(tmp_path)]
    hung = subprocess.run([*watched, "hang"], cwd=ROOT, capture_output=True, text=True, timeout=360, check=False)
    assert hung.returncode == 124 and hung.stdout == "alive\n"
    stacks = (tmp_path / "logs" / "rank_3.stacks").read_text()
    assert "in stuck_in_a_collective" in stacks and "in stuck_in_a_collective" in hung.stderr
    assert "rank 3 made no progress for 0.01 minutes (run.watchdog_minutes)" in hung.stderr
    ended = subprocess.run([*watched, "end"], cwd=ROOT, capture_output=True, text=True, timeout=360, check=False)
    assert ended.returncode == 0 and not (tmp_path / "logs" / "rank_3.stacks").exists(), ended.stderr


def poisoned(rank: int, path: Path, updates: int = 1, **layout):  # noqa: ANN201
    """A good update, bad ones until the limit of 3, of which a good one in between starts the count again."""
    import torch.distributed as dist

    from ais_megatron.algorithm.scaler import LossScaler
    from ais_megatron.policy.parallel import data_parallel_group

    policy = make_policy(make_config(path, train={"max_skipped_updates": 3}, **layout), path)
    rows, _ = my_rows(make_batch())
    advantages = rows.advantages.clone()
    if dist.get_rank(data_parallel_group()) == 0:  # one replica alone
        advantages[0] = float("inf")
    bad = type(rows)(**{**vars(rows), "advantages": advantages})
    scaler, history, error = LossScaler(alpha=0.0), [], ""
    try:
        for batch in (rows, bad, bad, rows, bad, bad, bad, rows):
            before = weights_of(policy)
            metrics = policy.train_step(batch, policy.logprobs(batch), scaler)
            after = weights_of(policy)
            history.append((metrics["skipped_updates"], all(torch.equal(after[name], before[name]) for name in before)))
    except RuntimeError as caught:
        error = str(caught)
    return history, error, all(torch.equal(tensor, before[name]) for name, tensor in weights_of(policy).items())


@pytest.mark.parametrize(("world", "layout"), [(2, {}), (2, {"tp": 2}), (2, {"pp": 2})])
def test_an_update_that_is_not_finite_is_skipped_by_all(ranks: RankPool, untied_checkpoint: Path, world: int, layout: dict) -> None:
    for history, error, unchanged in ranks.run(world, poisoned, path=untied_checkpoint, **layout):
        assert history == [(0, False), (1, True), (1, True), (0, False), (1, True), (1, True)]
        assert "3 updates in a row had a loss or gradient that is not finite" in error and "train.max_skipped_updates=3" in error
        assert unchanged
