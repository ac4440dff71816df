"""A server that speaks SGLang's HTTP as far as the client needs it, in a thread: for what a real one will not do on demand."""

from __future__ import annotations

import asyncio
import base64
import pickle
import threading
from collections import Counter
from typing import Any

from aiohttp import web

from ais_megatron.rollout.sglang.plugin import LIST_ADAPTERS, digest

RUN = "ab12"
"""The run whose weights the `servers` of a test have, in version 0."""


class FakeServer:
    """Answers each request with `answer(body)`, by default two tokens, the second of them the end of sequence.

    version: what its weights are called. delay_s: of work before each answer. status: of /generate. is_hung: answers nothing at all.
    is_stuck: no work goes on and it is not healthy, but other questions are answered, as by an SGLang whose scheduler hangs.
    slots: requests that it works on at the same time. forgets: number of requests that it will never answer. tokens: work done.
    asked: how often a response to each first prompt token was begun. failing: paths that answer with status 503.
    adapters: digests of LoRA factors by name. loses_adapters: it answers 200, and keeps none. ignores_adapters: they change nothing.
    """

    def __init__(self, version: str = "default") -> None:
        self.version, self.delay_s, self.status, self.is_hung = version, 0.0, 200, False
        self.is_stuck, self.slots, self.forgets, self.tokens = False, asyncio.Semaphore(10**6), 0, 0
        self.adapters: dict[str, str] = {}
        self.loses_adapters = self.ignores_adapters = False
        self.key: str | None = None
        self.failing: set[str] = set()
        self.asked: Counter[int] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.calls: list[str] = []
        self.in_flight = self.most_in_flight = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        threading.Thread(target=self._serve, daemon=True).start()
        assert self._ready.wait(10)

    def answer(self, body: dict[str, Any]) -> dict[str, Any]:
        return response([7, 2], [-0.5, -0.25], self.version, input_token_logprobs=self.prompt_logprobs(body))

    def stop(self) -> None:
        """Close the port and every connection."""
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result(10)

    def start(self) -> None:
        """Open the same port again."""
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._port = 0
        self._loop.run_until_complete(self._open())
        self._ready.set()
        self._loop.run_forever()

    async def _open(self) -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port)
        await site.start()
        self._port = site._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def _handle(self, request: web.Request) -> web.Response:
        path = request.match_info["path"]
        self.calls.append(path)
        while self.is_hung:
            await asyncio.sleep(0.05)
        if self.key is not None and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        if path in self.failing or (self.is_stuck and path == "health"):
            return web.json_response({}, status=503)
        if path == "model_info":
            return web.json_response({"weight_version": self.version})
        if path == "v1/loads":
            return web.json_response({"loads": [{"num_running_reqs": self.in_flight, "num_used_tokens": self.tokens}]})
        body = await request.json() if request.can_read_body else {}
        if path != "generate":
            return web.json_response({"success": True} | self._control(path, body))
        if body.get("lora_path", "") not in {"", *self.adapters}:
            self.version = "default"  # it was restarted just now
            return web.json_response({"error": {"message": "Got LoRA adapter that has never been loaded"}}, status=400)
        self.bodies.append(body)
        self.asked[body["input_ids"][0]] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.forgets:
                self.forgets -= 1
                await asyncio.sleep(600)
            async with self.slots:
                await self._work()
            while self.is_hung:
                await asyncio.sleep(0.05)
        finally:
            self.in_flight -= 1
        if self.status != 200:
            return web.json_response({"error": {"message": "no"}}, status=self.status)
        return web.json_response(self.answer(body))

    def _control(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        if path == "load_lora_adapter_from_tensors" and not self.loses_adapters:
            (payload,) = body["serialized_named_tensors"]
            self.adapters[body["lora_name"]] = digest(pickle.loads(base64.b64decode(payload)).values())
        elif path == "unload_lora_adapter":
            del self.adapters[body["lora_name"]]
        elif path == "update_weight_version":
            self.version = body["new_version"]
        elif path == "weights_checker" and body["action"] == LIST_ADAPTERS:
            return {"ranks": [{"checksums": dict(self.adapters)}]}
        elif path == "weights_checker":
            return {"ranks": [{"checksums": {"weight": str(self.calls.count("end_weight_update"))}}]}
        return {}

    def prompt_logprobs(self, body: dict[str, Any]) -> list[list[Any]]:
        """A prompt's tokens are less likely with an adapter, if adapters are not ignored."""
        value = -2.0 if body.get("lora_path") and not self.ignores_adapters else -1.0
        return [[value, token] for token in body["input_ids"]]

    async def _work(self) -> None:
        left = self.delay_s
        while left > 0:
            await asyncio.sleep(min(left, 0.05))
            if not self.is_stuck:
                left -= 0.05
                self.tokens += 1


def response(tokens: list[int], logprobs: list[float | None], version: str, reason: str = "stop", **meta: Any) -> dict[str, Any]:
    """What SGLang sends for one request."""
    spans = [{"version": version, "start": 0, "end": len(tokens)}]
    entries = [[value, token, None] for token, value in zip(tokens, logprobs, strict=True)]
    meta = {"finish_reason": {"type": reason}, "weight_version": version, "weight_versions": spans, "output_token_logprobs": entries} | meta
    return {"output_ids": tokens, "meta_info": meta}
