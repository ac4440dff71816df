"""Weights on their way to SGLang servers: one update session, bucket by bucket, by one of three transports.

    pause -> begin -> bucket, bucket, … -> end -> continue          the last bucket flushes the KV cache and names the version

distributed   a broadcast from the trainer to every rank of every server (NCCL, gloo on CPUs): any number of hosts
tensor        shared memory: one host; no pickled data, only a description of where the bytes lie
disk          a Hugging Face folder that every server reads: any shared file system, the slowest

A bucket travels as one flat byte tensor. Its tensors lie in order of falling item size, because SGLang views the bytes in
place and a float32 must not begin at an odd multiple of a float8. At most two buckets exist at a time: one on its way,
one being exported.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import shutil
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ais_megatron.batch import Bucket
from ais_megatron.cluster.ports import free_port
from ais_megatron.config import Config
from ais_megatron.rollout.sglang.api import Refused, ServerAPI, Unreachable
from ais_megatron.rollout.sglang.server import write_model_folder
from ais_megatron.rollout.sglang.weight_group import WeightGroup, in_thread


@dataclass(frozen=True)
class FlatBucket:
    """parts: (name, tensor), falling item size. nbytes: of all of them."""

    parts: list[tuple[str, Tensor]]
    nbytes: int

    @classmethod
    def of(cls, bucket: Bucket) -> FlatBucket:
        parts = sorted(((name, tensor.contiguous()) for name, tensor in bucket), key=lambda part: -part[1].element_size())
        return cls(parts, sum(tensor.nbytes for _, tensor in parts))

    def copy_into(self, flat: Tensor) -> None:
        """Lay the bytes end to end; `flat` is uint8 ``[nbytes]`` on any device."""
        start = 0
        for _, tensor in self.parts:
            flat[start : start + tensor.nbytes].copy_(tensor.view(-1).view(torch.uint8))
            start += tensor.nbytes

    def layout(self) -> list[SimpleNamespace]:
        """What SGLang's FlattenedTensorMetadata holds, as the only plain type that its unpickler admits."""
        metadata, start = [], 0
        for name, tensor in self.parts:
            end = start + tensor.nbytes
            metadata.append(
                SimpleNamespace(name=name, shape=tensor.shape, dtype=tensor.dtype, start_idx=start, end_idx=end, numel=end - start)
            )
            start = end
        return metadata


class Transport(Protocol):
    """How buckets reach servers between `open` and `close` of one update."""

    in_session: bool  # whether buckets are loaded one by one, inside SGLang's update session

    async def lost(self, servers: Sequence[ServerAPI]) -> None:
        """Before `open`: these are silent, or new processes at an old address. They belong to nothing that an update left behind."""
        ...

    async def open(self, servers: Sequence[ServerAPI]) -> None: ...

    async def send(self, servers: Sequence[ServerAPI], bucket: FlatBucket, ending: dict[str, Any]) -> None:
        """ending: of the request that carries the last bucket (version, flush); of the others it is `NOT_LAST`."""
        ...

    async def close(self, servers: Sequence[ServerAPI], ending: dict[str, Any]) -> None: ...

    async def shut_down(self) -> None:
        """Give back what outlives an update."""
        ...


NOT_LAST: dict[str, Any] = {"flush_cache": False}
LET_GO_S, LEAVE_S = 30.0, 60.0  # how long others are waited for after a failure; how long leaving a group may take
ABANDON_S = 60.0


class SharedMemory:
    """The bucket in a file of /dev/shm that the server maps. Two buffers: one may be read while the next is filled."""

    in_session = True

    def __init__(self, tp: int) -> None:
        self._tp = tp
        self._buffers = [torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)]

    async def lost(self, servers: Sequence[ServerAPI]) -> None:
        pass

    async def open(self, servers: Sequence[ServerAPI]) -> None:
        pass

    async def send(self, servers: Sequence[ServerAPI], bucket: FlatBucket, ending: dict[str, Any]) -> None:
        self._buffers.reverse()
        if self._buffers[0].nbytes < bucket.nbytes:
            self._buffers[0] = torch.empty(bucket.nbytes, dtype=torch.uint8)
            _share(self._buffers[0])
        bucket.copy_into(self._buffers[0])
        payload = _describe({"flattened_tensor": self._buffers[0][: bucket.nbytes], "metadata": bucket.layout()})
        body = {"serialized_named_tensors": [payload] * self._tp, "load_format": "flattened_bucket", **ending}
        await each(servers, lambda server: server.update("tensor", **body))

    async def close(self, servers: Sequence[ServerAPI], ending: dict[str, Any]) -> None:
        pass

    async def shut_down(self) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in self._buffers]


