"""The process group in which weights travel from the trainer's rank 0 to every rank of the servers.

A server may die at any moment, and rank 0 must survive this. So the group differs from torch's usual groups in three ways:

watchdog      For NCCL groups torch starts threads that end the whole process after an error or a timeout. This group has none. It is
              built with TORCH_NCCL_BLOCKING_WAIT=1, which ProcessGroupNCCL's constructor reads. Then `broadcast` raises errors and
              timeouts, and torch does not start these threads.
world         torch's destroy_process_group() shuts down every group that is registered. This group is not, because its shutdown may
              wait for a server that is gone.
threads       Calls that may block run in a daemon thread (`in_thread`), which is abandoned if it never returns.

Source: torch 2.13 and 2.14, ProcessGroupNCCL.cpp (constructor, WorkNCCL::wait) and distributed_c10d.py. The tests show it with gloo.
The NCCL side is written from those sources and has not yet run on a GPU.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from ais_megatron.distributed import use_device

T = TypeVar("T")

JOIN_S = 120.0  # for all members to join; a server handles the request between two forward passes
NO_WATCHDOG = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}


class WeightGroup:
    """Rank 0 of a group with `world` members. All its calls block, so use `in_thread`.

    Args:
        address, port: where rank 0 listens while the members join.
        backend: "nccl" or "gloo".
        timeout_s: for one broadcast.
    Raises:
        RuntimeError: a member did not join within `JOIN_S`.
    """

    def __init__(self, address: str, port: int, world: int, name: str, backend: str, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        joining = timedelta(seconds=min(JOIN_S, timeout_s))
        # The same as SGLang's init_custom_process_group on its side, because torch has no public function for a group across jobs.
        store, _, _ = next(c10d.rendezvous(f"tcp://{address}:{port}", 0, world, timeout=joining))
        store.set_timeout(joining)
        store = c10d.PrefixStore(name, store)
        make: Any = c10d._new_process_group_helper  # private: what types it takes differs between torch's versions
        with _environment(NO_WATCHDOG if backend == "nccl" else {}):
            self._group, _ = make(world, 0, [], c10d.Backend(backend), store, group_name=name, backend_options=None, timeout=joining)
        _take_off_the_books(self._group)

    def broadcast(self, flat: Tensor) -> None:
        """Send `flat` to all members, and return when it has arrived.

        Raises:
            RuntimeError: a member is gone or did not receive in time. The group is then broken, so call `abort`.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, self._timeout
        with _side_stream(flat):
            self._group.broadcast([flat], options).wait(self._timeout)  # with a timeout the CPU also waits, and gets errors

    def shut_down(self) -> None:
        """Leave the group normally. The other members must leave at the same time, because NCCL may wait for them."""
        self._group.shutdown()
        self._group = None

    def abort(self) -> None:
        """Leave the group immediately, even during a broadcast. With NCCL this ends our side of a broadcast that hangs. Members that wait
        for us get an error. (gloo closes its connections only when there are no more references to the group.)"""
        if self._group is not None:
            self._group.abort()
            self._group = None


def in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Run `work` in its own daemon thread and return its result as a future.

    When a process ends, it waits for the threads of an executor. A thread that hangs in NCCL would keep it alive forever.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    future.add_done_callback(
        lambda done: done.cancelled() or done.exception()
    )  # (otherwise asyncio warns about errors that are never retrieved)

    def settle(put: Callable[[Any], None], outcome: Any) -> None:
        if not future.done():
            put(outcome)

    def run() -> None:
        put: Callable[[Any], None]
        outcome: Any
        try:
            put, outcome = future.set_result, work()
        except BaseException as error:
            put, outcome = future.set_exception, error
        with suppress(RuntimeError):  # the loop is closed, so nothing waits for the result
            loop.call_soon_threadsafe(settle, put, outcome)

    threading.Thread(target=run, name="weight-group", daemon=True).start()
    return future


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set `variables` within the context and restore them afterwards, so that the trainer's other groups keep their watchdogs."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _side_stream(flat: Tensor) -> Iterator[None]:
    """A separate CUDA stream that starts after `flat` is written, so that a broadcast that hangs does not block the default stream."""
    if not flat.is_cuda:
        yield
        return
    use_device(flat.device)
    stream = torch.cuda.Stream(flat.device)
    stream.wait_stream(torch.cuda.default_stream(flat.device))
    with torch.cuda.stream(stream):
        yield


def _take_off_the_books(group: dist.ProcessGroup) -> None:
    """Undo _register_pg_in_world, as destroy_process_group does after its shutdown."""
    world = c10d._world
    tag = world.pg_to_tag.pop(group, "")
    for books in (world.pg_map, world.pg_names, world.pg_group_ranks, world.pg_backend_config):
        books.pop(group, None)
    for groups in (world.tags_to_pg.get(tag, []), world.tags_to_pg.get("", [])):
        if group in groups:
            groups.remove(group)
    c10d._unregister_process_group(group.group_name)
