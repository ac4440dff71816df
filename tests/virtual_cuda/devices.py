"""Virtual CUDA devices: tensors of the CPU that carry the label of the device they would be on.

Every storage is labelled "cpu" or "cuda". An operator that mixes labels raises `WrongDevice` where CUDA would raise, also for
empty tensors, and so does a tensor of the CPU in a collective. Values are real: everything is computed by the CPU's kernels.

Two of torch's modes do the work. `_Functions` sees what Python code calls: it answers `tensor.device`, carries out `tensor.to`
and keeps `device=` of factory functions as a label. `_Operators` sees the operators that are really run, also those of the
backward pass: it compares the labels of what goes in and labels what comes out. Modes belong to a thread, so new threads
enter them too (`machine`).

What cannot be seen here: numbers of CUDA kernels, NCCL itself, streams, timing, and memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode_temporarily

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PRUNE_EVERY = 5000  # labels, after which those of storages that are gone are forgotten

# Operators that may read one device and write another.
COPIES = {"copy_", "_to_copy", "set_", "lift_fresh", "detach", "alias"}
# A mask or an index may be on the CPU, the tensor that it indexes on the GPU; not the other way round.
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
# Elsewhere a number on the CPU (a tensor without dimensions) may stand beside CUDA tensors, except in these.
NO_NUMBERS = {
    *("cat", "stack", "mm", "addmm", "bmm", "linear", "embedding", "dot", "gather", "scatter", "scatter_", "scatter_add_"),
    *("index_select", "index_add_", "segment_reduce", "_foreach_add_"),
}


class WrongDevice(RuntimeError):
    """What CUDA, or NCCL, would refuse."""


class _Labels:
    """Which storages are on the virtual GPU; every other is on the CPU."""

    def __init__(self) -> None:
        self._cuda: dict[int, StorageWeakRef] = {}
        # Made by torch's own C++ code without any tensor to learn from, such as the zeros of an undefined gradient: real CUDA
        # code makes them where they are used.
        self._undecided: dict[int, StorageWeakRef] = {}
        self._num_set = 0

    def is_cuda(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._cuda

    def is_undecided(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._undecided

    def set(self, tensor: Tensor, cuda: bool) -> None:
        key = tensor.untyped_storage()._cdata
        self._undecided.pop(key, None)
        if not cuda:
            self._cuda.pop(key, None)
        elif key not in self._cuda:
            self._cuda[key] = StorageWeakRef(tensor.untyped_storage())  # which keeps the number from being given to another storage
            self._num_set += 1
            if self._num_set % PRUNE_EVERY == 0:
                self._prune()

    def leave_undecided(self, tensor: Tensor) -> None:
        self._undecided[tensor.untyped_storage()._cdata] = StorageWeakRef(tensor.untyped_storage())

    def _prune(self) -> None:
        for table in (self._cuda, self._undecided):
            for key, reference in list(table.items()):  # a copy: other threads go on setting labels
                if reference.expired():
                    table.pop(key, None)


LABELS = _Labels()


def is_cuda(tensor: Tensor) -> bool:
    return LABELS.is_cuda(tensor)


def moved(tensor: Tensor, cuda: bool) -> Tensor:
    """The tensor itself if it is there already, else a copy with that label. Differentiable."""
    if is_cuda(tensor) == cuda:
        return tensor
    with torch._C.DisableTorchFunction():
        copy = tensor.clone()
    LABELS.set(copy, cuda)
    return copy


def _means_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return (isinstance(device, int) and not isinstance(device, bool)) or (isinstance(device, str) and device.startswith("cuda"))


def _is_device(value: object) -> bool:
    return isinstance(value, str | torch.device) or (isinstance(value, int) and not isinstance(value, bool))


def _tensors(*trees: object) -> list[Tensor]:
    """In nested tuples, lists and dictionaries. Every operator asks, and torch's own `tree_leaves` would take half of a test's time."""
    found: list[Tensor] = []
    _add_tensors(trees, found)
    return found


def _add_tensors(items: Iterable[object], found: list[Tensor]) -> None:
    for item in items:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, tuple | list):
            _add_tensors(item, found)
        elif isinstance(item, dict):
            _add_tensors(item.values(), found)


@cache
def _name_of(operator: Any) -> tuple[str, str]:
    """("aten", "mm") and the like."""
    namespace, _, name = operator._schema.name.partition("::")
    return namespace, name


class _Operators(TorchDispatchMode):
    """Compares and sets labels, operator by operator."""

    def __init__(self, functions: _Functions) -> None:
        super().__init__()
        self._functions = functions

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, so torch need not keep its compiler away from every operator."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = _name_of(func)
        tensors = _tensors(args, kwargs)
        if namespace == "c10d":
            _check_collective(name, args, tensors)
            return func(*args, **kwargs)
        labels = [is_cuda(tensor) for tensor in tensors]
        if name in INDEXING:
            _check_indexing(name, args, tensors, labels)
        elif name not in COPIES and any(labels):
            _check_same_device(name, tensors, labels)
        result = func(*args, **kwargs)
        follows_first = name in COPIES or name in INDEXING
        known = {tensor.untyped_storage()._cdata for tensor in tensors}
        for made in _tensors(result):
            if made.untyped_storage()._cdata in known:
                continue  # a view, or an argument that was written to
            if not tensors and not self._functions.active:
                LABELS.leave_undecided(made)
            else:
                LABELS.set(made, labels[0] if follows_first and labels else any(labels))
        return result


def _check_collective(name: str, args: tuple[Any, ...], tensors: list[Tensor]) -> None:
    if name == "barrier" or _runs_on_gloo(args):
        return
    for tensor in tensors:
        if not is_cuda(tensor):
            raise WrongDevice(f"NCCL collective {name} of a CPU tensor {tuple(tensor.shape)}")


def _runs_on_gloo(args: tuple[Any, ...]) -> bool:
    """Whether one of the arguments is a group that was made for gloo on purpose."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):
            return dist.get_backend(dist.ProcessGroup.unbox(arg)) == "gloo"
    return False