class Broadcast:
    """One process group of the trainer (rank 0) and every rank of every server; made anew when the servers change.

    A member that dies in the middle leaves the others waiting. The first failure on either side therefore ends our side of the
    group, which lets go of those that still wait for us, and nobody is waited for longer than `LET_GO_S` after it. The group then
    stays behind at the surviving servers: asking them to leave it could make them wait for the member that is gone.
    """

    in_session = True

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
        """The result of `mine`, once all servers have done `theirs` at the same time. RuntimeError if anybody fails."""
        tasks = [asyncio.ensure_future(theirs(server)) for server in servers]
        try:
            await asyncio.wait([mine, *tasks], return_when=asyncio.FIRST_EXCEPTION)
            if any(part.done() and part.exception() for part in (mine, *tasks)):
                await self._abort()
                await asyncio.wait([mine, *tasks], timeout=LET_GO_S)
        except BaseException:  # an interrupt: nothing can be waited for
            if self._group is not None:
                in_thread(self._group.abort)
            self._group, self._members = None, []
            raise
        finally:
            for task in tasks:
                task.cancel()
        for task in tasks:  # what a server says names it, and is the cause more often than what torch says
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error
        if mine.exception():
            raise RuntimeError(f"{doing} {', '.join(server.url for server in servers)} failed: {mine.exception()}") from mine.exception()
        return mine.result()

    async def _abort(self) -> None:
        """Bounded: NCCL's own abort may hang too, and its thread is then left behind."""
        group, self._group, self._members = self._group, None, []
        if group is not None:
            await asyncio.wait([in_thread(group.abort)], timeout=LET_GO_S)

    async def close(self, servers: Sequence[ServerAPI], ending: dict[str, Any]) -> None:
        pass

    async def _leave(self, is_whole: bool = True) -> None:
        """PyTorch treats the end of an NCCL group as collective, so both sides leave at the same time. Where a member is gone
        (not `is_whole`) there is nothing to wait for: our side aborts."""
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


class SharedFolder:
    """A folder per update, written bucket by bucket and read by the servers at the end. The previous one is then deleted."""

    in_session = False

    def __init__(self, folder: Path, write_config: Callable[[Path], object]) -> None:
        self._root, self._write_config = folder, write_config
        self._folder = folder
        self._index: dict[str, str] = {}
        self._number = 0

    async def lost(self, servers: Sequence[ServerAPI]) -> None:
        pass

    async def open(self, servers: Sequence[ServerAPI]) -> None:
        self._number += 1
        self._folder, self._index = self._root / f"weights-{self._number:06d}", {}
        shutil.rmtree(self._folder, ignore_errors=True)
        self._write_config(self._folder)

    async def send(self, servers: Sequence[ServerAPI], bucket: FlatBucket, ending: dict[str, Any]) -> None:
        name = f"model-{len(set(self._index.values())) + 1:05d}.safetensors"
        tensors = {key: tensor.cpu() for key, tensor in bucket.parts}
        write = partial(save_file, tensors, self._folder / name, metadata={"format": "pt"})
        try:
            await asyncio.get_running_loop().run_in_executor(None, write)
        except SafetensorError as error:
            raise RuntimeError(f"{self._folder / name}: the weights could not be written ({error}); is the disk full?") from error
        self._index |= dict.fromkeys(tensors, name)

    async def close(self, servers: Sequence[ServerAPI], ending: dict[str, Any]) -> None:
        (self._folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": self._index}))
        # (Servers start with load format "dummy", which an update from disk would otherwise inherit.)
        body = {"model_path": str(self._folder.resolve()), "load_format": "safetensors", **ending}
        await each(servers, lambda server: server.update_from_disk(**body))
        await self.shut_down(keep=self._folder)

    async def shut_down(self, keep: Path | None = None) -> None:
        for old in self._root.glob("weights-*"):
            if old != keep:
                shutil.rmtree(old, ignore_errors=True)


def make_transport(config: Config, device: torch.device, run_id: str) -> Transport:
    """The transport that the configuration asks for; "auto" is shared memory where all servers are on this host.

    device: of the tensors to send.
    """
    sglang, kind = config.rollout.sglang, config.rollout.sglang.resolved_transport
    if kind == "tensor":
        return SharedMemory(sglang.tp)
    if kind == "distributed":
        return Broadcast(sglang.tp, device, run_id, sglang.request_timeout_s)
    folder = Path(sglang.sync_dir or f"{config.run.dir}/weight_sync")
    return SharedFolder(folder, lambda into: write_model_folder(config.architecture, config.rollout, into))


class WeightUpdate:
    """One update of all `servers`: call `begin`, `send` for every bucket but the last, and `end` with that one."""

    def __init__(self, transport: Transport, servers: Sequence[ServerAPI], pause: str, version: str) -> None:
        self._transport, self._servers, self._pause = transport, servers, pause
        # Old weights' KV must not outlive them, except under requests that `in_place` lets continue: then a flush is refused, and
        # servers run without a prefix cache (see server.py).
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
        """Let requests continue after a failure; what they then produce carries the old version or fails.

        Bounded: a server that still waits for weights answers nothing.
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
    """Do `action` at all servers side by side; the first error is raised once all have answered."""
    results = await asyncio.gather(*(action(server) for server in servers), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException) and not isinstance(result, tolerate):
            raise result


def _share(tensor: Tensor) -> None:
    """Move a CPU tensor's memory into a named file of /dev/shm, which a process that is no relative of ours can open."""
    try:
        tensor.untyped_storage()._share_filename_cpu_()
    except RuntimeError as error:
        raise RuntimeError(
            f"transport=tensor needs {tensor.nbytes / 2**20:.0f} MiB of shared memory: {error}; enlarge /dev/shm or lower "
            "rollout.sync_bucket_mb"
        ) from error


def _describe(payload: dict[str, Any]) -> str:
    """torch's multiprocessing form of a payload, in base64; a shared tensor in it is a file name and a size."""
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")  # file descriptors would need a common parent process
    try:
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(payload)
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)
    return base64.b64encode(buffer.getvalue()).decode()


def _own_address_towards(url: str) -> str:
    """This host's address on the way to `url`."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing: it only asks for the route
        return probe.getsockname()[0]
