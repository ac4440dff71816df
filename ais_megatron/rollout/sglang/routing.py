"""Decides which server gets which request, from the load that all ranks together put on the servers.

The samples of a prompt go to one server, so that it computes their prefix once. A group that no server has yet goes to the least loaded
server. A server with `limit` requests in flight gets no more, and what is left waits here. When no whole group waits any more, a server
with room also takes samples whose own server is full. So a server does not run empty while work waits for another one.

The ranks count in one place, the key-value store of torch's process group. A rank that asks a server for a response adds one to the
server's counter, and takes it away when the answer is there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from torch.distributed import Store

from ais_megatron.config.sglang import SGLangConfig

Key = tuple[int, int]  # (position in the prompts, sample number)


class Loads(Protocol):
    """Requests in flight at each server, of all ranks."""

    async def counts(self) -> list[int]: ...

    async def reserve(self, server: int) -> int:
        """Count one more request at `server`. Returns the new number."""
        ...

    def release(self, server: int) -> None:
        """Count one request less. Returns at once."""
        ...


class OwnLoads:
    """`Loads` of a job with one rank."""

    def __init__(self, servers: int) -> None:
        self._counts = [0] * servers

    async def counts(self) -> list[int]:
        return list(self._counts)

    async def reserve(self, server: int) -> int:
        self._counts[server] += 1
        return self._counts[server]

    def release(self, server: int) -> None:
        self._counts[server] -= 1


class SharedLoads:
    """`Loads` in `store`, which all ranks reach. Its calls block, so they run in a thread, one after the other.

    prefix: of the keys; the same on all ranks.
    """

    def __init__(self, store: Store, prefix: str, servers: int) -> None:
        # A connection of its own, because torch holds the other one while it waits for a rank. (torch's stubs lack the method.)
        self._store = store.clone()  # type: ignore[attr-defined]
        self._keys = [f"{prefix}-load-{i}" for i in range(servers)]
        self._thread = ThreadPoolExecutor(1, "server-loads")
        for key in self._keys:
            self._store.add(key, 0)  # creates it, because reading a missing key waits

    async def counts(self) -> list[int]:
        return await self._in_thread(lambda: [int(value) for value in self._store.multi_get(self._keys)])

    async def reserve(self, server: int) -> int:
        future = self._thread.submit(self._store.add, self._keys[server], 1)
        try:
            return await asyncio.shield(asyncio.wrap_future(future))
        except asyncio.CancelledError:  # nobody will release what is counted meanwhile
            future.add_done_callback(lambda done: self.release(server) if done.exception() is None else None)
            raise

    def release(self, server: int) -> None:
        self._thread.submit(self._store.add, self._keys[server], -1)

    async def _in_thread(self, work: Callable[[], Any]) -> Any:
        future: Future[Any] = self._thread.submit(work)
        return await asyncio.wrap_future(future)


def limit_of(config: SGLangConfig) -> int:
    """Most requests in flight at one server, or at the router for all servers behind it. What a server cannot run at once would only wait
    in its queue, from where no other server could take it."""
    each = min(config.max_concurrency, config.max_running or config.max_concurrency)
    return each * (len(config.servers) if config.router else 1)


class Waiting:
    """The requests of one call that no server has yet.

    home: the server of each prompt that has one. It is kept by the caller, and updated.
    rank: calls with a smaller one come first.
    """

    def __init__(self, missing: list[Key], home: dict[int, int], rank: tuple[bool, int] = (False, 0)) -> None:
        self._samples: dict[int, list[int]] = {}
        self.home = home
        self._rank = rank
        self.turn = asyncio.Lock()  # one worker of the call looks for a server at a time
        for key in missing:
            self.put(key)

    def __bool__(self) -> bool:
        return bool(self._samples)

    def comes_after(self, other: Waiting) -> bool:
        """Whether requests of `other` wait that come first."""
        return bool(other) and other._rank < self._rank

    def put(self, key: Key) -> None:
        self._samples.setdefault(key[0], []).append(key[1])

    def take(self, key: Key) -> None:
        samples = self._samples[key[0]]
        samples.remove(key[1])
        if not samples:
            del self._samples[key[0]]

    def choose(self, loads: Mapping[int, int], limit: int, begin: int = 0) -> tuple[int, Key] | None:
        """The next request and its server, whose prompt then has this server as its home. None if no server has room.

        Args:
            loads: requests in flight at each server that can be used.
            begin: among servers that are equally loaded, the first one from here on.
        """
        room = [server for server, load in loads.items() if load < limit]
        if not room:
            return None
        least = min(room, key=lambda server: (loads[server], (server - begin) % (max(loads) + 1)))
        homeless = None
        for prompt, samples in self._samples.items():
            home = self.home.get(prompt)
            if home in room:
                assert home is not None
                return home, (prompt, samples[0])
            if homeless is None and home not in loads:
                homeless = prompt
        prompt = homeless if homeless is not None else max(self._samples, key=lambda prompt: len(self._samples[prompt]))
        self.home[prompt] = least
        return least, (prompt, self._samples[prompt][0])
