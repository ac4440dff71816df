"""Runs coroutines of one batch at the same time, from code that is not asynchronous.

They run on one event loop per process, in a thread. So a client that the user's function keeps between two batches stays usable.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TypeVar

GRACE_S = 30.0  # for a busy machine, beyond the time limits of the batch

Opened = TypeVar("Opened")
Item = TypeVar("Item")
Result = TypeVar("Result")

_lock = threading.Lock()
_loop: tuple[int, asyncio.AbstractEventLoop] | None = None  # (process id, loop), because threads do not survive a fork


def run_all(
    opened: AbstractAsyncContextManager[Opened],
    judge: Callable[[Opened, Item], Awaitable[Result]],
    items: Sequence[Item],
    concurrency: int,
    limit_s: float,
) -> list[Result]:
    """``judge(resource, item)`` for every item, at most `concurrency` at a time. The results are in the order of `items`.

    Args:
        opened: is open during the batch and gives the resource.
        limit_s: the longest time that one `judge` may take by its own limits.
    Raises:
        TimeoutError: the whole batch takes longer than these limits allow, so a coroutine probably blocks the loop. The loop is given up.
        Exception: the first error of a `judge`. The other ones are cancelled.
    """
    rounds = -(-len(items) // concurrency)
    running = asyncio.run_coroutine_threadsafe(_run_all(opened, judge, items, concurrency), _background_loop())
    try:
        return running.result(rounds * limit_s + GRACE_S)
    except TimeoutError:
        _give_up_loop()
        raise
    finally:
        running.cancel()


async def _run_all(
    opened: AbstractAsyncContextManager[Opened],
    judge: Callable[[Opened, Item], Awaitable[Result]],
    items: Sequence[Item],
    concurrency: int,
) -> list[Result]:
    places = asyncio.Semaphore(concurrency)

    async def one(resource: Opened, item: Item) -> Result:
        async with places:
            return await judge(resource, item)

    try:
        async with opened as resource, asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(resource, item)) for item in items]
    except BaseExceptionGroup as errors:  # of the task group; a single error is easier to read
        first = errors.exceptions[0]
        raise first from first.__cause__
    return [task.result() for task in tasks]


def _background_loop() -> asyncio.AbstractEventLoop:
    global _loop
    with _lock:
        if _loop is None or _loop[0] != os.getpid():
            _loop = os.getpid(), asyncio.new_event_loop()
            threading.Thread(target=_loop[1].run_forever, name="rewards", daemon=True).start()
        return _loop[1]


def _give_up_loop() -> None:
    """The next batch gets a new loop, because something blocks this one."""
    global _loop
    with _lock:
        _loop = None
