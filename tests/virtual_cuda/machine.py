"""A machine with virtual GPUs: what `torch.cuda` and `torch.distributed` say on it. `install` makes this process one of its ranks.

Streams and events do nothing, because a CPU runs everything in order. NCCL groups are gloo's underneath; `devices` sees to it
that only CUDA tensors enter them. A group that is asked for as gloo's stays one.
"""

from __future__ import annotations

import sys
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.cuda.nccl
import torch.distributed as dist

from tests.virtual_cuda import flash_linear_attention
from tests.virtual_cuda.devices import CUDA, enter_for_good, inside, looked_at
from tests.virtual_cuda.missing import stand_in_for

NUM_GPUS, MEMORY = 8, 80 << 30


def install(packages: Path | None = None, transformer_engine: bool = False, fla: bool = False) -> None:
    """Give this process virtual GPUs, for good. Before Megatron is imported.

    packages: a folder of unpacked wheels that come before what is installed. transformer_engine: one of them is that. fla: the
    stand-in for FLA is there.
    """
    warnings.filterwarnings("ignore")
    if packages is not None:
        sys.path.insert(0, str(packages))
        stand_in_for("triton")  # Megatron 0.19 imports kernels that are written in it; every torch for GPUs comes with it
    _answer_torch_cuda()
    if fla:
        flash_linear_attention.install()
    if transformer_engine:
        from tests.virtual_cuda import transformer_engine as te

        te.install(packages)
    from ais_megatron.policy import cpu_backend  # finds GPUs, and so leaves torch.cuda as it is

    cpu_backend.import_without_compiler()
    cpu_backend.replace_random_states()
    cpu_backend.mend_gloo()
    _answer_torch_distributed()
    _answer_kernels()
    if transformer_engine:
        te.replace_fused_permutation()
    threading.Thread.run = inside(threading.Thread.run)  # type: ignore[method-assign]
    torch.autograd._engine_run_backward = looked_at(torch.autograd._engine_run_backward)
    enter_for_good()


def with_idle_gpus(packages: Path) -> None:
    """Make this process one of a CPU job on a machine that has GPUs, and packages that work on GPUs only."""
    sys.path.insert(0, str(packages))
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: NUM_GPUS


class _Stream:
    """A stream or an event."""

    cuda_stream, device, device_index = 0, CUDA, 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None: ...

    def _nothing(self, *args: Any, **kwargs: Any) -> _Stream:
        return self

    wait_stream = wait_event = record_event = record = wait = synchronize = _nothing

    def query(self) -> bool:
        return True

    def is_capturing(self) -> bool:
        return False

    def elapsed_time(self, *args: Any) -> float:
        return 1.0


class _Generator(torch.Generator):
    """A generator of the device that it was asked for; its numbers are the CPU's."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        generator = super().__new__(cls)
        generator._device = torch.device(device)
        return generator

    def __init__(self, device: Any = "cpu") -> None: ...

    @property
    def device(self) -> torch.device:
        return self._device


def _answer_torch_cuda() -> None:
    torch.Generator = _Generator  # type: ignore[misc]
    cuda = torch.cuda
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132, total_memory=MEMORY, name="NVIDIA H100 80GB HBM3 (virtual)")
    for name, answer in {
        "is_available": True,
        "is_initialized": True,
        "device_count": NUM_GPUS,
        "current_device": 0,
        "get_device_name": properties.name,
        "get_device_capability": (9, 0),
        "get_device_properties": properties,
        "mem_get_info": (MEMORY, MEMORY),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "memory_reserved": 0,
        "max_memory_reserved": 0,
        "current_stream": _Stream(),
        "default_stream": _Stream(),
        "is_current_stream_capturing": False,
        "_lazy_init": None,
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "ipc_collect": None,
        "reset_peak_memory_stats": None,
    }.items():
        setattr(cuda, name, lambda *args, answer=answer, **kwargs: answer)
    cuda.Stream = cuda.Event = _Stream  # type: ignore[assignment,misc]
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign,assignment]
    cuda.stream = lambda stream: _Stream()  # type: ignore[assignment,return-value]
    cuda.nvtx = SimpleNamespace(range_push=lambda *args: None, range_pop=lambda: None)  # type: ignore[assignment]
    cuda.default_generators = (torch.default_generator,)
    cuda.nccl.version = lambda: (2, 29, 7)  # type: ignore[assignment]
    for name, answer in {
        "is_available": True,
        "device_count": NUM_GPUS,
        "current_device_index": 0,
        "current_stream": _Stream(),
        "synchronize": None,
    }.items():
        setattr(torch.accelerator, name, lambda *args, answer=answer, **kwargs: answer)


def _answer_torch_distributed() -> None:
    init, new_group, get_backend = dist.init_process_group, dist.new_group, dist.get_backend
    gloo: set[int] = set()

    def init_process_group(backend: str | None = None, **options: Any) -> None:
        options.pop("device_id", None)
        gloo.clear()
        init("gloo", **options)

    def make_group(*args: Any, backend: str | None = None, **options: Any) -> Any:
        options.pop("device_id", None)
        options["pg_options"] = None  # NCCL's
        group = new_group(*args, backend=None, **options)
        if backend == "gloo":
            gloo.add(id(group))
        return group

    def backend_of(group: Any = None) -> str:
        get_backend(group)  # raises where there is no such group
        return "gloo" if id(group) in gloo else "nccl"

    dist.init_process_group, dist.new_group, dist.get_backend = init_process_group, make_group, backend_of
    dist.distributed_c10d._get_object_coll_device = lambda group=None: "cuda"


def _answer_kernels() -> None:
    """Kernels that exist for real GPUs only; the code that stands in for them where they are missing runs instead."""
    from megatron.core.transformer.moe import moe_utils

    from ais_megatron.quantization import fp8

    fp8._fused_agrees = lambda device, block: False
    moe_utils.te_general_gemm = None
