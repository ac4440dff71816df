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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from ais_megatron.config import Config
from ais_megatron.ports import free_port
from ais_megatron.rollout.engine import Bucket
from ais_megatron.rollout.sglang_api import Refused, ServerAPI, Unreachable
from ais_megatron.rollout.sglang_server import write_model_folder
from ais_megatron.sglang_config import LOOPBACK


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

    async def open(self, servers: Sequence[ServerAPI]) -> None: ...

    async def send(self, servers: Sequence[ServerAPI], bucket: FlatBucket, ending: dict[str, Any]) -> None:
        """ending: of the request that carries the last bucket (version, flush); of the others it is `NOT_LAST`."""
        ...

    async def close(self, servers: Sequence[ServerAPI], ending: dict[str, Any]) -> None: ...

    async def shut_down(self) -> None:
        """Give back what outlives an update."""
        ...


NOT_LAST: dict[str, Any] = {"flush_cache": False}


class SharedMemory:
    """The bucket in a file of /dev/shm that the server maps. Two buffers: one may be read while the next is filled."""

    in_session = True

    def __init__(self, tp: int) -> None:
        self._tp = tp
        self._buffers = [torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)]

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
    """One process group of the trainer (rank 0) and every rank of every server; made anew when the servers change."""

    in_session = True

    def __init__(self, tp: int, device: torch.device, name: str, timeout_s: float) -> None:
        self._tp, self._device, self._name, self._timeout = tp, device, name, timedelta(seconds=timeout_s)
        self._group: dist.ProcessGroup | None = None
        self._members: list[ServerAPI] = []
        self._number = 0
        self._thread = ThreadPoolExecutor(1, "weight-broadcast")

    async def open(self, servers: Sequence[ServerAPI]) -> None:
        if self._group is not None and list(servers) == self._members:
            return
        await self._leave()
        self._number += 1
        name, world = f"{self._name}-{self._number}", 1 + self._tp * len(servers)
        address = _own_address_towards(servers[0].url)
        port = free_port(host="")
        backend = "nccl" if self._device.type == "cuda" else "gloo"
        shared = dict(master_address=address, master_port=port, world_size=world, group_name=name, backend=backend)
        mine = asyncio.get_running_loop().run_in_executor(self._thread, self._join, address, port, world, name, backend)
        offsets = {server.url: 1 + i * self._tp for i, server in enumerate(servers)}
        await each(servers, lambda server: server.join_group(rank_offset=offsets[server.url], **shared))
        self._group, self._members = await mine, list(servers)

    def _join(self, address: str, port: int, world: int, name: str, backend: str) -> dist.ProcessGroup:
        """As SGLang's init_custom_process_group does on its side: torch offers no public way to a group that crosses jobs."""
        store, _, _ = next(c10d.rendezvous(f"tcp://{address}:{port}", 0, world, timeout=self._timeout))
        store.set_timeout(self._timeout)
        store = c10d.PrefixStore(name, store)
        group, _ = c10d._new_process_group_helper(
            world, 0, [], c10d.Backend(backend), store, group_name=name, backend_options=None, timeout=self._timeout
        )
        c10d._world.pg_group_ranks[group] = {i: i for i in range(world)}
        return group

    async def send(self, servers: Sequence[ServerAPI], bucket: FlatBucket, ending: dict[str, Any]) -> None:
        flat = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self._device)
        bucket.copy_into(flat)
        body = {
            "names": [name for name, _ in bucket.parts],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket.parts],
            "shapes": [list(tensor.shape) for _, tensor in bucket.parts],
            "group_name": f"{self._name}-{self._number}",
            "load_format": "flattened_bucket",
            **ending,
        }
        mine = asyncio.get_running_loop().run_in_executor(self._thread, self._broadcast, flat)
        try:
            await each(servers, lambda server: server.update("distributed", **body))
            await mine
        except Exception:
            self._forget()
            raise

    def _broadcast(self, flat: Tensor) -> None:
        if flat.is_cuda:
            torch.cuda.set_device(flat.device)  # the device is a thread's own
        dist.broadcast(flat, src=0, group=self._group)

    def _forget(self) -> None:
        """After a failure somebody may be missing from the group for good, and our thread may wait for it: leave both behind."""
        if self._group is not None and self._device.type == "cuda":
            self._group.abort()
        self._group, self._members = None, []
        self._thread.shutdown(wait=False)
        self._thread = ThreadPoolExecutor(1, "weight-broadcast")

    async def close(self, servers: Sequence[ServerAPI], ending: dict[str, Any]) -> None:
        pass

    async def _leave(self) -> None:
        if self._group is None:
            return
        group, self._group = self._group, None
        name = f"{self._name}-{self._number}"
        await each(self._members, lambda server: server.leave_group(name), tolerate=(Unreachable, Refused))
        dist.destroy_process_group(group)

    async def shut_down(self) -> None:
        await self._leave()
        self._thread.shutdown(wait=False)


class SharedFolder:
    """A folder per update, written bucket by bucket and read by the servers at the end. The previous one is then deleted."""

    in_session = False

    def __init__(self, folder: Path, write_config: Callable[[Path], object]) -> None:
        self._root, self._write_config = folder, write_config
        self._folder = folder
        self._index: dict[str, str] = {}
        self._number = 0

    async def open(self, servers: Sequence[ServerAPI]) -> None:
        self._number += 1
        self._folder, self._index = self._root / f"weights-{self._number:06d}", {}
        shutil.rmtree(self._folder, ignore_errors=True)
        self._write_config(self._folder)

    async def send(self, servers: Sequence[ServerAPI], bucket: FlatBucket, ending: dict[str, Any]) -> None:
        name = f"model-{len(set(self._index.values())) + 1:05d}.safetensors"
        tensors = {key: tensor.cpu() for key, tensor in bucket.parts}
        await asyncio.get_running_loop().run_in_executor(None, lambda: save_file(tensors, self._folder / name, metadata={"format": "pt"}))
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


def make_transport(config: Config, urls: Sequence[str], device: torch.device, run_id: str) -> Transport:
    """The transport that the configuration asks for; "auto" is shared memory where all servers are on this host.

    device: of the tensors to send.
    """
    sglang, kind = config.rollout.sglang, config.rollout.sglang.transport
    if kind == "auto":
        kind = "tensor" if all(urlsplit(url).hostname in LOOPBACK for url in urls) else "distributed"
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
        # servers run without a prefix cache (see sglang_server).
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
        """Let requests continue after a failure; what they then produce carries the old version or fails."""
        for leave in (ServerAPI.end_update, ServerAPI.resume):
            await each(self._servers, leave, tolerate=(Unreachable, Refused))


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
