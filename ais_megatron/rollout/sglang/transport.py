"""Sends weights to SGLang servers, bucket by bucket in one update session, by one of four transports.

    pause -> begin -> bucket, bucket, … -> end -> continue          the last bucket flushes the KV cache and names the version

distributed   a broadcast from the trainer to every rank of every server (NCCL, gloo on CPUs); any number of hosts
tensor        shared memory on one host; the request contains no data, only where the bytes are
cuda_ipc      the same with memory of the servers' GPUs, which rank 0 fills
disk          a Hugging Face folder that every server reads; any shared file system, but the slowest

A bucket is sent as one flat byte tensor. Its tensors are ordered by decreasing item size, because SGLang views the bytes in place, and a
float32 must be aligned. At most two buckets exist at the same time: one is being sent, the other exported.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ais_megatron.batch import Bucket
from ais_megatron.cluster.cuda_environment import ALLOCATOR_VARIABLES, EXPANDABLE
from ais_megatron.cluster.ports import free_port
from ais_megatron.config import Config
from ais_megatron.rollout.sglang.api import Refused, ServerAPI, Unreachable
from ais_megatron.rollout.sglang.handles import OnGPU, described, share
from ais_megatron.rollout.sglang.server import server_url, write_model_folder
from ais_megatron.rollout.sglang.weight_group import WeightGroup, in_thread


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


class Transport(Protocol):
    """How buckets reach the servers between `open` and `close` of one update."""

    in_session: bool  # whether buckets are loaded one by one, within SGLang's update session

    async def lost(self, servers: Sequence[ServerAPI]) -> None:
        """Called before `open`. These servers do not answer, or are new processes at old addresses. They are in no existing group."""
        ...

    async def open(self, servers: Sequence[ServerAPI]) -> None: ...

    async def send(self, servers: Sequence[ServerAPI], bucket: FlatBucket, ending: dict[str, Any]) -> None:
        """ending: fields of the request with the last bucket (version, flush); `NOT_LAST` for the other buckets."""
        ...

    async def close(self, servers: Sequence[ServerAPI], ending: dict[str, Any]) -> None: ...

    async def shut_down(self) -> None:
        """Release what is kept between updates."""
        ...


NOT_LAST: dict[str, Any] = {"flush_cache": False}
LET_GO_S, LEAVE_S = 30.0, 60.0  # how long to wait for the others after a failure; how long leaving a group may take
ABANDON_S = 60.0


class SharedMemory:
    """The bucket is in a file of /dev/shm, which the server maps. There are two buffers, so one can be filled while the other is read."""

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
            share(self._buffers[0])
        bucket.copy_into(self._buffers[0])
        content = {"flattened_tensor": self._buffers[0][: bucket.nbytes], "metadata": bucket.layout()}

        async def send(server: ServerAPI) -> None:
            # Every rank gets a description of its own. torch counts a reader per description, and the last reader to leave deletes the
            # file. With a description that two ranks share, that would be one reader too early.
            payloads = [described(content) for _ in range(self._tp)]
            await server.update("tensor", serialized_named_tensors=payloads, load_format="flattened_bucket", **ending)

        await each(servers, send)

    async def close(self, servers: Sequence[ServerAPI], ending: dict[str, Any]) -> None:
        pass

    async def shut_down(self) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in self._buffers]


class CudaMemory:
    """The bucket is in memory of the server's own GPUs, which it opens by CUDA IPC handles (`handles`). Not yet run on a GPU.

    Rank 0 flattens the bucket once and copies it from GPU to GPU. So no server needs a CUDA context on another GPU, only rank 0 does.

    gpus: of each server, by its address: the GPU of each of its ranks. No two ranks have the same one.
    """

    in_session = True

    def __init__(self, gpus: dict[str, list[torch.device]], source: torch.device) -> None:
        self._gpus, self._source = gpus, source

    async def lost(self, servers: Sequence[ServerAPI]) -> None:
        pass

    async def open(self, servers: Sequence[ServerAPI]) -> None:
        pass

    async def send(self, servers: Sequence[ServerAPI], bucket: FlatBucket, ending: dict[str, Any]) -> None:
        whole, metadata = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self._source), bucket.layout()
        bucket.copy_into(whole)
        copies: list[Tensor] = []  # until all servers have answered

        def on(gpu: torch.device) -> str:
            copies.append(torch.empty_like(whole, device=gpu).copy_(whole))
            return described({"flattened_tensor": OnGPU(copies[-1], gpu), "metadata": metadata})

        async def send(server: ServerAPI) -> None:
            payloads = [on(gpu) for gpu in self._gpus[server.url]]
            await server.update("tensor", serialized_named_tensors=payloads, load_format="flattened_bucket", **ending)

        await each(servers, send)

    async def close(self, servers: Sequence[ServerAPI], ending: dict[str, Any]) -> None:
        torch.cuda.ipc_collect()  # free what servers had open when we dropped it

    async def shut_down(self) -> None:
        pass


class Broadcast:
    """One process group of the trainer's rank 0 and every rank of every server. A new one is made when the servers change.

    If a member dies in the middle, the others wait for it. So at the first failure on either side, our side aborts the group, which
    frees the servers that still wait for us. After that we wait for the others for at most `LET_GO_S`. The surviving servers keep
    the broken group, because leaving it could make them wait for the member that is gone.
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

    async def close(self, servers: Sequence[ServerAPI], ending: dict[str, Any]) -> None:
        pass

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


