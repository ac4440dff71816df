"""Lets Megatron-Core run without a GPU, by replacing the few things that it expects of CUDA.

Megatron-Core 0.16 uses ``device="cuda"`` in its optimizers and schedules, asks for the current CUDA device, keeps random states per CUDA
device, and compares ``tensor.type()`` with ``torch.cuda.*Tensor``. `install` replaces the process-wide functions once. The context
`active` is entered around every call into Megatron, and lets factory calls for CUDA create CPU tensors. Only the policy uses this
module, and only in jobs on CPUs. Nothing here changes any arithmetic.

A job on CPUs may run on a machine with GPUs (`run.backend=cpu`). There Megatron must not find the GPUs or the packages for them. With
Transformer Engine or Apex installed it would use their fused Adam and norms, which work only on CUDA tensors.
"""

from __future__ import annotations

import functools
import sys
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ais_megatron.distributed import device

CPU = torch.device("cpu")
NEED_CUDA = ("transformer_engine", "transformer_engine_torch", "apex", "amp_C", "fused_weight_gradient_mlp_cuda", "flash_attn")

Sizes = Tensor | list[int] | None


class NoStream:
    """Replaces CUDA streams and events. On a CPU all operations are already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> NoStream:
        return self

    def __exit__(self, *exc: object) -> None: ...

    def _nothing(self, *args: Any, **kwargs: Any) -> NoStream:
        return self

    wait_stream = wait_event = record_event = record = wait = synchronize = _nothing

    def query(self) -> bool:
        return True


class _CudaMeansCpu(TorchFunctionMode):
    """Factory calls for "cuda" create CPU tensors. `Tensor.type()` returns the names that Megatron's optimizers compare."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is Tensor.cuda:
            return args[0]
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": CPU}
        elif func is Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        return func(*args, **kwargs)


def _is_cuda(value: object) -> bool:
    return (isinstance(value, str) and value.startswith("cuda")) or (isinstance(value, torch.device) and value.type == "cuda")


def active() -> AbstractContextManager[object]:
    """The context in which Megatron may be called. It does nothing in a job on GPUs."""
    return _CudaMeansCpu() if device().type == "cpu" else nullcontext()


def is_wanted() -> bool:
    """Whether this process belongs to a job on CPUs. Its process group decides, or the absence of GPUs if there is no group yet."""
    return device().type == "cpu" if dist.is_initialized() else not torch.cuda.is_available()


@functools.cache
def install() -> None:
    """Replace the process-wide functions that Megatron uses. Idempotent. Called only in jobs on CPUs.

    Call it before Megatron is imported, because Megatron decides at its import whether to use Transformer Engine and Apex.
    """
    modules: dict[str, Any] = sys.modules  # the value None makes an import fail as if the package were not installed
    for name in NEED_CUDA:
        modules.setdefault(name, None)
    # Megatron's optimizer reads .grad of views, about which torch warns once. The warning helps nobody.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    import_without_compiler()
    _replace_device_functions()
    replace_random_states()
    mend_gloo()
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16 uses this name even if Transformer Engine is missing
        moe_utils.te_general_gemm = None


def _replace(module: ModuleType, **stand_ins: Any) -> None:
    """Replace functions and classes of `module`."""
    for name, stand_in in stand_ins.items():
        setattr(module, name, stand_in)


def import_without_compiler() -> None:
    """Import Megatron without torch.compile. At its import it decorates small functions with torch.compile, and on a CPU each would take
    seconds of useless C++ compilation. So it gets a decorator that does nothing."""
    compiler = torch.compile
    _replace(torch, compile=lambda function: function)
    try:
        import megatron.core.jit  # noqa: F401
    finally:
        _replace(torch, compile=compiler)


def _replace_device_functions() -> None:
    _replace(
        torch.cuda,
        is_available=lambda: False,
        current_device=lambda: CPU,
        synchronize=lambda *a, **k: None,
        empty_cache=lambda *a, **k: None,
        set_device=lambda *a, **k: None,
        Stream=NoStream,
        Event=NoStream,
        stream=lambda stream: nullcontext(),
        current_stream=lambda *a, **k: NoStream(),
        default_stream=lambda *a, **k: NoStream(),
    )


def replace_random_states() -> None:
    from megatron.core.tensor_parallel import random as tp_random

    def get_state(*args: Any, **kwargs: Any) -> Tensor:
        return torch.get_rng_state()

    def set_state(state: Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    _replace(torch.cuda, manual_seed=torch.manual_seed, get_rng_state=get_state, set_rng_state=set_state)
    tp_random._get_cuda_rng_state, tp_random._set_cuda_rng_state = get_state, set_state


def mend_gloo() -> None:
    """Add to gloo what NCCL has and Megatron's token dispatcher needs: split sizes as tensors, and parts of unequal size."""
    all_to_all_single, all_gather, reduce_scatter = dist.all_to_all_single, dist.all_gather, dist.reduce_scatter

    def tensor_splits(
        output: Tensor, input: Tensor, output_split_sizes: Sizes = None, input_split_sizes: Sizes = None, **kwargs: Any
    ) -> dist.Work | None:
        outputs, inputs = (s.tolist() if isinstance(s, Tensor) else s for s in (output_split_sizes, input_split_sizes))
        return all_to_all_single(output, input, outputs, inputs, **kwargs)

    def uneven_gather(tensor_list: list[Tensor], tensor: Tensor, group: dist.ProcessGroup | None = None, **kwargs: Any) -> dist.Work | None:
        sizes = [len(t) if t.dim() else 1 for t in tensor_list]
        if len(set(sizes)) == 1:
            return all_gather(tensor_list, tensor, group=group, **kwargs)
        padded = [t.new_empty(max(sizes), *t.shape[1:]) for t in tensor_list]
        mine = torch.cat([tensor, tensor.new_zeros(max(sizes) - len(tensor), *tensor.shape[1:])])
        all_gather(padded, mine, group=group)
        for out, part in zip(tensor_list, padded, strict=True):
            out.copy_(part[: len(out)])
        return None

    def uneven_scatter(
        output: Tensor, input_list: list[Tensor], op: Any = dist.ReduceOp.SUM, group: dist.ProcessGroup | None = None, **kwargs: Any
    ) -> dist.Work | None:
        if len({t.shape for t in input_list}) == 1:
            return reduce_scatter(output, input_list, op=op, group=group, **kwargs)
        total = torch.cat(list(input_list))
        dist.all_reduce(total, op=op, group=group)
        output.copy_(total.split([len(t) for t in input_list])[dist.get_rank(group)])
        return None

    _replace(dist, all_to_all_single=tensor_splits, all_gather=uneven_gather, reduce_scatter=uneven_scatter)
