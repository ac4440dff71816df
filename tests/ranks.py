"""A pool of real processes over gloo, shared by all distributed tests: importing Megatron-Core takes seconds.

`RankPool.run(num_ranks, function, **arguments)` runs a module-level function as ``function(rank, **arguments)`` on the
first `num_ranks` processes, each time in a fresh process group of just those, and returns their results in rank order.
An exception on a rank comes back as `RankError` with that rank's traceback; so does a rank that does not answer in time.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from ais_megatron.ports import free_port

# gloo's threads outlive their groups, about 50 for each set that Megatron makes: fresh processes now and then keep them few.
RUNS_PER_PROCESS = 16


class RankError(AssertionError):
    """A rank failed; the message is its traceback."""


class RankPool:
    """prepare: called in each process as it starts. backend: of the process groups."""

    def __init__(self, size: int, prepare: Callable[[], None] | None = None, backend: str = "gloo") -> None:
        self.size, self._prepare, self._backend = size, prepare, backend
        self._start()

    def _start(self) -> None:
        self._runs = 0
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes = []
        for number in range(self.size):
            ours, theirs = context.Pipe()
            # (No daemon: checkpoints start processes.)
            process = context.Process(target=_serve, args=(number, theirs, self._prepare, self._backend))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, num_ranks: int, function: Callable[..., Any], timeout: float = 240.0, **arguments: Any) -> list[Any]:
        if self._runs == RUNS_PER_PROCESS:
            self.restart()
        self._runs += 1
        port = free_port()
        name = (function.__module__, function.__qualname__)
        for pipe in self._pipes[:num_ranks]:
            pipe.send((name, num_ranks, port, arguments))
        waiting = {pipe: number for number, pipe in enumerate(self._pipes[:num_ranks])}
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        while waiting:
            ready = wait(list(waiting), timeout=10.0 if failures else timeout)
            if not ready:
                failures.setdefault(-1, f"ranks {sorted(waiting.values())} did not answer")
                break
            for pipe in ready:
                number = waiting.pop(pipe)
                ok, value = pipe.recv()
                (results if ok else failures)[number] = value
        if failures:
            self.restart()  # ranks may be stuck in a collective that will never complete
            raise RankError("\n".join(f"rank {number}: {text}" for number, text in sorted(failures.items())))
        return [results[number] for number in range(num_ranks)]

    def restart(self) -> None:
        self.close()
        self._start()

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # an idle rank ends at once and takes its own children along
        for process in self._processes:
            process.join(timeout=10)
            process.kill()
            process.join()


def _serve(number: int, pipe: Connection, prepare: Callable[[], None] | None, backend: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    while True:
        try:
            (module, name), world_size, port, arguments = pipe.recv()
        except EOFError:
            return
        try:
            store = dist.TCPStore("127.0.0.1", port, world_size, is_master=number == 0)
            dist.init_process_group(backend, store=store, rank=number, world_size=world_size)
            importlib.import_module("ais_megatron.policy")  # decides where Megatron runs, by the process group, and so comes first
            from megatron.core import parallel_state

            try:
                function = getattr(importlib.import_module(module), name)
                answer = (True, function(number, **arguments))
                dist.barrier()
            finally:
                parallel_state.destroy_model_parallel()
                dist.destroy_process_group()
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)
