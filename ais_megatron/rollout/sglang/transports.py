"""The four ways in which weights reach SGLang servers.

distributed   a broadcast from the trainer to every rank of every server (`broadcast`); any number of hosts
tensor        shared memory on one host; the request contains no data, only where the bytes are
cuda_ipc      the same with memory of the servers' GPUs, which rank 0 fills
disk          a Hugging Face folder that every server reads; any shared file system, but the slowest
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ais_megatron.cluster.cuda_environment import ALLOCATOR_VARIABLES, EXPANDABLE
from ais_megatron.config import Config
from ais_megatron.rollout.sglang.api import ServerAPI
from ais_megatron.rollout.sglang.broadcast import Broadcast
from ais_megatron.rollout.sglang.handles import OnGPU, described, share
from ais_megatron.rollout.sglang.server import server_url, write_model_folder
from ais_megatron.rollout.sglang.transport import FlatBucket, Transport, each


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


class SharedMemory(Transport):
    """The bucket is in a file of /dev/shm, which the server maps. There are two buffers, so one can be filled while the other is read."""

    def __init__(self, tp: int) -> None:
        self._tp = tp
        self._buffers = [torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)]

    async def send(self, servers: Sequence[ServerAPI], bucket: FlatBucket, ending: dict[str, Any]) -> None:
        self._buffers.reverse()
        if self._buffers[0].nbytes < bucket.nbytes:
            self._buffers[0] = torch.empty(bucket.nbytes, dtype=torch.uint8)
            share(self._buffers[0])
        bucket.copy_into(self._buffers[0])
        content = {"flattened_tensor": self._buffers[0][: bucket.nbytes], "metadata": bucket.layout()}

        # Every rank gets a description of its own. torch counts a reader per description, and the last reader to leave deletes the
        # file. With a description that two ranks share, that would be one reader too early.
        await _load(servers, lambda server: [described(content) for _ in range(self._tp)], ending)

    async def shut_down(self) -> None:
        self._buffers = [torch.empty(0, dtype=torch.uint8) for _ in self._buffers]


class CudaMemory(Transport):
    """The bucket is in memory of the server's own GPUs, which it opens by CUDA IPC handles (`handles`). Not yet run on a GPU.

    Rank 0 flattens the bucket once and copies it from GPU to GPU. So no server needs a CUDA context on another GPU, only rank 0 does.

    gpus: of each server, by its address: the GPU of each of its ranks. No two ranks have the same one.
    """

    def __init__(self, gpus: dict[str, list[torch.device]], source: torch.device) -> None:
        self._gpus, self._source = gpus, source

    async def send(self, servers: Sequence[ServerAPI], bucket: FlatBucket, ending: dict[str, Any]) -> None:
        whole, metadata = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self._source), bucket.layout()
        bucket.copy_into(whole)
        copies: list[Tensor] = []  # until all servers have answered

        def on(gpu: torch.device) -> str:
            copies.append(torch.empty_like(whole, device=gpu).copy_(whole))
            return described({"flattened_tensor": OnGPU(copies[-1], gpu), "metadata": metadata})

        await _load(servers, lambda server: [on(gpu) for gpu in self._gpus[server.url]], ending)

    async def close(self, servers: Sequence[ServerAPI], ending: dict[str, Any]) -> None:
        torch.cuda.ipc_collect()  # free what servers had open when we dropped it


async def _load(servers: Sequence[ServerAPI], descriptions: Callable[[ServerAPI], list[str]], ending: dict[str, Any]) -> None:
    """Let all servers load the bucket that `descriptions` of a server tell its ranks where to find."""

    async def send(server: ServerAPI) -> None:
        await server.update("tensor", serialized_named_tensors=descriptions(server), load_format="flattened_bucket", **ending)

    await each(servers, send)


class SharedFolder(Transport):
    """Each update writes a folder, bucket by bucket. The servers read it at the end, and then the previous folder is deleted."""

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
