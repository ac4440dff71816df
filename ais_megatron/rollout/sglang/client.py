"""The rollout engine on SGLang servers. Every rank is a client, and rank 0 also pushes the weights.

    generate         one request per response (responses.py), spread over the servers (dispatch.py)
    update_weights   rank 0 checks the tensors and pushes them in one session (transport.py); at a server's first update it also
                     checks that the server uses every tensor and its KV scales (checks.py)

Versions are called "RUN-N", where RUN is random. A server that was restarted, or that has another run's weights, reports another name
and gets no requests until the next sync. HTTP runs on one event loop in its own thread, so a thread may call `generate` during an
update.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from itertools import count
from typing import Any

import aiohttp
import torch
from torch.distributed import Store

from ais_megatron.batch import Bucket, Prompt, Rollout
from ais_megatron.config import Architecture, RolloutConfig
from ais_megatron.distributed import Unavailable
from ais_megatron.rollout.engine import SamplingParams, WeightsLost
from ais_megatron.rollout.manifest import TIED_HEAD, Manifest
from ais_megatron.rollout.occupancy import Occupancy
from ais_megatron.rollout.sampling import check_prompt, check_sampling
from ais_megatron.rollout.sglang.access_key import authorization
from ais_megatron.rollout.sglang.adapter import Adapters
from ais_megatron.rollout.sglang.api import Refused, ServerAPI, Unreachable
from ais_megatron.rollout.sglang.checks import check_coverage, check_scales, randomize
from ais_megatron.rollout.sglang.dispatch import Dispatcher, Generation, Server, versions_of
from ais_megatron.rollout.sglang.patience import Patience
from ais_megatron.rollout.sglang.responses import ResponseFormat
from ais_megatron.rollout.sglang.routing import OwnLoads, SharedLoads
from ais_megatron.rollout.sglang.transport import Transport, WeightUpdate

logger = logging.getLogger(__name__)

KEEP_ALIVE_S = 2.0  # for an idle connection. SGLang closes it after 5 s, possibly while we are sending a request
SCALES = (".attn.k_scale", ".attn.v_scale")
EMBEDDING = "model.embed_tokens.weight"


class SGLangEngine:
    """A `RolloutEngine`, which documents the methods, on running SGLang servers.

    Args:
        eos_ids: the tokens that end a response.
        dtype: of weights that are not quantised.
        run_id: the random part of this run's version names; the same on every rank.
        key: the servers' access key, or None.
        transport: how weights travel. Only rank 0 has one, and only rank 0 updates.
        adapters: how LoRA's factors travel, if they are sent by themselves. Every rank has it.
        number: this rank's number. Ranks begin with different servers.
        store: where the ranks count the requests at each server; None if this is the only rank.
        on_close: called at the end of `close`, to stop servers that were started for this engine.
    """

    takes_updates_while_generating = True

    def __init__(
        self,
        architecture: Architecture,
        rollout: RolloutConfig,
        urls: Sequence[str],
        *,
        eos_ids: Sequence[int],
        dtype: torch.dtype,
        run_id: str,
        key: str | None = None,
        transport: Transport | None = None,
        adapters: Adapters | None = None,
        number: int = 0,
        store: Store | None = None,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_close = on_close
        self._architecture, self._rollout, self._config = architecture, rollout, rollout.sglang
        self._format = ResponseFormat(architecture, eos_ids, rollout.return_routed_experts, run_id)
        self._transport, self._adapters = transport, adapters
        self._manifest = Manifest.of(architecture, rollout, dtype, adapters.shapes if adapters else None)
        self._version = -1
        self._acceptable: set[int] = set()  # versions that a server may have: old and new between an update and the next `generate`
        self._is_updating = False
        self._closed = False
        self._is_asleep = False  # between `release_memory` and the next update
        self._asleep: set[Server] = set()  # servers that have released their memory
        self._known: set[str] = set()  # servers that have passed the checks of their first update
        self._unfinished: dict[Any, Generation] = {}  # calls that ended in WeightsLost
        self._request_prefix, self._request_numbers = f"{run_id}-{number}-", count()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="sglang-client", daemon=True).start()
        self._session = self._run(_open_session(key))
        self._servers = [self._server(url) for url in urls]
        self._updated: list[Server] = []  # servers in the last update
        router = self._config.router
        loads = OwnLoads(max(len(urls), 1)) if store is None else SharedLoads(store, run_id, len(urls))
        doors = [self._server(router, tuple(server.api for server in self._servers))] if router else self._servers
        self._dispatcher = Dispatcher(doors, self._config, self._ask, self._is_current, lambda: self._is_updating, number, loads)

    def _server(self, url: str, behind: tuple[ServerAPI, ...] = ()) -> Server:
        return Server(ServerAPI(url, self._session, self._config.request_timeout_s), behind=behind)

    @property
    def version(self) -> int:
        """See `RolloutEngine.version`. It is also -1 after an update that failed."""
        return self._version

    @property
    def occupancy(self) -> Occupancy:
        """When this rank had requests at each server (at the router, if there is one)."""
        return self._dispatcher.occupancy

    def close(self) -> None:
        if self._closed:
            return
        self._closed, self._version = True, -1
        try:
            self._run(self._shut_down())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._on_close()

    async def _shut_down(self) -> None:
        """Cancel all tasks, so that no thread waits for a loop that has stopped."""
        busy = [server.api for server in self._dispatcher.servers if server.requests]
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(server.abort(self._request_prefix) for server in busy), return_exceptions=True)
        if self._transport is not None:
            await self._transport.shut_down()
        await self._session.close()

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine on the client's loop. An interrupt here also cancels it there."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """See `RolloutEngine.generate`.

        A response whose log-probabilities are missing or not finite comes back with finish_reason `DROPPED`.

        Raises:
            WeightsLost: a server answers, but none has this run's weights any more. Push them, then call again with the same
                arguments. Finished responses are kept.
            Unavailable: no server answered for `rollout.sglang.recovery_timeout_s`.
        """
        if self._closed or self._version < 0:
            state = "is closed" if self._closed else "has no complete weights: none were pushed, or the last update failed"
            raise RuntimeError(f"the SGLang rollout engine {state}; call update_weights before generate")
        if self._is_asleep:
            raise RuntimeError("the SGLang servers have released their memory; call update_weights before generate")
        check_sampling(sampling)
        for prompt in prompts:
            check_prompt(prompt, sampling, self._architecture)
        self._acceptable = {self._version}
        is_evaluation = bool(prompts) and prompts[0].index < 0  # these prompts come again with every version
        call = (self._version if is_evaluation else None, tuple(prompt.index for prompt in prompts), sampling)
        generation = self._unfinished.pop(call, None) or Generation(prompts, sampling)
        try:
            self._run(self._dispatcher.complete(generation))
        except WeightsLost:
            self._unfinished[call] = generation
            raise
        return generation.rollouts()

    async def _ask(self, server: Server, prompt: Prompt, sampling: SamplingParams, sample: int) -> Rollout | None:
        body = self._format.request(prompt, sampling, sample)
        rid = f"{self._request_prefix}{next(self._request_numbers)}"
        if self._adapters is None:
            return self._format.rollout(prompt, await server.api.generate(rid=rid, **body))
        adapter = server.weights
        try:
            answer = await server.api.generate(rid=rid, lora_path=adapter, **body)
        except Refused as error:
            if error.status == 400 and "LoRA adapter" in str(error):
                return None  # the server was restarted, and has no adapter
            raise
        return self._format.rollout(prompt, answer, adapter)

    def _is_current(self, name: str) -> bool:
        return self._format.version(name) in self._acceptable

    def update_weights(self, buckets: Iterable[Bucket], version: int) -> None:
        """See `RolloutEngine.update_weights`. Ranks without a transport only take part in producing `buckets`.

        Raises:
            ValueError: a tensor is wrong; nothing of its bucket has been sent.
            Unavailable: no server answered for `rollout.sglang.recovery_timeout_s` (at the first update: startup_timeout_s).
            RuntimeError: a server refused the update or was lost, or does not use its weights or scales. No server is used
                until an update succeeds.
        """
        if self._closed:
            raise RuntimeError("the SGLang rollout engine is closed")
        if version < 0:
            raise ValueError(f"version={version}: must be 0 or more; -1 means that there are no weights")
        is_first, after_failure, self._version = not self._known and self._version < 0, self._version < 0, -1
        self._acceptable.add(version)
        self._is_updating = True
        try:
            self._update(buckets, version, is_first, after_failure)
        finally:
            self._is_updating = False

    def _update(self, buckets: Iterable[Bucket], version: int, is_first: bool, after_failure: bool) -> None:
        transport = self._transport
        if transport is None:
            for _ in buckets:
                pass
            self._version, self._is_asleep = version, False
            return
        woken = self._run(self._wake())
        self._updated, fresh = self._run(self._servers_to_update(is_first, after_failure, woken))
        servers = [server.api for server in self._updated]
        self._known -= {server.url for server in fresh}
        self._run(transport.lost([*fresh, *(server.api for server in self._servers if server not in self._updated)]))
        noise, name = self._run(randomize(fresh)), self._format.name(version)
        scales, factors = self._push(transport, buckets, servers, None if self._adapters else name, fresh)
        self._run(check_coverage(fresh, noise, scales))
        if scales and fresh:
            self._run(check_scales(fresh, transport, scales, None if self._adapters else name, self._architecture.vocab_size))
        if self._adapters is not None:
            self._run(self._adapters.check(fresh, factors))
            self._run(self._adapters.load(servers, name, factors))
            for server in self._updated:
                server.weights = name
        self._known |= {server.url for server in servers}
        self._version, self._is_asleep = version, False

    def release_memory(self) -> None:
        """See `ReleasesMemory`. Rank 0 asks the servers. One that does not answer is gone, and with it its memory."""
        self._is_asleep = True
        if self._transport is not None:
            self._run(self._put_to_sleep())

    async def _put_to_sleep(self) -> None:
        async def release(server: Server) -> None:
            if server in self._asleep:
                return
            try:
                await server.api.wait_until_idle()
                await server.api.release_memory()
            except Unreachable as error:
                logger.warning("rollout server %s did not answer when it had to release its memory: %s", server.api.url, error)
                return
            except Refused as error:
                raise RuntimeError(f"rollout.colocated=true: the server did not release its memory, {error}") from error
            self._asleep.add(server)

        results = await asyncio.gather(*(release(server) for server in self._servers), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _wake(self) -> set[Server]:
        """Let servers that have released their memory take it back. Returns them. Their weights are undefined."""
        woken = set[Server]()
        for server in [server for server in self._servers if server in self._asleep]:
            try:
                await server.api.take_memory_back()
            except Unreachable:
                self._asleep.discard(server)  # it is gone
                continue
            except Refused as error:
                raise RuntimeError(f"rollout.colocated=true: the server did not get its memory back, {error}") from error
            self._asleep.discard(server)
            woken.add(server)
        return woken

    def _push(
        self, transport: Transport, buckets: Iterable[Bucket], servers: Sequence[ServerAPI], name: str | None, fresh: Sequence[ServerAPI]
    ) -> tuple[Bucket, Bucket]:
        """Push all buckets in one session. Returns its KV scales, and LoRA's factors, which are not sent here."""
        update = WeightUpdate(transport, servers, self._config.pause, name)
        self._manifest.begin()
        scales: Bucket = []
        factors: Bucket = []
        underway: Future[None] | None = None
        last: Bucket | None = None
        try:
            for bucket in self._checked(buckets, scales, factors):
                if last is None:
                    self._check_frozen(fresh)
                    self._run(update.begin())
                if underway is not None:
                    underway.result()
                if last is not None:
                    underway = asyncio.run_coroutine_threadsafe(update.send(last), self._loop)
                last = bucket
            if underway is not None:
                underway.result()
            self._manifest.check_complete()
            if last is not None:
                self._run(update.end(last))
        except BaseException:
            self._run(update.abandon())
            raise
        self._check_frozen(fresh)
        return scales, factors

    def _check_frozen(self, fresh: Sequence[ServerAPI]) -> None:
        """Raise RuntimeError if these servers need the frozen weights, and only LoRA's factors are pushed. All is then pushed again."""
        if self._adapters is not None and fresh and not self._manifest.has_weights:
            raise RuntimeError(f"{fresh[0].url}: has none of the frozen weights, because it was restarted")

    def _checked(self, buckets: Iterable[Bucket], scales: Bucket, factors: Bucket) -> Iterator[Bucket]:
        """Yield each bucket after checking all its tensors, and collect its KV scales in `scales`. LoRA's factors go to `factors`."""
        for bucket in buckets:
            for name, tensor in bucket:
                self._manifest.take(name, tensor)
            scales += [(name, tensor) for name, tensor in bucket if name.endswith(SCALES)]
            if self._adapters is not None:
                factors += [(name, tensor) for name, tensor in bucket if name in self._adapters.shapes]
                bucket = [(name, tensor) for name, tensor in bucket if name not in self._adapters.shapes]
            if self._architecture.tie_word_embeddings:
                bucket = self._with_tied_head(bucket)
            if bucket:
                yield bucket

    def _with_tied_head(self, bucket: Bucket) -> Bucket:
        """Add the head to the bucket for models with a tied head whose SGLang class does not share it with the embedding."""
        copies = self._architecture.family.sglang_keeps_tied_head
        tied = [(TIED_HEAD, tensor) for name, tensor in bucket if name == EMBEDDING and copies]
        return [(name, tensor) for name, tensor in bucket if name != TIED_HEAD] + tied

    async def _servers_to_update(
        self, is_first: bool, after_failure: bool, woken: Collection[Server] = ()
    ) -> tuple[list[Server], list[ServerAPI]]:
        """The servers that answer, and those of them that do not have this run's weights, because they never got them or lost them.

        At the start of a run all servers are waited for.

        woken: servers that have just got their memory back. They cannot generate a token to show that they are healthy.
        after_failure: a server may still hang in the failed broadcast. It then answers every request except those for tokens.
        """
        limit, key = (self._config.startup_timeout_s, "startup") if is_first else (self._config.recovery_timeout_s, "recovery")
        key = f"rollout.sglang.{key}_timeout_s"
        patience = Patience(limit, key, on_gpus=self._config.device == "cuda")
        while True:
            names = dict(zip(self._servers, await versions_of(self._servers), strict=True))
            absent = {server: str(name) for server, name in names.items() if isinstance(name, Exception)}
            answers = {server: name for server, name in names.items() if isinstance(name, str)}
            fresh = {s for s, name in answers.items() if self._format.version(name) is None or s.api.url not in self._known}
            doubtful = [server for server in names if server not in (*absent, *woken) and (after_failure or server in fresh)]
            for server, healthy in zip(doubtful, await asyncio.gather(*(s.api.is_healthy() for s in doubtful)), strict=True):
                if not healthy:
                    absent[server] = f"{server.api.url} is not healthy"
            ready = [server for server in names if server not in absent]
            if not absent or (ready and not is_first):
                return ready, [server.api for server in ready if server in fresh]
            silent = "; ".join(sorted(absent.values()))
            if patience.is_over:
                raise Unavailable(f"{silent}: gave up after {limit:g} s; read the servers' logs, or raise {key}")
            patience.tell(", ".join(server.api.url for server in absent), silent)
            await asyncio.sleep(1.0)

    def probe(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Rollout]]:
        """The responses of each server that was just updated. Only the rank that pushes weights asks."""
        if self._transport is None:
            return []

        async def ask(server: Server) -> list[Rollout]:
            answers = await asyncio.gather(*(self._ask(server, p, sampling, i) for p in prompts for i in range(sampling.num_samples)))
            rollouts = [answer for answer in answers if answer is not None]
            if len(rollouts) < len(answers):
                raise RuntimeError(f"{server.api.url}: answered right after a sync with weights that are not version {self._version}")
            return rollouts

        async def ask_all() -> list[list[Rollout]]:
            return list(await asyncio.gather(*(ask(server) for server in self._updated)))

        return self._run(ask_all())


async def _open_session(key: str | None) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(headers=authorization(key), connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S))
