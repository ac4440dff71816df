"""Several stand-ins for SGLang servers in one process, slow and unreliable in a known way.

    python long_tailed_servers.py COUNT VERSION MEDIAN_TOKENS SECONDS_PER_TOKEN FAILING SEED

Prints the ports as JSON. When its standard input ends, it prints what it did as JSON and ends. A response has a log-normal number of tokens
(sigma 1, at most 16 times the median), and takes SECONDS_PER_TOKEN for each. A share FAILING of the requests fails at its end: half of them
with HTTP 503, half by a closed connection. No request fails twice in one process. A response begins with the request's seed, so whoever
receives it can tell whose it is. A request whose connection is closed is dropped, as by SGLang.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
from typing import Any

SEED_DIGITS = 512  # tokens are digits of the seed to this base


def digits_of(seed: int) -> list[int]:
    """The first four tokens of the response to a request with this seed."""
    return [seed // SEED_DIGITS**i % SEED_DIGITS for i in range(4)]


class Behaviour:
    """What all servers of the process share: how they answer, and what happened."""

    def __init__(self, version: str, median: int, seconds: float, failing: float, seed: int) -> None:
        self.version, self.median, self.seconds, self.failing, self.seed = version, median, seconds, failing, seed
        self.failed: set[int] = set()
        self.counts = {"received": 0, "answered": 0, "refused": 0, "closed": 0, "dropped": 0}
        self.in_flight = self.most_in_flight = 0

    def plan(self, seed: int) -> tuple[int, str]:
        """(tokens, how it ends) of a request."""
        rng = random.Random(f"{self.seed} {seed}")
        tokens = int(min(max(rng.lognormvariate(0.0, 1.0) * self.median, 4.0), 16.0 * self.median))
        ends = "answered"
        if seed not in self.failed and rng.random() < self.failing:
            self.failed.add(seed)
            ends = rng.choice(["refused", "closed"])
        return tokens, ends

    def response(self, seed: int, tokens: int) -> bytes:
        ids = digits_of(seed) + [17] * (tokens - 4)
        meta: dict[str, Any] = {"finish_reason": {"type": "stop"}, "weight_version": self.version}
        meta |= {"weight_versions": [{"version": self.version, "start": 0, "end": tokens}]}
        return json.dumps({"output_ids": ids, "meta_info": meta | {"output_token_logprobs": [[-0.5, i, None] for i in ids]}}).encode()


def http(status: str, body: bytes) -> bytes:
    return b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (status.encode(), len(body), body)


class Connection(asyncio.Protocol):
    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour, self.received = behaviour, b""
        self.work: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self.work is not None and not self.work.done():
            self.work.cancel()

    def data_received(self, data: bytes) -> None:
        self.received += data
        end = self.received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self.received[:end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(self.received) < end + 4 + length:
            return
        body, self.received = self.received[end + 4 : end + 4 + length], self.received[end + 4 + length :]
        path = head.split(b" ", 2)[1]
        if path == b"/generate":
            self.work = asyncio.ensure_future(self.generate(json.loads(body)))
        elif path == b"/model_info":
            self.transport.write(http("200 OK", json.dumps({"weight_version": self.behaviour.version}).encode()))
        elif path.startswith(b"/v1/loads"):
            progress = self.behaviour.counts["answered"] + self.behaviour.counts["received"]
            self.transport.write(http("200 OK", json.dumps({"loads": [{"num_used_tokens": progress}]}).encode()))
        else:
            self.transport.write(http("200 OK", b"{}"))

    async def generate(self, body: dict[str, Any]) -> None:
        behaviour, seed = self.behaviour, int(body["sampling_params"]["sampling_seed"])
        tokens, ends = behaviour.plan(seed)
        behaviour.counts["received"] += 1
        behaviour.in_flight += 1
        behaviour.most_in_flight = max(behaviour.most_in_flight, behaviour.in_flight)
        try:
            await asyncio.sleep(tokens * behaviour.seconds)
        except asyncio.CancelledError:
            behaviour.counts["dropped"] += 1
            raise
        finally:
            behaviour.in_flight -= 1
        behaviour.counts[ends] += 1
        if ends == "closed":
            self.transport.abort()
        elif ends == "refused":
            self.transport.write(http("503 Service Unavailable", b'{"error": {"message": "stand-in"}}'))
        else:
            self.transport.write(http("200 OK", behaviour.response(seed, tokens)))


async def main() -> None:
    count, version, median, seconds, failing, seed = sys.argv[1:]
    behaviour = Behaviour(version, int(median), float(seconds), float(failing), int(seed))
    loop = asyncio.get_running_loop()
    servers = [await loop.create_server(lambda: Connection(behaviour), "127.0.0.1", 0, backlog=4096) for _ in range(int(count))]
    print(json.dumps([server.sockets[0].getsockname()[1] for server in servers]), flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    print(json.dumps(behaviour.counts | {"in_flight": behaviour.in_flight, "most_in_flight": behaviour.most_in_flight}), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
