"""Distributes requests over the servers, and handles requests and servers that fail.

Every request is for one response. `routing` chooses its server. A response counts once. It is stored under
(prompt, sample). A request is repeated only after its connection is closed, and the server drops a request whose connection is closed.

    refused with 5xx         repeated after a pause that doubles, up to MAX_ATTEMPTS times
    its queue is full        repeated until there is room
    refused with 4xx         an error, because the request is wrong
    lost connection          repeated, if the server still answers and has our weights: only this connection was lost. Otherwise the
                             server is not used until it is healthy again; other servers do its requests
    no progress              the server is lost too. A response may take as long as it likes while its server works, be it on other
                             requests
    hung                     the same, after two failed health checks in a row
    other weights than ours  (after a restart) the server is not used until the next sync
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from ais_megatron.batch import Prompt, Rollout
from ais_megatron.config.sglang import SGLangConfig
from ais_megatron.distributed import Unavailable
from ais_megatron.rollout.engine import SamplingParams, WeightsLost
from ais_megatron.rollout.occupancy import Occupancy
from ais_megatron.rollout.sglang.api import Refused, ServerAPI, Unreachable
from ais_megatron.rollout.sglang.routing import Key, Loads, Waiting, limit_of

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 5  # of one response; after this many the request itself probably breaks servers
BACKOFF = 0.1  # seconds, doubled with every attempt
HEALTH_SECONDS, HEALTH_TIMEOUT = 10.0, 30.0  # between health checks of working servers, and for one check
PROGRESS_SECONDS = 5.0  # at most, between two looks at a server's progress
ANSWER_SECONDS = 5.0  # for a server that has just lost a connection, to say that it is still there
QUEUE_FULL, QUEUE_SECONDS = "queue is full", 1.0  # in SGLang's message if it has --max-queued-requests; then a pause
ROOM_SECONDS = 0.1  # between two looks whether other ranks have left room at a server
OTHER_WEIGHTS = 200  # our own "status": the answer is valid, but not from this run's weights


@dataclass(eq=False)
class Server:
    """One server, as this rank sees it."""

    api: ServerAPI
    """Its endpoints."""
    usable: bool = False
    """It can be reached and has this run's weights."""
    requests: set[asyncio.Task[Any]] = field(default_factory=set)
    """This rank's requests in flight."""
    behind: tuple[ServerAPI, ...] = ()
    """The servers that do its work, if it is a router."""
    weights: str = ""
    """What it called its weights when it was asked last."""
    has_weights: bool = False
    """It had this run's weights when it was asked last."""
    is_doubtful: bool = False
    """It has failed, and must be healthy before it is used again."""
    silent_s: float = 0.0
    """For how long it has been watched without progress. Time in which this process did not look, because it was busy, does not count."""
    activity: dict[ServerAPI, object] = field(default_factory=dict)
    """What it reported last about its work."""

    def lose(self, why: str) -> None:
        """Stop using this server. Its requests go back to the queue."""
        if self.usable:
            logger.warning("rollout server %s is not used for now: %s", self.api.url, why)
        self.usable, self.is_doubtful = False, True
        for request in list(self.requests):
            request.cancel()

    def move(self) -> None:
        """Note that the server makes progress, or need not."""
        self.silent_s = 0.0

    async def look_for_progress(self, since_s: float) -> None:
        """Note progress if the server, or one behind it, reports other numbers than at the last look, `since_s` ago."""
        self.silent_s += since_s
        for api in self.behind or (self.api,):
            began = time.monotonic()
            try:
                numbers = await api.activity()
            except Unreachable:
                self.silent_s += time.monotonic() - began
                continue
            except Refused:  # this SGLang does not report its activity; but if it is healthy, it generates tokens
                if await api.is_healthy(HEALTH_TIMEOUT):
                    self.move()
                continue
            if numbers != self.activity.get(api):
                self.activity[api] = numbers
                self.move()


@dataclass(eq=False)
class Generation:
    """The responses of one call of `generate`, finished and missing."""

    prompts: Sequence[Prompt]
    sampling: SamplingParams
    done: dict[Key, Rollout] = field(default_factory=dict)
    attempts: dict[Key, int] = field(default_factory=dict)
    home: dict[int, int] = field(default_factory=dict)
    """The server, by number, that has a prompt's other samples."""

    def missing(self) -> list[Key]:
        keys = ((i, sample) for i in range(len(self.prompts)) for sample in range(self.sampling.num_samples))
        return [key for key in keys if key not in self.done]

    def rollouts(self) -> list[Rollout]:
        return [self.done[i, sample] for i in range(len(self.prompts)) for sample in range(self.sampling.num_samples)]


