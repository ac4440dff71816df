"""The HTTP endpoints of one SGLang server, as coroutines. The decisions are in client.py and transport.py.

Source of names and fields: SGLang 0.5.23, `entrypoints/http_server.py` and `managers/io_struct.py`.
"""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import orjson

from ais_megatron.rollout.sglang.plugin import LIST_ADAPTERS

JSON_HEADERS = {"Content-Type": "application/json"}
PROBE_SECONDS = 30.0  # for connecting, and for requests that do no work; /health itself gives up after 20 s
ACTIVITY = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens", "total_prefill_uncached_tokens")


class Unreachable(RuntimeError):
    """The server did not answer: the connection was refused or reset, or timed out."""


class Refused(RuntimeError):
    """The server answered with an error. `status` is the HTTP status: 4xx if the request is wrong, 5xx if the server failed."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ServerAPI:
    """The server at `url`. `session` sends the access key, if there is one. A request of a weight sync may take `timeout_s`."""

    def __init__(self, url: str, session: aiohttp.ClientSession, timeout_s: float) -> None:
        self.url = url
        self._session = session
        self._timeout_s = timeout_s

    async def is_healthy(self, timeout_s: float = PROBE_SECONDS) -> bool:
        """Whether the model generates tokens. The endpoint waits for progress, or generates a token itself."""
        try:
            async with self._session.get(f"{self.url}/health", timeout=aiohttp.ClientTimeout(timeout_s)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def weight_version(self) -> str:
        """The name that the last update gave its weights; "default" before the first update and after a restart."""
        return (await self._call("GET", "/model_info", PROBE_SECONDS))["weight_version"]

    async def activity(self) -> list[list[int]]:
        """Numbers for each of the server's schedulers, of which some change while it works: requests that run and wait, tokens in the KV
        cache, and tokens prefilled since the start. SGLang writes them every few steps, and stops when it hangs."""
        answer = await self._call("GET", "/v1/loads?include=core", PROBE_SECONDS)
        return [[load.get(number, 0) for number in ACTIVITY] for load in answer.get("loads", [])]

    async def generate(self, **body: Any) -> dict[str, Any]:
        """Generate one response: `output_ids` and `meta_info`. There is no time limit, because a long response in a long queue may take
        hours. The dispatcher watches the server's progress instead."""
        return await self._call("POST", "/generate", None, body)

    async def abort(self, prefix: str) -> None:
        """End all requests whose id begins with `prefix`."""
        await self._call("POST", "/abort_request", PROBE_SECONDS, {"rid": prefix})

    async def pause(self, mode: str) -> None:
        await self._call("POST", "/pause_generation", self._timeout_s, {"mode": mode})

    async def resume(self) -> None:
        await self._call("POST", "/continue_generation", PROBE_SECONDS, {})

    async def wait_until_idle(self) -> None:
        """Wait until the scheduler has no work, and flush the KV cache. SGLang ends with an assertion if memory is released before that."""
        path = f"/flush_cache?timeout={self._timeout_s:g}"
        await self._call("POST", path, self._timeout_s + PROBE_SECONDS, {}, is_json=False)

    async def release_memory(self) -> None:
        """Free the memory of weights, KV cache and CUDA graphs. Nothing keeps the weights."""
        await self._call("POST", "/release_memory_occupation", self._timeout_s, {})

    async def take_memory_back(self) -> None:
        """The reverse of `release_memory`. The weights are undefined until the next update."""
        await self._call("POST", "/resume_memory_occupation", self._timeout_s, {})

    async def begin_update(self) -> None:
        """Open a weight-update session. If an interrupted update left one open, it is closed first."""
        try:
            await self._call("POST", "/begin_weight_update", self._timeout_s, {})
        except Refused as error:
            if "already open" not in str(error):
                raise
            await self.end_update()
            await self._call("POST", "/begin_weight_update", self._timeout_s, {})

    async def update(self, kind: str, **body: Any) -> None:
        """Load one bucket; `kind` is "tensor" or "distributed"."""
        await self._call("POST", f"/update_weights_from_{kind}", self._timeout_s, body)

    async def end_update(self) -> None:
        await self._call("POST", "/end_weight_update", self._timeout_s, {})

    async def update_from_disk(self, **body: Any) -> None:
        await self._call("POST", "/update_weights_from_disk", self._timeout_s, body)

    async def join_group(self, **body: Any) -> None:
        await self._call("POST", "/init_weights_update_group", self._timeout_s, body)

    async def leave_group(self, name: str) -> None:
        await self._call("POST", "/destroy_weights_update_group", PROBE_SECONDS, {"group_name": name})

    async def randomize_weights(self) -> None:
        """Overwrite every tensor of the model."""
        await self._call("POST", "/weights_checker", self._timeout_s, {"action": "reset_tensors"})

    async def checksums(self) -> list[dict[str, str]]:
        """For each rank of the server, the checksum of every tensor of the model under the server's own names."""
        answer = await self._call("POST", "/weights_checker", self._timeout_s, {"action": "checksum"})
        return [part["checksums"] for part in answer["ranks"]]

    async def load_adapter(self, **body: Any) -> None:
        await self._call("POST", "/load_lora_adapter_from_tensors", self._timeout_s, body)

    async def unload_adapter(self, name: str) -> None:
        """SGLang first waits until no request uses the adapter."""
        await self._call("POST", "/unload_lora_adapter", self._timeout_s, {"lora_name": name})

    async def adapters(self) -> list[dict[str, str]]:
        """For each rank of the server, the digest of every adapter that it holds, by name. Our plugin answers this."""
        answer = await self._call("POST", "/weights_checker", self._timeout_s, {"action": LIST_ADAPTERS, "selector": "target"})
        return [part["checksums"] for part in answer["ranks"]]

    async def set_weight_version(self, name: str) -> None:
        """Rename the weights. Requests in flight go on."""
        body = {"new_version": name, "abort_all_requests": False}
        await self._call("POST", "/update_weight_version", self._timeout_s, body)

    async def _call(self, method: str, path: str, timeout_s: float | None, body: dict[str, Any] | None = None, is_json: bool = True) -> Any:
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=PROBE_SECONDS)
        data, headers = (None, None) if body is None else (orjson.dumps(body), JSON_HEADERS)
        try:
            async with self._session.request(method, self.url + path, data=data, headers=headers, timeout=timeout) as response:
                if response.status != 200:
                    raise Refused(response.status, f"{self.url}{path} answered HTTP {response.status}: {_message(await response.text())}")
                return _parse(await response.read()) if is_json else await response.text()
        except TimeoutError as error:
            raise Unreachable(f"{self.url}{path} did not answer within {timeout_s or PROBE_SECONDS:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Unreachable(f"{self.url}{path}: {error or type(error).__name__}") from error
        except ValueError as error:
            raise Unreachable(f"{self.url}{path} answered with something that is not JSON: {error}") from error


def _parse(text: bytes) -> Any:
    """Parse JSON. For 512 tokens with log-probabilities, this parser is three times as fast as the standard library. Only the standard
    library accepts NaN and Infinity."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)


def _message(text: str) -> str:
    return text if len(text) <= 500 else text[:500] + " …"