def _check_indexing(name: str, args: tuple[Any, ...], tensors: list[Tensor], labels: list[bool]) -> None:
    if not labels[0] and any(labels):
        raise WrongDevice(f"aten::{name}: a CPU tensor {tuple(tensors[0].shape)} indexed by, or given values of, a CUDA tensor")
    values = args[2] if "put" in name else None
    if isinstance(values, Tensor) and values.dim() > 0 and is_cuda(values) != labels[0]:
        raise WrongDevice(f"aten::{name}: values on the CPU for a CUDA tensor {tuple(tensors[0].shape)}")


def _check_same_device(name: str, tensors: list[Tensor], labels: list[bool]) -> None:
    for tensor, cuda in zip(tensors, labels, strict=True):
        if cuda or (tensor.dim() == 0 and name not in NO_NUMBERS):
            continue
        if LABELS.is_undecided(tensor):
            LABELS.set(tensor, True)
            continue
        raise WrongDevice(f"aten::{name}: expected all tensors on one device, but a CPU tensor {tuple(tensor.shape)} is among CUDA tensors")


class _Functions(TorchFunctionMode):
    """Answers and carries out what Python code says about devices."""

    def __init__(self) -> None:
        super().__init__()
        self._calls = threading.local()

    @property
    def active(self) -> int:
        """Calls from this thread's Python code that are under way: what they make has been asked for."""
        return getattr(self._calls, "active", 0)

    @active.setter
    def active(self, number: int) -> None:
        self._calls.active = number

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if any(issubclass(kind, ShardedTensor) for kind in types):
            return func(*args, **kwargs)  # holds tensors, but has no storage of its own
        if func is torch.device and args and isinstance(args[0], int):
            return torch.device("cuda", args[0])
        answer = _ANSWERS.get(func)
        if answer is not None and args and isinstance(args[0], Tensor):
            result = answer(self, func, args, kwargs)
            if result is not NotImplemented:
                return result
        if kwargs.get("device") is not None:
            return self._with_device(func, args, kwargs)
        return self.call(func, args, kwargs)

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.active += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.active -= 1

    def _with_device(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A factory function, or one that copies, such as `torch.as_tensor`."""
        cuda = _means_cuda(kwargs["device"])
        generator = kwargs.get("generator")
        if cuda and generator is not None and generator.device.type == "cpu":
            raise WrongDevice(f"{func.__name__}: a generator of the CPU for a CUDA tensor")
        result = self.call(func, args, kwargs | {"device": CPU})
        given = {tensor.untyped_storage()._cdata for tensor in _tensors(args)}
        if isinstance(result, Tensor) and result.untyped_storage()._cdata in given:
            return moved(result, cuda)
        for made in _tensors(result):
            LABELS.set(made, cuda)
        return result


def _to(mode: _Functions, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Any of the ways to write it: (device, dtype), (dtype), (other tensor), each followed by non_blocking and copy."""
    tensor, rest = args[0], list(args[1:])
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    other = rest[0] if rest and isinstance(rest[0], Tensor) else None
    if other is not None:
        device, dtype = (CUDA if is_cuda(other) else CPU), other.dtype
        del rest[0]
    elif rest and (rest[0] is None or _is_device(rest[0])):
        device = rest.pop(0)
        dtype = rest.pop(0) if rest else dtype
    elif rest:
        dtype = rest.pop(0)
    copy = kwargs.pop("copy", len(rest) > 1 and rest[1])
    kwargs.pop("non_blocking", None)
    result = mode.call(func, (tensor,), kwargs | {"dtype": dtype or tensor.dtype, "copy": copy})
    return result if device is None else moved(result, _means_cuda(device))


def _type(mode: _Functions, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) > 1 or kwargs:
        return NotImplemented
    name = func(args[0])
    return name.replace("torch.", "torch.cuda.", 1) if is_cuda(args[0]) else name


def _numpy(mode: _Functions, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if is_cuda(args[0]):
        raise WrongDevice(f"numpy cannot read a CUDA tensor {tuple(args[0].shape)}; copy it to the CPU first")
    return func(*args, **kwargs)


def _inherits(mode: _Functions, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`new_tensor`, whose result is on the device of the tensor that it is a method of."""
    if kwargs.get("device") is not None:
        return NotImplemented
    result = mode.call(func, args, kwargs)
    LABELS.set(result, is_cuda(args[0]))
    return result


_ANSWERS: dict[Any, Callable[..., Any]] = {
    Tensor.device.__get__: lambda mode, func, args, kwargs: CUDA if is_cuda(args[0]) else CPU,
    Tensor.is_cuda.__get__: lambda mode, func, args, kwargs: is_cuda(args[0]),
    Tensor.is_cpu.__get__: lambda mode, func, args, kwargs: not is_cuda(args[0]),
    Tensor.get_device: lambda mode, func, args, kwargs: 0 if is_cuda(args[0]) else -1,
    Tensor.type: _type,
    Tensor.to: _to,
    Tensor.cuda: lambda mode, func, args, kwargs: moved(args[0], True),
    Tensor.cpu: lambda mode, func, args, kwargs: moved(args[0], False),
    Tensor.pin_memory: lambda mode, func, args, kwargs: args[0],
    Tensor.numpy: _numpy,
    Tensor.__array__: _numpy,
    Tensor.new_tensor: _inherits,
}


_FUNCTIONS = _Functions()
_OPERATORS = _Operators(_FUNCTIONS)


@contextmanager
def virtual_devices() -> Iterator[None]:
    """Labels are kept and compared inside, in this thread. `torch.cuda` and `torch.distributed` are `machine`'s."""
    with _FUNCTIONS, _OPERATORS:
        yield


def enter_for_good() -> None:
    """`virtual_devices` for the rest of this thread."""
    _FUNCTIONS.__enter__()
    _OPERATORS.__enter__()


class OneKernel(torch.autograd.Function):
    """`OneKernel.apply(function, *tensors)`: a differentiable function of CUDA tensors that is one kernel on a GPU. Nobody looks at the
    operators inside, which takes most of the time of a function that has many."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        _check_same_device(function.__name__, list(tensors), [is_cuda(tensor) for tensor in tensors])
        with _unwatched(), torch.enable_grad():
            ctx.inputs = [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(tensors, ctx.needs_input_grad[1:], strict=True)]
            ctx.output = function(*ctx.inputs)
            result = ctx.output.detach().clone()
        LABELS.set(result, True)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [tensor for tensor in ctx.inputs if tensor.requires_grad]
        with _unwatched(), torch.enable_grad():
            found = iter(torch.autograd.grad(ctx.output, wanted, grads))
        results = [next(found) if tensor.requires_grad else None for tensor in ctx.inputs]
        for result in results:
            if result is not None:
                LABELS.set(result, True)
        return None, *results


@contextmanager
def _unwatched() -> Iterator[None]:
    with torch._C.DisableTorchFunction(), _pop_mode_temporarily():
        yield


def inside(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, run with labels kept: for what starts in a thread, or runs while Python's calls are not looked at."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with virtual_devices():
            return function(*args, **kwargs)

    return wrapped


def looked_at(run_backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass, which is torch's own C++ code but for the Python that it calls: there `_Functions` looks on, as it would
    not by itself, because torch takes a mode away while the mode's own call is under way."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before, _FUNCTIONS.active = _FUNCTIONS.active, 0
        try:
            with _FUNCTIONS:
                return run_backward(*args, **kwargs)
        finally:
            _FUNCTIONS.active = before

    return wrapped
