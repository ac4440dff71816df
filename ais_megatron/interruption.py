"""Handles SIGTERM and SIGUSR1 (Slurm's --signal, preemption): finish the step, save, and exit with a status that means "start again".

A handler only records the signal, and the loop checks it between two steps. Ranks may get a signal at different times or not at all. So
they agree with one all-reduce of two numbers per step. It also tells whether all ranks have written an asynchronous save. (A job with
one rank needs no all-reduce.)
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
    """Record `SIGNALS` from now on, and forget earlier ones. Must be called in the main thread."""
    _received.clear()
    for number in SIGNALS:
        signal.signal(number, lambda received, _: _received.append(received))


def stop_if_asked(saver: Saver, state: TrainingState) -> None:
    """Between two steps, complete a save that all ranks have written. If any rank got a signal, save and stop. Collective.

    Raises:
        Preempted: a checkpoint of `state` is complete. All ranks raise it together.
    """
    signal_number, busy = _agree(max(_received, default=0), int(saver.busy))
    if not signal_number:
        if not busy:
            saver.finish()
        return
    name = signal.Signals(signal_number).name
    saver.save_now(state)
    raise Preempted(f"{name} after step {state.step}, which is saved; exit status {EXIT_REQUEUE}; continue with run.resume=true")


def _agree(*mine: int) -> list[int]:
    """The maximum of each number over all ranks."""
    if dist.get_world_size() == 1:
        return list(mine)
    numbers = torch.tensor(mine, device=device())
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    return numbers.tolist()
