"""A pool of real processes over gloo, shared by all distributed tests: importing Megatron-Core takes seconds.

`RankPool.run(num_ranks, function, **arguments)` runs a module-level function as ``function(rank, **arguments)`` on the
first `num_ranks` processes, each time in a fresh process group of just those, and returns their results in rank order.
An exception on a rank comes back as `RankError` with that rank's traceback; so does a rank that does not answer in time.

One process of the pool, the nursery, imports what ranks need and then only forks: ranks that are renewed start at once.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

from ais_megatron.cluster.ports import free_port

RUNS_PER_PROCESS = 16  # then a process is replaced, so that what tests leave behind (memory, caches) does not pile up
START_S = 300.0  # for the nursery's imports, on a busy machine
# What nearly every function on a rank imports, itself or through torch's first optimizer: 7 s for each rank that starts without.
IMPORTED_ONCE = ("ais_megatron.trainer", "pytest", "torch._dynamo")


class RankError(AssertionError):
    """A rank failed; the message is its traceback."""


class RankPool:
    """prepare: called in the nursery before Megatron is imported. backend: of the process groups."""

    def __init__(self, size: int, prepare: Callable[[], None] | None = None, backend: str = "gloo") -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._key = os.urandom(16)
        self._listener = Listener(str(Path(self._folder.name) / "socket"), backlog=size, authkey=self._key)
        context = multiprocessing.get_context("spawn")
        self._orders, theirs = context.Pipe()
        arguments = (theirs, self._listener.address, self._key, prepare, backend)
        self._nursery = context.Process(target=_fork_ranks, args=arguments)  # no daemon: it has children
        self._nursery.start()
        theirs.close()
        self._pipes: list[Connection] = []
        self._start()

    def _start(self) -> None:
        self._runs = 0
        self._orders.send(self.size)
        if not self._orders.poll(START_S) or self._orders.recv() != "started":
            raise RankError(f"the ranks did not start within {START_S:g} s")
        by_number = {}
        for _ in range(self.size):
            pipe = self._listener.accept()
            by_number[pipe.recv()] = pipe
        self._pipes = [by_number[number] for number in range(self.size)]

    def run(self, num_ranks: int, function: Callable[..., Any], timeout: float = 600.0, **arguments: Any) -> list[Any]:
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
                try:
                    ok, value = pipe.recv()
                except (EOFError, ConnectionError):
                    ok, value = False, "the process is gone"
                (results if ok else failures)[number] = value
        if failures:
            self.restart()  # ranks may be stuck in a collective that will never complete
            raise RankError("\n".join(f"rank {number}: {text}" for number, text in sorted(failures.items())))
        return [results[number] for number in range(num_ranks)]

    def restart(self) -> None:
        self._close_pipes()
        self._start()

    def close(self) -> None:
        self._close_pipes()
        self._orders.close()  # the nursery ends, and takes the ranks along
        _end(self._nursery, 30.0)
        self._listener.close()
        self._folder.cleanup()

    def _close_pipes(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # an idle rank ends at once and takes its own children along
        self._pipes = []


def _fork_ranks(orders: Connection, address: str, key: bytes, prepare: Callable[[], None] | None, backend: str) -> None:
    """The nursery: each order is a number of ranks to start, once those of the order before are gone."""
    os.environ["OMP_NUM_THREADS"] = "1"  # and so no threads of OpenMP, which a fork would lose
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    if prepare is not None:
        prepare()
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # it says where Megatron runs
    for module in IMPORTED_ONCE:
        importlib.import_module(module)
    dist.destroy_process_group()  # and with it the threads, which a fork would lose
    gc.freeze()  # Megatron collects garbage at every checkpoint, and need not look through all that was imported
    context = multiprocessing.get_context("fork")
    ranks: list[multiprocessing.process.BaseProcess] = []
    while True:
        try:
            count = orders.recv()
        except EOFError:
            count = 0
        for process in ranks:
            _end(process, 10.0)
        if not count:
            return
        ranks = [context.Process(target=_serve, args=(number, address, key, backend)) for number in range(count)]
        for process in ranks:
            process.start()
        orders.send("started")


def _end(process: multiprocessing.process.BaseProcess, seconds: float) -> None:
    """Wait for a process, and kill it if it has not ended by then. `join(timeout=...)` would wait for all that it has started, too: torch's
    manager of shared memory outlives a rank by half a minute."""
    deadline = time.monotonic() + seconds
    while process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()


def _serve(number: int, address: str, key: bytes, backend: str) -> None:
    import torch.distributed as dist

    from ais_megatron.cluster.gloo import share_devices

    share_devices()
    pipe = Client(address, authkey=key)
    pipe.send(number)
    while True:
        try:
            (module, name), world_size, port, arguments = pipe.recv()
        except EOFError:
            return
        try:
            store = dist.TCPStore("127.0.0.1", port, world_size, is_master=number == 0)
            dist.init_process_group(backend, store=store, rank=number, world_size=world_size)
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
