"""Weights in memory of GPUs that servers open by CUDA IPC handles. A file stands for what the driver would open.

One test lets SGLang's own unpickler read the request, and its own code take the bucket apart.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import subprocess
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import reductions

from ais_megatron.batch import Bucket
from ais_megatron.rollout.sglang.transport import FlatBucket
from ais_megatron.rollout.sglang.transports import make_transport
from tests.helpers.ranks import RankPool
from tests.helpers.sglang import SGLANG_PYTHON, sglang_config
from tests.virtual_cuda import machine

TWO_SERVERS = dict(device="cuda", transport="cuda_ipc", num_servers=2, tp=2, port=30000)
READER = """
import json, sys
from types import SimpleNamespace
import torch

opened = []
def open_file(device, handle, size, offset, *counter_and_event):
    opened.append(device)
    return torch.UntypedStorage.from_file(handle.decode(), False, size)

torch.UntypedStorage._new_shared_cuda = staticmethod(open_file)
torch.cuda._lazy_init = lambda: None
torch.cuda.device_count = lambda: 8
torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=f"GPU-{device}")

from sglang.srt.utils import MultiprocessingSerializer
from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

monkey_patch_torch_reductions()
found = []
for payload in json.load(sys.stdin):
    data = MultiprocessingSerializer.deserialize(payload)
    tensors = FlattenedTensorBucket(flattened_tensor=data["flattened_tensor"], metadata=data["metadata"]).reconstruct_tensors()
    found.append({name: [str(t.dtype), t.float().tolist()] for name, t in tensors})
json.dump({"opened": opened, "found": found}, sys.stdout)
"""


def bucket(device: str = "cpu") -> Bucket:
    weights = torch.arange(12.0).view(3, 4)
    tensors = {"quantised": weights.to(torch.float8_e4m3fn), "plain": weights.bfloat16(), "scale": torch.tensor([0.5])}
    return [(name, tensor.to(device)) for name, tensor in tensors.items()]


class Server:
    """Keeps what it is asked to load."""

    def __init__(self, url: str) -> None:
        self.url, self.asked = url, []

    async def update(self, kind: str, **body: Any) -> None:
        self.asked.append((kind, body))


def push(rank: int, folder: Path) -> list[list[str]]:
    """The payloads of a push to two servers with two ranks each."""
    numbers = count()

    def reduce_tensor(tensor: Tensor) -> tuple[Any, tuple[Any, ...]]:
        """What torch makes of a CUDA tensor, with a file for its handle."""
        assert tensor.is_cuda
        path = folder / str(next(numbers))
        path.write_bytes(tensor.cpu().numpy().tobytes())
        place = (torch.Tensor, tensor.size(), tensor.stride(), 0, torch.storage.TypedStorage, tensor.dtype)
        memory = (str(path).encode(), tensor.nbytes, 0, False, b"counter", 0, b"event", True)
        return reductions.rebuild_cuda_tensor, (*place, 0, *memory)

    gpu = torch.device("cuda", 0)
    transport = make_transport(sglang_config("dense", "bf16", **TWO_SERVERS), gpu, "run")
    servers = [Server(f"http://127.0.0.1:{port}") for port in (30001, 30000)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reductions, "reduce_tensor", reduce_tensor)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=f"GPU-{device.index}"))
        asyncio.run(transport.send(servers, FlatBucket.of(bucket("cuda")), {"weight_version": "run-1"}))
    ((kind, body),) = servers[0].asked
    assert kind == "tensor" and body["load_format"] == "flattened_bucket" and body["weight_version"] == "run-1"
    return [server.asked[0][1]["serialized_named_tensors"] for server in servers]


def refusal(rank: int, gpus: int, settings: str, on: str) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTORCH_ALLOC_CONF", settings)
        patch.setattr(torch.cuda, "device_count", lambda: gpus)
        with pytest.raises(ValueError) as caught:
            make_transport(sglang_config("dense", "bf16", **TWO_SERVERS), torch.device(on), "run")
    return str(caught.value)


def test_every_rank_of_every_server_gets_memory_of_its_own_gpu(gpus: RankPool, tmp_path: Path) -> None:
    (payloads,) = gpus.run(1, push, folder=tmp_path)
    pickles = [[base64.b64decode(payload) for payload in of_server] for of_server in payloads]
    assert [[next(i for i in range(8) if b"GPU-%d" % i in text) for text in of_server] for of_server in pickles] == [[2, 3], [0, 1]]
    flat = torch.empty(FlatBucket.of(bucket()).nbytes, dtype=torch.uint8)
    FlatBucket.of(bucket()).copy_into(flat)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 4, "one copy for each reader"
    assert all(path.read_bytes() == flat.numpy().tobytes() for path in files)
    assert all(len(text) < 2000 for of_server in pickles for text in of_server), "no data travels in the request"


@pytest.mark.parametrize(
    ("there", "settings", "on", "message"),
    [
        (3, "", "cuda", "num_servers=2 \\* tp=2 are 4 GPUs, but the trainer's rank 0 sees only 3"),
        (machine.NUM_GPUS, "expandable_segments:True", "cuda", "PYTORCH_ALLOC_CONF=expandable_segments:True makes memory"),
        (machine.NUM_GPUS, "", "cpu", "the trainer runs on a CPU"),
    ],
)
def test_memory_that_no_server_could_open(gpus: RankPool, there: int, settings: str, on: str, message: str) -> None:
    (said,) = gpus.run(1, refusal, gpus=there, settings=settings, on=on)
    assert re.search(f"rollout.sglang.transport=cuda_ipc: .*{message}", said), said


@pytest.mark.sglang
def test_sglang_reads_the_handles(gpus: RankPool, tmp_path: Path) -> None:
    (payloads,) = gpus.run(1, push, folder=tmp_path)
    request = json.dumps([payload for of_server in payloads for payload in of_server])
    run = subprocess.run([SGLANG_PYTHON, "-c", READER], input=request, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    answer = json.loads(run.stdout.splitlines()[-1])
    assert answer["opened"] == [2, 3, 0, 1]
    expected = {name: [str(tensor.dtype), tensor.float().tolist()] for name, tensor in bucket()}
    assert answer["found"] == [expected] * 4
