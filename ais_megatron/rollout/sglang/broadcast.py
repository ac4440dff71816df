"""Weights by broadcast, from the trainer to every rank of every server: over NCCL, or over gloo on CPUs, to any number of hosts."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

import torch

from ais_megatron.cluster.ports import free_port
from ais_megatron.rollout.sglang.api import Refused, ServerAPI, Unreachable
from ais_megatron.rollout.sglang.transport import FlatBucket, Transport, each
from ais_megatron.rollout.sglang.weight_group import WeightGroup, in_thread

LET_GO_S, LEAVE_S = 30.0, 60.0  # how long to wait for the others after a failure; how long leaving a group may take


class Broadcast(Transport):
    """One process group of the trainer's rank 0 and every rank of every server. A new one is made when the servers change.

    If a member dies in the middle, the others wait for it. So at the first failure on either side, our side aborts the group, which
    frees the servers that still wait for us. After that we wait for the others for at most `LET_GO_S`. The surviving servers keep
    the broken group, because leaving it could make them wait for the member that is gone.
    """

    def __init__(self, tp: int, device: torch.device, name: str, timeout_s: float) -> None:
        self._tp, self._device, self._name, self._timeout_s = tp, device, name, timeout_s
        self._group: WeightGroup | None = None
        self._members: list[ServerAPI] = []
        self._number = 0

    async def lost(self, servers: Sequence[ServerAPI]) -> None:
        if any(server in self._members for server in servers):
            await self._leave(is_whole=False)

    async def open(self, servers: Sequence[ServerAPI]) -> None:
        if self._group is not None and list(servers) == self._members:
            return
        await self._leave()
        self._number += 1
        name, world = self._group_name, 1 + self._tp * len(servers)
        address = _own_address_towards(servers[0].url)
        port = free_port(host="")
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        shared = dict(master_address=address, master_port=port, world_size=world, group_name=name, backend=backend)
        offsets = {server: 1 + i * self._tp for i, server in enumerate(servers)}
        mine = in_thread(lambda: WeightGroup(address, port, world, name, backend, self._timeout_s))
        self._group = await self._both("joining the group of", mine, servers, lambda s: s.join_group(rank_offset=offsets[s], **shared))
        self._members = list(servers)

    @property
    def _group_name(self) -> str:
        return f"{self._name}-{self._number}"

    async def send(self, servers: Sequence[ServerAPI], bucket: FlatBucket, ending: dict[str, Any]) -> None:
        flat = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self._device)
        bucket.copy_into(flat)
        body = {
            "names": [name for name, _ in bucket.parts],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket.parts],
            "shapes": [list(tensor.shape) for _, tensor in bucket.parts],
            "group_name": self._group_name,
            "load_format": "flattened_bucket",
            **ending,
        }
        group = self._group
        assert group is not None, "buckets are sent between open and close"
        mine = in_thread(lambda: group.broadcast(flat))
        await self._both("broadcasting weights to", mine, servers, lambda server: server.update("distributed", **body))

    async def _both(
        self, doing: str, mine: asyncio.Future[Any], servers: Sequence[ServerAPI], theirs: Callable[[ServerAPI], Awaitable[None]]
    ) -> Any:
        """Run `mine` here and `theirs` on all servers at the same time, and return the result of `mine`.

        Raises RuntimeError if any of them fails."""
        tasks = [asyncio.ensure_future(theirs(server)) for server in servers]
        try:
            await asyncio.wait([mine, *tasks], return_when=asyncio.FIRST_EXCEPTION)
            if any(part.done() and part.exception() for part in (mine, *tasks)):
                await self._abort()
                await asyncio.wait([mine, *tasks], timeout=LET_GO_S)
        except BaseException:  # an interrupt, after which nothing is waited for
            if self._group is not None:
                in_thread(self._group.abort)
            self._group, self._members = None, []
            raise
        finally:
            for task in tasks:
                task.cancel()
        # A server's error names the server, and is the cause more often than torch's error. A server that is gone is the cause of what
        # the servers that lost it answer.
        errors = [error for task in tasks if task.done() and not task.cancelled() and (error := task.exception())]
        if errors:
            raise next((error for error in errors if isinstance(error, Unreachable)), errors[0])
        if mine.exception():
            raise RuntimeError(f"{doing} {', '.join(server.url for server in servers)} failed: {mine.exception()}") from mine.exception()
        return mine.result()

    async def _abort(self) -> None:
        """Abort the group within a time limit. NCCL's abort may hang too; then its thread is abandoned."""
        group, self._group, self._members = self._group, None, []
        if group is not None:
            await asyncio.wait([in_thread(group.abort)], timeout=LET_GO_S)

    async def _leave(self, is_whole: bool = True) -> None:
        """Leave the group. In PyTorch the end of an NCCL group is collective, so both sides leave at the same time. If a member is gone
        (not `is_whole`), our side aborts instead."""
        if self._group is None:
            return
        group, members, name = self._group, self._members, self._group_name
        mine = in_thread(group.shut_down if is_whole else group.abort)
        theirs = asyncio.ensure_future(each(members, lambda server: server.leave_group(name), tolerate=(Unreachable, Refused)))
        await asyncio.wait([mine, theirs], timeout=LEAVE_S)
        theirs.cancel()
        if not mine.done() or mine.exception():
            await self._abort()
        self._group, self._members = None, []

    async def shut_down(self) -> None:
        await self._leave()


def _own_address_towards(url: str) -> str:
    """The address of this host in the network that leads to `url`."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing, only looks up the route
        return probe.getsockname()[0]
