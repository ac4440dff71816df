"""The rollout engine that consists of SGLang servers: every rank is a client, the first one also brings the weights.

    generate         one request per response, sent to the least loaded server, groups kept together for their common prefix
    update_weights   rank 0: validate, then push as one session (sglang_sync); at a server's first update check that it takes
                     every tensor and obeys its KV scales (sglang_checks)

A response counts once: it is stored under (prompt, sample), and a request is repeated only after its connection is closed,
whereupon the server drops it. Versions are "RUN-N", RUN being random: a server that was restarted, or that another run
fitted, says something else and gets no traffic until it has been refitted.

HTTP runs on one event loop in one thread of its own, so `generate` may be called from a thread while an update passes.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import torch
from torch import Tensor

from ais_megatron.batch import DROPPED, Prompt, Rollout
from ais_megatron.config import Architecture, RolloutConfig
from ais_megatron.distributed import Unavailable
from ais_megatron.rollout.access_key import authorization
from ais_megatron.rollout.engine import Bucket, SamplingParams, WeightsLost
from ais_megatron.rollout.manifest import TIED_HEAD, Manifest
from ais_megatron.rollout.sampling import check_prompt, check_sampling, response_seed
from ais_megatron.rollout.sglang_api import Refused, ServerAPI, Unreachable
from ais_megatron.rollout.sglang_checks import check_coverage, check_scales, randomize
from ais_megatron.rollout.sglang_sync import Transport, WeightUpdate

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 5  # of one response: beyond this the request itself is what breaks servers
BACKOFF = 0.1  # seconds, doubled with every attempt
HEALTH_SECONDS, HEALTH_TIMEOUT = 10.0, 30.0  # between looks at servers that are working, and for each
KEEP_ALIVE_S = 2.0  # of an idle connection: well below the 5 s after which SGLang closes it, perhaps under a request just being sent
OTHER_WEIGHTS = 200  # the "status" of a refusal of ours: the answer was fine, but not from this run's weights
SCALES = (".attn.k_scale", ".attn.v_scale")
Key = tuple[int, int]  # (position in the prompts, sample number)


@dataclass(eq=False)
class _Server:
    """api: its endpoints. usable: reachable, and its weights are ours. requests: in flight here, from this rank."""

    api: ServerAPI
    usable: bool = False
    requests: set[asyncio.Task[Any]] = field(default_factory=set)

    def lose(self, why: str) -> None:
        """Stop using it; what it was working on is done elsewhere."""
        if self.usable:
            logger.warning("rollout server %s is not used for now: %s", self.api.url, why)
        self.usable = False
        for request in list(self.requests):
            request.cancel()


@dataclass(eq=False)
class _Generation:
    """The responses of one call of `generate`, and which of them are still missing."""

    prompts: Sequence[Prompt]
    sampling: SamplingParams
    done: dict[Key, Rollout] = field(default_factory=dict)
    attempts: dict[Key, int] = field(default_factory=dict)
    home: dict[int, _Server] = field(default_factory=dict)

    def missing(self) -> list[Key]:
        keys = ((i, sample) for i in range(len(self.prompts)) for sample in range(self.sampling.num_samples))
        return [key for key in keys if key not in self.done]

    def rollouts(self) -> list[Rollout]:
        return [self.done[i, sample] for i in range(len(self.prompts)) for sample in range(self.sampling.num_samples)]


class SGLangEngine:
    """A `RolloutEngine` over running SGLang servers; see there for what its methods promise.

    Args:
        eos_id: ends a response.
        dtype: of weights that are not quantised.
        run_id: makes this run's versions its own; the same on every rank.
        key: that the servers ask for, if they do.
        transport: how weights travel; only the first rank has one, and only it updates.
        number: this rank, so that ranks do not all begin with the first server.
        on_close: called at the end of `close`, to stop servers that were started for this engine.
    """

    takes_updates_while_generating = True

    def __init__(
        self,
        architecture: Architecture,
        rollout: RolloutConfig,
        urls: Sequence[str],
        *,
        eos_id: int,
        dtype: torch.dtype,
        run_id: str,
        key: str | None = None,
        transport: Transport | None = None,
        number: int = 0,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._on_close = on_close
        self._architecture, self._rollout, self._config = architecture, rollout, rollout.sglang
        self._eos_id, self._run_id, self._transport, self._number = eos_id, run_id, transport, number
        self._manifest = Manifest.of(architecture, rollout, dtype)
        self._version = -1
        self._acceptable: set[int] = set()  # versions that a server may have: during an update the old and the new one
        self._closed = False
        self._known: set[str] = set()  # servers that passed the checks of a first update
        self._unfinished: dict[Any, _Generation] = {}  # of calls that ended in WeightsLost
        self._requests = 0
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="sglang-client", daemon=True).start()
        self._session = self._run(_open_session(key))
        self._servers = [_Server(ServerAPI(url, self._session, self._config.request_timeout_s)) for url in urls]
        router = self._config.router
        self._doors = [_Server(ServerAPI(router, self._session, self._config.request_timeout_s))] if router else self._servers

    @property
    def version(self) -> int:
        """See `RolloutEngine.version`; -1 also after an update that failed."""
        return self._version

    def health(self) -> bool:
        """Whether at least one server answers and has this run's weights."""
        if self._closed or self._version < 0:
            return False
        self._run(self._look())
        return any(server.usable for server in self._doors)

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
        for server in self._doors:
            if server.requests:
                server.lose("the run ends")
                await asyncio.gather(server.api.abort(self._request_prefix), return_exceptions=True)
        if self._transport is not None:
            await self._transport.shut_down()
        await self._session.close()

    def _run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run on the client's loop; an interrupt here ends the work there."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    # ---- generation -------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """See `RolloutEngine.generate`.

        A response whose log-probabilities are missing or not finite comes back with finish_reason `DROPPED`.

        Raises:
            WeightsLost: no server is left that has this run's weights, though one answers. Push, then call again with the
                same arguments: finished responses are kept.
            Unavailable: no server answered for `rollout.sglang.recovery_timeout_s`.
        """
        if self._closed or self._version < 0:
            state = "is closed" if self._closed else "has no complete weights: none were pushed, or the last update failed"
            raise RuntimeError(f"the SGLang rollout engine {state}; generate after a successful update_weights")
        check_sampling(sampling)
        for prompt in prompts:
            check_prompt(prompt, sampling, self._architecture)
        self._acceptable = {self._version}
        call = (tuple(prompt.index for prompt in prompts), sampling)
        generation = self._unfinished.pop(call, None) or _Generation(prompts, sampling)
        try:
            self._run(self._complete(generation))
        except WeightsLost:
            self._unfinished[call] = generation
            raise
        return generation.rollouts()

    async def _complete(self, generation: _Generation) -> None:
        await self._look()
        while missing := generation.missing():
            if not any(server.usable for server in self._doors):
                await self._wait_for_a_server()
            queue = deque(missing)
            workers = min(len(queue), self._config.max_concurrency * max(len(self._servers), 1))
            watch = asyncio.ensure_future(self._watch())
            work = [asyncio.ensure_future(self._work(generation, queue)) for _ in range(workers)]
            try:
                await asyncio.gather(*work)
            finally:
                for task in (watch, *work):
                    task.cancel()
                await asyncio.gather(watch, *work, return_exceptions=True)

    async def _work(self, generation: _Generation, queue: deque[Key]) -> None:
        """Take one missing response after the other, until none is left or no server is."""
        while queue:
            server = self._choose(generation, queue[0])
            if server is None:
                return
            key = queue.popleft()
            request = asyncio.ensure_future(self._request(server, generation, key))
            server.requests.add(request)
            try:
                rollout = await request
            except (Unreachable, Refused, asyncio.CancelledError) as error:
                if asyncio.current_task().cancelling():  # the work as a whole ends, not only this request
                    raise
                queue.appendleft(key)
                await self._failed(server, generation, key, error)
            else:
                if rollout is None:
                    queue.appendleft(key)
                    await self._failed(server, generation, key, Refused(OTHER_WEIGHTS, "answered with other weights than this run's"))
                else:
                    generation.done[key] = rollout
            finally:
                server.requests.discard(request)

    def _choose(self, generation: _Generation, key: Key) -> _Server | None:
        """The server of the prompt's other samples if it has room, since it has the prefix; else the least loaded one."""
        home = generation.home.get(key[0])
        if home is not None and home.usable and len(home.requests) < self._config.max_concurrency:
            return home
        usable = [(len(s.requests), (i - self._number) % len(self._doors), s) for i, s in enumerate(self._doors) if s.usable]
        if not usable:
            return None
        generation.home[key[0]] = chosen = min(usable, key=lambda entry: entry[:2])[2]
        return chosen

    async def _request(self, server: _Server, generation: _Generation, key: Key) -> Rollout | None:
        """One response; None if the server sampled it with weights that are not this run's."""
        prompt, sampling = generation.prompts[key[0]], generation.sampling
        self._requests += 1
        answer = await server.api.generate(
            rid=f"{self._request_prefix}{self._requests}",
            input_ids=list(prompt.token_ids),
            sampling_params={
                "max_new_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or -1,
                "stop_token_ids": [self._eos_id],
                "sampling_seed": response_seed(sampling, prompt.index, key[1]),  # heeded under --enable-deterministic-inference
            },
            return_logprob=True,
            logprob_start_len=-1,
            return_routed_experts=self._rollout.return_routed_experts,
        )
        return self._to_rollout(prompt, answer)

    @property
    def _request_prefix(self) -> str:
        return f"{self._run_id}-{self._number}-"

    async def _failed(self, server: _Server, generation: _Generation, key: Key, error: BaseException) -> None:
        """Decide what a failed request says about the server; it is back in the queue already."""
        if isinstance(error, asyncio.CancelledError):
            return  # the server was lost while it worked on this: no fault of the request
        status = error.status if isinstance(error, Refused) else None
        if status in (401, 403):
            raise RuntimeError(f"{error}; rollout.sglang.key_file must name the file that the servers were started with") from error
        if status is not None and 400 <= status < 500 and status not in (408, 429):
            raise RuntimeError(f"prompt {generation.prompts[key[0]].index}: {error}") from error
        if status == OTHER_WEIGHTS and server.api.url == self._config.router:
            raise WeightsLost(f"a server behind {server.api.url} {error}")
        attempt = generation.attempts[key] = generation.attempts.get(key, 0) + 1
        if attempt >= MAX_ATTEMPTS:
            raise RuntimeError(f"prompt {generation.prompts[key[0]].index}: {attempt} attempts failed, the last one: {error}") from error
        if status in (None, OTHER_WEIGHTS):
            server.lose(str(error))
        await asyncio.sleep(min(BACKOFF * 2**attempt, 5.0))

    def _to_rollout(self, prompt: Prompt, answer: dict[str, Any]) -> Rollout | None:
        meta = answer["meta_info"]
        reason = (meta.get("finish_reason") or {}).get("type")
        if reason == "abort":
            raise Refused(503, f"aborted by the server: {meta['finish_reason'].get('message')}")
        spans = [(self._own_version(span["version"]), span["end"] - span["start"]) for span in meta.get("weight_versions") or []]
        spans = spans or [(self._own_version(meta["weight_version"]), len(answer["output_ids"]))]
        if any(version is None for version, _ in spans):
            return None
        tokens = tuple(answer["output_ids"])
        logprobs = tuple(entry[0] for entry in meta.get("output_token_logprobs") or ())
        versions = tuple(span for span in spans if span[1])
        # (One value that is not finite makes the sum so; no finite log-probabilities add up to infinity.)
        if not tokens or len(logprobs) != len(tokens) or None in logprobs or not math.isfinite(sum(logprobs)):
            stand_in, version = prompt.token_ids[-1:], min(version for version, _ in spans)
            return Rollout(prompt, stand_in, (0.0,), DROPPED, version, self._routing(None, len(prompt.token_ids)))
        routed = self._routing(meta.get("routed_experts"), len(prompt.token_ids) + len(tokens) - 1)
        # The engine reports the end-of-sequence token as a stop, whether or not it was also the last one allowed.
        finish = "stop" if tokens[-1] == self._eos_id else "length"
        return Rollout(prompt, tokens, logprobs, finish, min(version for version, _ in versions), routed, versions)

    def _own_version(self, text: str) -> int | None:
        run, _, number = text.rpartition("-")
        return int(number) if run == self._run_id else None

    def _routing(self, text: str | None, rows: int) -> Tensor | None:
        """SGLang's base64 int32 ``[rows, num_layers, experts_per_token]``; -1 throughout where there is none to tell."""
        if not self._rollout.return_routed_experts:
            return None
        shape = (rows, self._architecture.num_hidden_layers, self._architecture.num_experts_per_tok)
        if text is None:
            return torch.full(shape, -1, dtype=torch.int32)
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.int32).view(shape)

    # ---- which servers can be used ----------------------------------------------------------------------------------

    async def _look(self) -> None:
        """Find out of every server whether it answers, and with weights that this run may use now."""
        for server, answer in zip(self._doors, await self._versions(self._doors), strict=True):
            if isinstance(answer, Exception):
                server.lose(str(answer))
            elif self._own_version(answer) in self._acceptable or server.api.url == self._config.router:
                server.usable = True
            else:
                server.lose("its weights are not this run's present ones; it is refitted at the next sync")

    async def _versions(self, servers: Sequence[_Server]) -> list[str | Exception]:
        """What each server calls its weights, or why it does not answer."""

        async def ask(server: _Server) -> str | Exception:
            try:
                return await server.api.weight_version()
            except (Unreachable, Refused) as error:
                return error

        return list(await asyncio.gather(*(ask(server) for server in servers)))

    async def _watch(self) -> None:
        """While requests are out: notice servers that hang, and take back those that were only out of reach for a while."""
        strikes: dict[_Server, int] = {}
        while True:
            await asyncio.sleep(HEALTH_SECONDS)
            if len(self._acceptable) > 1:  # an update is under way, during which servers are paused
                continue
            if any(not server.usable for server in self._doors):
                await self._look()
            for server in [server for server in self._doors if server.usable and server.requests]:
                strikes[server] = 0 if await server.api.is_healthy(HEALTH_TIMEOUT) else strikes.get(server, 0) + 1
                if strikes[server] >= 2:
                    server.lose("it hangs: two health checks in a row failed")

    async def _wait_for_a_server(self) -> None:
        """Return once a server can be used; see `generate` for what is raised otherwise."""
        deadline = time.monotonic() + self._config.recovery_timeout_s
        while True:
            await self._look()
            if any(server.usable for server in self._doors):
                return
            for server in self._doors:
                if await server.api.is_healthy():
                    raise WeightsLost(f"{server.api.url} answers, but no longer has this run's weights (version {self._version})")
            if time.monotonic() > deadline:
                raise Unavailable(
                    f"no rollout server has answered for {self._config.recovery_timeout_s:g} s "
                    f"({', '.join(server.api.url for server in self._doors)}); see the servers' logs, or raise "
                    "rollout.sglang.recovery_timeout_s"
                )
            await asyncio.sleep(1.0)

    # ---- weights ----------------------------------------------------------------------------------------------------

    def update_weights(self, buckets: Iterable[Bucket], version: int) -> None:
        """See `RolloutEngine.update_weights`. Ranks without a transport only take part in producing `buckets`.

        Raises:
            ValueError: a tensor that does not belong; nothing of its bucket has been sent.
            Unavailable: no server answered for `rollout.sglang.recovery_timeout_s` (at first: startup_timeout_s).
            RuntimeError: a server refused or was lost in the middle, or does not obey its weights or scales. Servers keep
                out of use until an update succeeds.
        """
        if self._closed:
            raise RuntimeError("the SGLang rollout engine is closed")
        if version < 0:
            raise ValueError(f"version={version}: must be 0 or more; -1 means that there are no weights")
        is_first, self._version = not self._known and self._version < 0, -1
        self._acceptable.add(version)
        if self._transport is None:
            for _ in buckets:
                pass
            self._version = version
            return
        servers, fresh = self._run(self._servers_to_update(is_first))
        self._known -= {server.url for server in fresh}
        noise = self._run(randomize(fresh))
        scales = self._push(buckets, servers, version)
        self._run(check_coverage(fresh, noise))
        if scales:
            for server in fresh:
                self._run(check_scales(server, self._transport, scales, self._name(version), self._architecture.vocab_size))
        self._known |= {server.url for server in servers}
        self._version = version

    def _push(self, buckets: Iterable[Bucket], servers: Sequence[ServerAPI], version: int) -> Bucket:
        """The session itself; returns the KV scales that were in it."""
        update = WeightUpdate(self._transport, servers, self._config.pause, self._name(version))
        self._manifest.begin()
        scales: Bucket = []
        underway: Future[None] | None = None
        try:
            self._run(update.begin())
            last: Bucket | None = None
            for bucket in self._checked(buckets, scales):
                if underway is not None:
                    underway.result()
                if last is not None:
                    underway = asyncio.run_coroutine_threadsafe(update.send(last), self._loop)
                last = bucket
            if underway is not None:
                underway.result()
            self._manifest.check_complete()
            self._run(update.end(last))
        except BaseException:
            self._run(update.abandon())
            raise
        return scales

    def _checked(self, buckets: Iterable[Bucket], scales: Bucket) -> Iterator[Bucket]:
        """Each bucket once all its tensors have been found in order; scales are noted on the way."""
        for bucket in buckets:
            for name, tensor in bucket:
                self._manifest.take(name, tensor)
            scales += [(name, tensor) for name, tensor in bucket if name.endswith(SCALES)]
            kept = [(n, t) for n, t in bucket if not (n == TIED_HEAD and self._architecture.tie_word_embeddings)]
            if kept:
                yield kept

    async def _servers_to_update(self, is_first: bool) -> tuple[list[ServerAPI], list[ServerAPI]]:
        """Those that answer, and which of them have never had, or no longer have, weights of this run. At the start of a run
        all servers are waited for."""
        limit, key = (self._config.startup_timeout_s, "startup") if is_first else (self._config.recovery_timeout_s, "recovery")
        deadline = time.monotonic() + limit
        while True:
            versions = dict(zip(self._servers, await self._versions(self._servers), strict=True))
            answering = [s.api for s, version in versions.items() if isinstance(version, str)]
            fresh = [s.api for s, version in versions.items() if isinstance(version, str) and self._own_version(version) is None]
            fresh += [server for server in answering if server.url not in self._known and server not in fresh]
            ready = [server for server in answering if server not in fresh or await server.is_healthy()]
            if len(ready) == len(self._servers) or (ready and not is_first):
                return ready, [server for server in fresh if server in ready]
            if time.monotonic() > deadline:
                silent = {str(v) for v in versions.values() if isinstance(v, Exception)} or {"not healthy"}
                raise Unavailable(
                    f"{'; '.join(sorted(silent))}: waited {limit:g} s; see the servers' logs, or raise rollout.sglang.{key}_timeout_s"
                )
            await asyncio.sleep(1.0)

    def _name(self, version: int) -> str:
        return f"{self._run_id}-{version}"

    def probe(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Rollout]]:
        """The responses of each server that can be used, asked one by one; of all ranks only the updating one asks."""
        if self._transport is None:
            return []

        async def ask(server: _Server) -> list[Rollout]:
            generation = _Generation(prompts, sampling)
            answers = await asyncio.gather(*(self._request(server, generation, key) for key in generation.missing()))
            if any(answer is None for answer in answers):
                raise RuntimeError(f"{server.api.url}: answers with other weights than version {self._version}, right after a sync")
            return list(answers)

        async def ask_all() -> list[list[Rollout]]:
            await self._look()
            return list(await asyncio.gather(*(ask(server) for server in self._doors if server.usable)))

        return self._run(ask_all())


async def _open_session(key: str | None) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(headers=authorization(key), connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_S))
