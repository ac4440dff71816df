"""SIGTERM and SIGUSR1: finish the step, save, leave with a status that says "start me again" (Slurm's --signal, preemption).

A handler only takes a note; the loop asks between two steps. Ranks get a signal at different times or not at all, so they
agree through one all-reduce of two numbers per step, which also carries whether an asynchronous save has been written
everywhere (a job of one rank needs none).
"""

from __future__ import annotations

import signal

import torch
import torch.distributed as dist

from ais_megatron.cluster.exits import EXIT_REQUEUE, Preempted
from ais_megatron.distributed import device
from ais_megatron.policy.saver import Saver
from ais_megatron.policy.training_state import TrainingState

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_received: list[int] = []


def listen() -> None:
    """Take note of `SIGNALS` from now on; to be called in the main thread. What was noted before is forgotten."""
    _received.clear()
    for number in SIGNALS:
        signal.signal(number, lambda received, _: _received.append(received))


def stop_if_asked(saver: Saver, state: TrainingState) -> None:
    """Between two steps: complete a save that is written on all ranks; save and stop if any rank was asked to. Collective.

    Raises:
        Preempted: on all ranks together, when a checkpoint of `state` is complete.
    """
    signal_number, busy = _agree(max(_received, default=0), int(saver.busy))
    if not signal_number:
        if not busy:
            saver.finish()
        return
    name = signal.Signals(signal_number).name
    saver.save_now(state)
    raise Preempted(f"{name} after step {state.step}, which is saved; status {EXIT_REQUEUE}: continue with run.resume=true")


def _agree(*mine: int) -> list[int]:
    """The largest over all ranks of each number."""
    if dist.get_world_size() == 1:
        return list(mine)
    numbers = torch.tensor(mine, device=device())
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers.tolist()