class SharedFolder:
    """Each update writes a folder, bucket by bucket. The servers read it at the end, and then the previous folder is deleted."""

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
        # (Servers start with load format "dummy", which an update from disk would inherit.)
        body = {"model_path": str(self._folder.resolve()), "load_format": "safetensors", **ending}
        await each(servers, lambda server: server.update_from_disk(**body))
        await self.shut_down(keep=self._folder)

    async def shut_down(self, keep: Path | None = None) -> None:
        for old in self._root.glob("weights-*"):
            if old != keep:
                shutil.rmtree(old, ignore_errors=True)


def make_transport(config: Config, device: torch.device, run_id: str) -> Transport:
    """The transport of the configuration. "auto" is shared memory if all servers are on this host.

    device: device of the tensors to send.

    Raises:
        ValueError: transport=cuda_ipc is not possible in this process.
    """
    sglang, kind = config.rollout.sglang, config.rollout.sglang.resolved_transport
    if kind == "tensor":
        return SharedMemory(sglang.tp)
    if kind == "cuda_ipc":
        return CudaMemory(_gpus_of_servers(config, device), device)
    if kind == "distributed":
        return Broadcast(sglang.tp, device, run_id, sglang.request_timeout_s)
    folder = Path(sglang.sync_dir or f"{config.run.dir}/weight_sync")
    return SharedFolder(folder, lambda into: write_model_folder(config.architecture, config.rollout, into))


def _gpus_of_servers(config: Config, device: torch.device) -> dict[str, list[torch.device]]:
    """The GPU of each rank of each server that the trainer starts, by the server's address (see `server_command`)."""
    sglang, key = config.rollout.sglang, "rollout.sglang.transport=cuda_ipc"
    if device.type != "cuda":
        raise ValueError(f"{key}: the trainer runs on a CPU, which has no CUDA memory; set rollout.sglang.transport=tensor")
    if (needed := sglang.num_servers * sglang.tp) > torch.cuda.device_count():
        raise ValueError(
            f"{key}: rollout.sglang.num_servers={sglang.num_servers} * tp={sglang.tp} are {needed} GPUs, but the trainer's rank 0 sees "
            f"only {torch.cuda.device_count()}; let it see all (CUDA_VISIBLE_DEVICES), or set rollout.sglang.transport=tensor"
        )
    for name in ALLOCATOR_VARIABLES:
        if EXPANDABLE in os.environ.get(name, ""):
            raise ValueError(f"{key}: {name}={os.environ[name]} makes memory that no other process can open; take {EXPANDABLE} out of it")
    ranks = range(sglang.tp)
    return {
        server_url(sglang.host, sglang.port + number): [torch.device("cuda", number * sglang.tp + rank) for rank in ranks]
        for number in range(sglang.num_servers)
    }


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


def _own_address_towards(url: str) -> str:
    """The address of this host in the network that leads to `url`."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((parts.hostname, parts.port or 80))  # sends nothing, only looks up the route
        return probe.getsockname()[0]