class Dispatcher:
    """Sends requests to `servers`. All coroutines run on one event loop.

    Args:
        request: asks one server for one response. It gives None if the response was sampled with other weights than this run's.
        is_current: whether a server whose weights have this name may be used now.
        is_updating: whether an update is in progress. Servers are then paused. They make no progress and do not answer health checks.
        number: this rank's number. Ranks begin with different servers.
        loads: requests in flight at each server.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        config: SGLangConfig,
        request: Callable[[Server, Prompt, SamplingParams, int], Awaitable[Rollout | None]],
        is_current: Callable[[str], bool],
        is_updating: Callable[[], bool],
        number: int,
        loads: Loads,
    ) -> None:
        self.servers, self._config, self._request, self._number = servers, config, request, number
        self._is_current, self._is_updating = is_current, is_updating
        self._loads, self._limit = loads, limit_of(config)
        self._placing, self._has_room = asyncio.Lock(), asyncio.Event()
        self._active: list[Waiting] = []
        self._calls = count()
        self.occupancy = Occupancy(len(servers))
        self._look_every = min(PROGRESS_SECONDS, config.request_timeout_s / 4)

    async def complete(self, generation: Generation) -> None:
        """Fetch all missing responses.

        Raises:
            WeightsLost, Unavailable: see `SGLangEngine.generate`.
            RuntimeError: no server accepts a request.
        """
        await self.look()
        while missing := generation.missing():
            if not any(server.usable for server in self.servers):
                await self._wait_for_a_server()
            waiting = Waiting(missing, generation.home, (generation.prompts[0].index < 0, next(self._calls)))
            workers = min(len(missing), self._limit * len(self.servers))
            watches = [asyncio.ensure_future(watch) for watch in (self._watch(), self._follow())]
            work = [asyncio.ensure_future(self._work(generation, waiting)) for _ in range(workers)]
            self._active.append(waiting)
            try:
                await asyncio.gather(*work)
            finally:
                self._active.remove(waiting)
                for task in (*watches, *work):
                    task.cancel()
                await asyncio.gather(*watches, *work, return_exceptions=True)

    async def _work(self, generation: Generation, waiting: Waiting) -> None:
        """Fetch one missing response after the other, until none is missing or no server is left."""
        while (place := await self._place(waiting)) is not None:
            number, key = place
            server = self.servers[number]
            if not server.requests:
                server.move()  # it had nothing to do
            request = asyncio.ensure_future(self._ask(server, generation.prompts[key[0]], generation.sampling, key[1]))
            server.requests.add(request)
            try:
                try:
                    with self.occupancy.at(number):
                        rollout = await request
                finally:
                    server.requests.discard(request)
                    self._loads.release(number)
                    self._has_room.set()
            except (Unreachable, Refused, asyncio.CancelledError) as error:
                this = asyncio.current_task()
                if this is not None and this.cancelling():  # everything is cancelled, not only this request
                    raise
                waiting.put(key)
                await self._failed(server, generation, key, error)
            else:
                if rollout is None:
                    waiting.put(key)
                    await self._failed(server, generation, key, Refused(OTHER_WEIGHTS, "answered with other weights than this run's"))
                else:
                    generation.done[key] = rollout

    async def _place(self, waiting: Waiting) -> tuple[int, Key] | None:
        """Wait until a server has room for one of the requests, and count it there. None if nothing waits or no server can be used.

        Calls do not overtake each other: while requests of an earlier one wait, this one waits too, and evaluations come last.
        """
        async with waiting.turn:
            while waiting:
                usable = [i for i, server in enumerate(self.servers) if server.usable]
                if not usable:
                    return None
                self._has_room.clear()
                if not any(waiting.comes_after(other) for other in self._active):
                    async with self._placing:
                        if (place := await self._try_to_place(waiting, usable)) is not None:
                            return place
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._has_room.wait(), ROOM_SECONDS)
        return None

    async def _try_to_place(self, waiting: Waiting, usable: list[int]) -> tuple[int, Key] | None:
        loads = await self._loads.counts()
        place = waiting.choose({i: loads[i] for i in usable}, self._limit, self._number % len(self.servers))
        if place is None:
            return None
        waiting.take(place[1])
        try:
            load = await self._loads.reserve(place[0])
        except BaseException:
            waiting.put(place[1])
            raise
        if load <= self._limit and self.servers[place[0]].usable:
            return place
        waiting.put(place[1])  # another rank was faster, or the server was lost meanwhile
        self._loads.release(place[0])
        return None

    async def _ask(self, server: Server, prompt: Prompt, sampling: SamplingParams, sample: int) -> Rollout | None:
        """Make one request, however long it takes while the server makes progress.

        Raises:
            Unreachable: the server has made none for `request_timeout_s`.
            Refused: the server refused the request.
        """
        limit = self._config.request_timeout_s
        request = asyncio.ensure_future(self._request(server, prompt, sampling, sample))
        try:
            while not (await asyncio.wait({request}, timeout=self._look_every))[0]:
                if server.silent_s > limit:
                    raise Unreachable(f"{server.api.url} made no progress for {limit:g} s (rollout.sglang.request_timeout_s)")
            server.move()
            return request.result()
        finally:
            if not request.done():
                request.cancel()
                await asyncio.wait({request})  # until the connection is closed
            if not request.cancelled():
                request.exception()  # asyncio would complain of an error that nobody has looked at, although this request is repeated

    async def _failed(self, server: Server, generation: Generation, key: Key, error: BaseException) -> None:
        """Decide what a failed request means for its server. The request is already back in the queue."""
        if isinstance(error, asyncio.CancelledError):
            return  # the server was lost meanwhile, so the request is not at fault
        status = error.status if isinstance(error, Refused) else None
        if status in (401, 403):
            raise RuntimeError(f"{error}; rollout.sglang.key_file must name the file that the servers were started with") from error
        if status is not None and 400 <= status < 500 and status not in (408, 429):
            raise RuntimeError(f"prompt {generation.prompts[key[0]].index}: {error}") from error
        if status == OTHER_WEIGHTS and server.api.url == self._config.router:
            raise WeightsLost(f"a server behind {server.api.url}: {error}")
        if QUEUE_FULL in str(error) and server.silent_s <= self._config.request_timeout_s:
            await asyncio.sleep(QUEUE_SECONDS)
            return
        attempt = generation.attempts[key] = generation.attempts.get(key, 0) + 1
        if attempt >= MAX_ATTEMPTS:
            raise RuntimeError(f"prompt {generation.prompts[key[0]].index}: {attempt} attempts failed, the last one: {error}") from error
        if status == OTHER_WEIGHTS or (status is None and not await self._is_still_there(server)):
            server.lose(str(error))
        await asyncio.sleep(min(BACKOFF * 2**attempt, 5.0))

    async def _is_still_there(self, server: Server) -> bool:
        """Whether a server that lost a connection makes progress, answers and has this run's weights. To lose it would cost all of its
        requests in flight."""
        if not server.usable or server.silent_s > self._config.request_timeout_s:
            return False
        try:
            name = await asyncio.wait_for(server.api.weight_version(), ANSWER_SECONDS)
        except (Unreachable, Refused, TimeoutError):
            return False
        return self._is_current(name) or server.api.url == self._config.router

    async def look(self) -> None:
        """Ask every server whether it answers, and whether it has weights that this run may use now. One that has failed must also be
        healthy, because SGLang answers such questions even if its scheduler hangs."""
        for server, answer in zip(self.servers, await versions_of(self.servers), strict=True):
            if isinstance(answer, Exception):
                server.has_weights = False
                server.lose(str(answer))
                continue
            server.weights = answer
            server.has_weights = self._is_current(answer) or server.api.url == self._config.router
            if not server.has_weights:
                server.lose("it does not have the current weights of this run; it gets them at the next sync")
            elif not server.is_doubtful:
                server.usable = True
        doubtful = [server for server in self.servers if server.has_weights and server.is_doubtful]
        for server, healthy in zip(doubtful, await asyncio.gather(*(s.api.is_healthy() for s in doubtful)), strict=True):
            server.is_doubtful, server.usable = not healthy, healthy

    async def _follow(self) -> None:
        """While requests are in flight, note which servers make progress. A pause is no lack of progress."""
        while True:
            await asyncio.sleep(self._look_every)
            busy = [server for server in self.servers if server.requests]
            if self._is_updating():
                for server in busy:
                    server.move()
            else:
                await asyncio.gather(*(server.look_for_progress(self._look_every) for server in busy))

    async def _watch(self) -> None:
        """While requests are in flight, detect servers that hang, and use servers again that can be reached again."""
        strikes: dict[Server, int] = {}
        while True:
            await asyncio.sleep(HEALTH_SECONDS)
            if self._is_updating():
                continue
            if any(not server.usable for server in self.servers):
                await self.look()
            for server in [server for server in self.servers if server.usable and server.requests]:
                strikes[server] = 0 if await server.api.is_healthy(HEALTH_TIMEOUT) else strikes.get(server, 0) + 1
                if strikes[server] >= 2:
                    server.lose("it hangs: two health checks in a row failed")

    async def _wait_for_a_server(self) -> None:
        """Wait until a server can be used. Raises as `generate` does."""
        deadline = time.monotonic() + self._config.recovery_timeout_s
        while True:
            await self.look()
            if any(server.usable for server in self.servers):
                return
            for server in self.servers:
                if not server.has_weights and await server.api.is_healthy():
                    raise WeightsLost(f"{server.api.url} answers, but no longer has this run's weights; push them again")
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"no rollout server has answered for {self._config.recovery_timeout_s:g} s "
                    f"({', '.join(server.api.url for server in self.servers)}); read the servers' logs, or raise "
                    "rollout.sglang.recovery_timeout_s"
                )
            await asyncio.sleep(1.0)


async def versions_of(servers: Sequence[Server]) -> list[str | Exception]:
    """The name of each server's weights, or the error if it does not answer."""

    async def ask(server: Server) -> str | Exception:
        try:
            return await server.api.weight_version()
        except (Unreachable, Refused) as error:
            return error

    return list(await asyncio.gather(*(ask(server) for server in servers)))
