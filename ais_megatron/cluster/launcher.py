"""Starts the local ranks of a job if no launcher has started them.

Every rank is a process in its own process session, with the variables that torchrun would set. This process hosts the rendezvous
store on the loopback interface, so the ranks may start in any order. Signals are passed on to the ranks, which decide when to
stop. torch's elastic agent would kill them 30 seconds after a SIGTERM, and a step of a large model takes longer than that. If a
rank fails, the others usually fail with it. They get a few seconds to print their errors and are then killed.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import IO

from ais_megatron.cluster.exits import EXIT_REQUEUE, INTERRUPTED

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
GRACE_SECONDS = 10.0  # for the other ranks to end by themselves after the first one has failed, or after an interrupt
POLL_SECONDS = 0.05


def is_launched() -> bool:
    """Whether torchrun or srun started this process as one rank of a job."""
    if "RANK" in os.environ:
        return True
    return int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ


def ranks_here() -> int:
    """Number of ranks on this node, of the job that torchrun or srun started."""
    if "LOCAL_WORLD_SIZE" in os.environ:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    per_node = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE") or os.environ.get("SLURM_TASKS_PER_NODE", ""))  # "8(x2)"
    return int(per_node.group()) if per_node else 1


def run_ranks(num_ranks: int, arguments: list[str], log: IO[bytes] | None = None) -> int:
    """Run ``python -m ais_megatron ARGUMENTS`` as `num_ranks` local ranks and return the job's exit status (`exits`).

    log: file for their output; None: the output of this process.
    """
    received: list[int] = []
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: object) -> None:
        received.append(number)
        _send(ranks, number)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for number in range(num_ranks):
            environment = _environment(number, num_ranks, store.port)
            command = [sys.executable, "-m", "ais_megatron", *arguments]
            ranks.append(subprocess.Popen(command, env=environment, start_new_session=True, stdout=log, stderr=log))
        if received:  # the signal arrived before the ranks were started
            _send(ranks, received[-1])
        return _status(_wait(ranks, received), received)
    finally:
        _send(ranks, signal.SIGKILL)
        for number, handler in before.items():
            signal.signal(number, handler)


def _environment(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    threads = max(1, (os.cpu_count() or 1) // num_ranks)
    ours = {
        **{name: str(rank) for name in ("RANK", "LOCAL_RANK")},
        **{name: str(num_ranks) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")},
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # tells torch that the launcher, not rank 0, hosts the store at that port
    }
    return {"OMP_NUM_THREADS": str(threads), **os.environ, **ours}


def _wait(ranks: Sequence[subprocess.Popen[bytes]], received: list[int]) -> int:
    """Wait until all ranks have ended. Returns the return code of the first rank that failed, or 0."""
    first_failure, deadline = 0, float("inf")
    while True:
        codes = [process.poll() for process in ranks]
        failed = sorted(code for code in codes if code)  # negative first: a killed rank is the cause, and the other ranks' errors follow
        if not first_failure and failed:
            first_failure, deadline = failed[0], time.monotonic() + GRACE_SECONDS
            if first_failure < 0 and not received:
                print(
                    f"error: rank {codes.index(first_failure)} was killed by {signal.Signals(-first_failure).name}"
                    f"{' (out of memory?)' if first_failure == -signal.SIGKILL else ''}; ending the other ranks",
                    file=sys.stderr,
                    flush=True,
                )
        if signal.SIGINT in received:
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if None not in codes:
            return first_failure
        if time.monotonic() > deadline:
            _send(ranks, signal.SIGKILL)
            for process in ranks:
                process.wait()
            return first_failure
        time.sleep(POLL_SECONDS)


def _status(code: int, received: list[int]) -> int:
    """The job's exit status, from the return code of the first rank that failed and the signals that were passed on."""
    if signal.SIGINT in received:
        return INTERRUPTED
    if code < 0 and -code in received:  # the signal came before the rank handled it, so there was nothing to save
        return EXIT_REQUEUE
    return code if code >= 0 else 128 - code


def _send(ranks: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    """Send a signal to every running rank and to the processes that it has started."""
    for process in ranks:
        if process.poll() is None:
            os.killpg(process.pid, number)
