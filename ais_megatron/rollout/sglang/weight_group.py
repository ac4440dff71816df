"""The process group over which weights travel from the trainer's rank 0 to every rank of the servers.

A server may die at any moment, and rank 0 must outlive that. So nothing here is left to torch's own ways of failing:

watchdog      For NCCL groups torch starts threads that end the whole process after an error or a timeout. Not for this group: it is
              built with TORCH_NCCL_BLOCKING_WAIT=1, which ProcessGroupNCCL's constructor reads. Errors and timeouts then come out of
              `broadcast`, and no such thread is started.
world         torch's destroy_process_group() shuts down every group that it knows. This one it does not know, because a shutdown
              may wait for a server that is gone.
threads       Whatever may block runs in a daemon thread (`in_thread`), which is left behind if it never returns.

Source: torch 2.13 and 2.14, ProcessGroupNCCL.cpp (constructor, WorkNCCL::wait) and distributed_c10d.py. With gloo the tests show
it; the NCCL side is written from those sources and not yet run on a GPU.
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

JOIN_S = 120.0  # for all members to come: a server takes the request between two forward passes
NO_WATCHDOG = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}


class WeightGroup:
    """Rank 0 of a group of `world` members; made, used and left by blocking calls, for `in_thread`.

    Args:
        address, port: where rank 0 listens while the members find each other.
        backend: "nccl" or "gloo".
        timeout_s: for one broadcast.
    Raises:
        RuntimeError: not everyone came within `JOIN_S`.
    """

    def __init__(self, address: str, port: int, world: int, name: str, backend: str, timeout_s: float) -> None:
        self._timeout = timedelta(seconds=timeout_s)
        joining = timedelta(seconds=min(JOIN_S, timeout_s))
        # As SGLang's init_custom_process_group does on its side: torch offers no public way to a group that spans jobs.
        store, _, _ = next(c10d.rendezvous(f"tcp://{address}:{port}", 0, world, timeout=joining))
        store.set_timeout(joining)
        store = c10d.PrefixStore(name, store)
        make: Any = c10d._new_process_group_helper  # private: what types it takes differs between torch's versions
        with _environment(NO_WATCHDOG if backend == "nccl" else {}):
            self._group, _ = make(world, 0, [], c10d.Backend(backend), store, group_name=name, backend_options=None, timeout=joining)
        _take_off_the_books(self._group)

    def broadcast(self, flat: Tensor) -> None:
        """Send `flat` to all members; returns when it has arrived.

        Raises:
            RuntimeError: a member is gone, or did not take it in time. The group is of no use after that: `abort` it.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.timeout = 0, 0, self._timeout
        with _side_stream(flat):
            self._group.broadcast([flat], options).wait(self._timeout)  # with a timeout the CPU waits too, and sees errors

    def shut_down(self) -> None:
        """Leave in order. The other members have to do so at the same time: with NCCL this may wait for them."""
        self._group.shutdown()
        self._group = None

    def abort(self) -> None:
        """Leave at once, whatever is under way. With NCCL that ends our side of a broadcast that hangs. Members that wait for us get
        an error: gloo closes its connections only when nobody refers to the group any more."""
        if self._group is not None:
            self._group.abort()
            self._group = None


def in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """The result of `work`, which runs in a daemon thread of its own.

    An executor's threads are waited for when the process ends; one that hangs in NCCL would keep it for ever.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()
    future.add_done_callback(lambda done: done.cancelled() or done.exception())  # (asyncio complains of errors that nobody looks at)

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
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle, put, outcome)

    threading.Thread(target=run, name="weight-group", daemon=True).start()
    return future


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """`variables` set inside, and as they were afterwards: the trainer's other groups keep their watchdogs."""
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
    """A CUDA stream of our own, which begins when `flat` is written: a broadcast that hangs must not hold up the default stream."""
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
