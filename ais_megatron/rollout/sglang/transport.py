"""What an update of the servers' weights does, bucket by bucket, and what it needs of a transport (`transports`).

    pause -> begin -> bucket, bucket, … -> end -> continue          the last bucket flushes the KV cache and names the version

A bucket is sent as one flat byte tensor. Its tensors are ordered by decreasing item size, because SGLang views the bytes in place, and a
float32 must be aligned. At most two buckets exist at the same time: one is being sent, the other exported.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ais_megatron.batch import Bucket
from ais_megatron.rollout.sglang.api import Refused, ServerAPI, Unreachable


@dataclass(frozen=True)
class FlatBucket:
    """The tensors of a bucket, in the order in which their bytes are sent."""

    parts: list[tuple[str, Tensor]]
    """(name, tensor), by decreasing item size."""
    nbytes: int
    """Bytes of all tensors together."""

    @classmethod
    def of(cls, bucket: Bucket) -> FlatBucket:
        parts = sorted(((name, tensor.contiguous()) for name, tensor in bucket), key=lambda part: -part[1].element_size())
        return cls(parts, sum(tensor.nbytes for _, tensor in parts))

    def copy_into(self, flat: Tensor) -> None:
        """Copy all bytes into `flat`, one tensor after the other. `flat` is uint8 ``[nbytes]`` on any device."""
        start = 0
        for _, tensor in self.parts:
            flat[start : start + tensor.nbytes].copy_(tensor.view(-1).view(torch.uint8))
            start += tensor.nbytes

    def layout(self) -> list[SimpleNamespace]:
        """The fields of SGLang's FlattenedTensorMetadata, in the only plain type that its unpickler accepts."""
        metadata, start = [], 0
        for name, tensor in self.parts:
            end = start + tensor.nbytes
            metadata.append(
                SimpleNamespace(name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=start, end_idx=end, numel=end - start)
            )
            start = end
        return metadata


class Transport:
    """How buckets reach the servers between `open` and `close` of one update. What a transport has no need of does nothing."""

    in_session = True
    """Whether buckets are loaded one by one, within SGLang's update session."""

    async def lost(self, servers: Sequence[ServerAPI]) -> None:
        """Called before `open`. These servers do not answer, or are new processes at old addresses. They are in no existing group."""

    async def open(self, servers: Sequence[ServerAPI]) -> None:
        """The next buckets go to these servers."""

    async def send(self, servers: Sequence[ServerAPI], bucket: FlatBucket, ending: dict[str, Any]) -> None:
        """ending: fields of the request with the last bucket (version, flush); `NOT_LAST` for the other buckets."""
        raise NotImplementedError

    async def close(self, servers: Sequence[ServerAPI], ending: dict[str, Any]) -> None:
        """All buckets have been sent."""

    async def shut_down(self) -> None:
        """Release what is kept between updates."""


NOT_LAST: dict[str, Any] = {"flush_cache": False}
ABANDON_S = 60.0


class WeightUpdate:
    """One update of all `servers`. Call `begin`, then `send` for every bucket except the last, and `end` with the last one.

    version: what the weights are called from then on; None: they keep their name."""

    def __init__(self, transport: Transport, servers: Sequence[ServerAPI], pause: str, version: str | None) -> None:
        self._transport, self._servers, self._pause = transport, servers, pause
        # The KV of old weights must not stay in the cache, except for requests that continue with `in_place`. SGLang then refuses
        # a flush, and servers run without a prefix cache (see server.py).
        self._ending = {"flush_cache": pause == "retract", "weight_version": version}

    async def begin(self) -> None:
        await self._transport.open(self._servers)
        await each(self._servers, lambda server: server.pause(self._pause))
        if self._transport.in_session:
            await each(self._servers, lambda server: server.begin_update())

    async def send(self, bucket: Bucket) -> None:
        await self._transport.send(self._servers, FlatBucket.of(bucket), NOT_LAST)

    async def end(self, last: Bucket) -> None:
        await self._transport.send(self._servers, FlatBucket.of(last), self._ending)
        await self._transport.close(self._servers, self._ending)
        if self._transport.in_session:
            await each(self._servers, lambda server: server.end_update())
        await each(self._servers, lambda server: server.resume())

    async def abandon(self) -> None:
        """Let requests continue after a failure. Their tokens have the old version, or they fail.

        This has a time limit, because a server that still waits for weights does not answer.
        """
        for leave in (ServerAPI.end_update, ServerAPI.resume):
            await each(self._servers, partial(_in_time, leave), tolerate=(Unreachable, Refused, TimeoutError))


async def _in_time(action: Callable[[ServerAPI], Awaitable[None]], server: ServerAPI) -> None:
    await asyncio.wait_for(action(server), ABANDON_S)


async def each(
    servers: Sequence[ServerAPI],
    action: Callable[[ServerAPI], Awaitable[None]],
    tolerate: tuple[type[Exception], ...] = (),
) -> None:
    """Do `action` on all servers at the same time. After all have answered, the first error is raised."""
    results = await asyncio.gather(*(action(server) for server in servers), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, tolerate):
            raise result
