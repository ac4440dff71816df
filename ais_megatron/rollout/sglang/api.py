"""One SGLang server's HTTP endpoints, as coroutines. Nothing here decides anything; see client.py and transport.py.

Source of names and fields: SGLang 0.5.23, `entrypoints/http_server.py` and `managers/io_struct.py`.
"""

from __future__ import annotations

import json
from typing import Any

import aiohttp
import orjson

JSON_HEADERS = {"Content-Type": "application/json"}
PROBE_SECONDS = 30.0  # for a request that does no work; /health itself gives up after 20 s


class Unreachable(RuntimeError):
    """No answer: refused, reset or timed out."""


class Refused(RuntimeError):
    """An answer that says no. `status` is HTTP's; 4xx is the request's fault, 5xx the server's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ServerAPI:
    """The server at `url`; `session` carries the key, if there is one."""

    def __init__(self, url: str, session: aiohttp.ClientSession, timeout_s: float) -> None:
        self.url = url
        self._session = session
        self._timeout_s = timeout_s

    async def is_healthy(self, timeout_s: float = PROBE_SECONDS) -> bool:
        """Whether the model produces tokens: the endpoint waits for progress, or makes a token itself."""
        try:
            async with self._session.get(f"{self.url}/health", timeout=aiohttp.ClientTimeout(timeout_s)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError):
            return False

    async def weight_version(self) -> str:
        """What the last update called its weights; "default" until there is one, also after a restart."""
        return (await self._call("GET", "/model_info", PROBE_SECONDS))["weight_version"]

    async def generate(self, **body: Any) -> dict[str, Any]:
        """One response: `output_ids` and `meta_info`."""
        return await self._call("POST", "/generate", self._timeout_s, body)

    async def abort(self, prefix: str) -> None:
        """End all requests whose id begins with `prefix`."""
        await self._call("POST", "/abort_request", PROBE_SECONDS, {"rid": prefix})

    async def pause(self, mode: str) -> None:
        await self._call("POST", "/pause_generation", self._timeout_s, {"mode": mode})

    async def resume(self) -> None:
        await self._call("POST", "/continue_generation", PROBE_SECONDS, {})

    async def begin_update(self) -> None:
        """Open a weight-update session, closing one that an interrupted update left open."""
        try:
            await self._call("POST", "/begin_weight_update", self._timeout_s, {})
        except Refused as error:
            if "already open" not in str(error):
                raise
            await self.end_update()
            await self._call("POST", "/begin_weight_update", self._timeout_s, {})

    async def update(self, kind: str, **body: Any) -> None:
        """One bucket; `kind` is "tensor" or "distributed"."""
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
        """Of each rank of the server: a checksum of every tensor of the model, by the server's own names."""
        answer = await self._call("POST", "/weights_checker", self._timeout_s, {"action": "checksum"})
        return [part["checksums"] for part in answer["ranks"]]

    async def _call(self, method: str, path: str, timeout_s: float, body: dict[str, Any] | None = None) -> Any:
        timeout = aiohttp.ClientTimeout(timeout_s)
        data, headers = (None, None) if body is None else (orjson.dumps(body), JSON_HEADERS)
        try:
            async with self._session.request(method, self.url + path, data=data, headers=headers, timeout=timeout) as response:
                if response.status != 200:
                    raise Refused(response.status, f"{self.url}{path} answered {response.status}: {_message(await response.text())}")
                return _parse(await response.read())
        except TimeoutError as error:
            raise Unreachable(f"{self.url}{path} did not answer within {timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise Unreachable(f"{self.url}{path}: {error or type(error).__name__}") from error
        except ValueError as error:
            raise Unreachable(f"{self.url}{path} answered with what is not JSON: {error}") from error


def _parse(text: bytes) -> Any:
    """An answer of 512 tokens with log-probabilities is parsed three times as fast as by the standard library, which alone, however,
    knows NaN and Infinity."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)


def _message(text: str) -> str:
    return text if len(text) <= 500 else text[:500] + " …"
