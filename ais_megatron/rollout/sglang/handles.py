"""What a server on the same host needs to find a tensor in this process's memory: a file of /dev/shm, or a CUDA IPC handle.

The server gets a pickle without data (`described`), in a request to its loopback address that carries its access key. It reads the pickle
with its restricted unpickler, which accepts tensors and plain containers. We unpickle nothing that a server sends.

CUDA IPC. torch counts who has a shared tensor open. The server's count ends when it has dropped the tensor and its stream has read it, and
until then torch does not give the memory to another tensor here, even if ours is gone. So a tensor is shared once, with one reader, and is
never written to again. The handle of an expandable segment can be opened only by a process that may trace this one, which containers and
most distributions forbid, so the allocator must not use such segments (`cluster.cuda_environment`).

Source: torch 2.13 and 2.14, `multiprocessing/reductions.py` and StorageSharing.cpp; SGLang 0.5.23, `SafeUnpickler` and `patch_torch.py`.
The CUDA part has not yet run on a GPU.
"""

from __future__ import annotations

import base64
import io
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import reductions

DEVICE = 6  # the place of the GPU among the arguments of `rebuild_cuda_tensor`


def share(tensor: Tensor) -> None:
    """Move the memory of a CPU tensor into a named file in /dev/shm, which an unrelated process can open."""
    try:
        tensor.untyped_storage()._share_filename_cpu_()
    except RuntimeError as error:
        raise RuntimeError(
            f"transport=tensor needs {tensor.nbytes / 2**20:.0f} MiB of shared memory: {error}; enlarge /dev/shm or lower "
            "rollout.sync_bucket_mb"
        ) from error


class OnGPU:
    """Stands for a CUDA tensor in what is `described`, for one reader.

    gpu: its GPU, which the handle names by its UUID, because processes may number GPUs differently. SGLang looks it up.
    """

    def __init__(self, tensor: Tensor, gpu: torch.device) -> None:
        self._tensor, self._gpu = tensor, gpu

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = reductions.reduce_tensor(self._tensor)
        uuid = str(torch.cuda.get_device_properties(self._gpu).uuid)
        return rebuild, (*arguments[:DEVICE], uuid, *arguments[DEVICE + 1 :])


def described(payload: dict[str, Any]) -> str:
    """A payload as torch's multiprocessing pickles it, in base64. A shared tensor becomes a file name and a size, or a handle."""
    strategy = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")  # because sharing file descriptors needs a common parent process
    try:
        buffer = io.BytesIO()
        ForkingPickler(buffer).dump(payload)
    finally:
        torch.multiprocessing.set_sharing_strategy(strategy)
    return base64.b64encode(buffer.getvalue()).decode()
