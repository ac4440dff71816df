"""Process start-up, and the few collectives that the code above Megatron needs.

Errors are rank-consistent. Work that can fail on a single rank (reading a file, scoring, an engine) runs inside `rank_consistent`, which
reduces a flag and makes all ranks raise together. So no rank waits for one that is gone. If such work alternates with collectives, its
error is kept until the last collective and then passed to `raise_together`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ais_megatron.batch import Batch
from ais_megatron.cluster.gloo import share_devices
from ais_megatron.cluster.launcher import is_launched, ranks_here

MESSAGE_BYTES = 4096


class Unavailable(RuntimeError):
    """A service outside the job does not come back. The results so far are complete, so a checkpoint is worth saving."""


def device() -> torch.device:
    """The device of this rank's tensors: its CUDA device if the process group uses NCCL, else the CPU."""
    if dist.is_initialized() and "nccl" in dist.get_backend():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def use_device(where: torch.device) -> None:
    """Make `where` this thread's CUDA device. A new thread starts with the first device of the machine, whatever its process uses."""
    if where.type == "cuda":
        torch.cuda.set_device(where)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def init_process_group(backend: str = "auto", timeout_minutes: float = 30.0) -> None:
    """Join the job that torchrun's or srun's variables describe. Without them, this process is the only rank.

    Args:
        backend: `run.backend`; see `uses_cuda`.
        timeout_minutes: a collective fails if it waits longer for another rank.
    Raises:
        ValueError: backend is "cuda" and this node has fewer GPUs than ranks. All ranks of the node raise it.
    """
    env = os.environ
    _adopt_srun()
    num_ranks = ranks_here()
    use_cuda = uses_cuda(backend, num_ranks)
    gpus = torch.cuda.device_count() if use_cuda or backend == "auto" else 0
    if use_cuda:
        if gpus < num_ranks:
            raise ValueError(
                f"run.backend=cuda: {num_ranks} ranks on this node and {gpus} GPUs that they can see; start one rank per GPU (with srun, "
                "--gpu-bind=none lets every rank see all GPUs of its node), or set run.backend=cpu"
            )
        torch.cuda.set_device(int(env.get("LOCAL_RANK", "0")))
    elif gpus and env.get("RANK", "0") == "0":
        print(f"run.backend=auto: {num_ranks} ranks on this node and {gpus} GPUs, so the policy stays on CPUs", flush=True)
    share_devices()  # (with NCCL too: Megatron makes gloo groups beside it)
    kind, timeout = "nccl" if use_cuda else "gloo", timedelta(minutes=timeout_minutes)
    if "RANK" in env:
        dist.init_process_group(kind, "env://", timeout)
    else:
        dist.init_process_group(kind, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)


def uses_cuda(backend: str, num_ranks: int) -> bool:
    """Whether a job with this `run.backend` runs on GPUs. "cuda" does (over NCCL), "cpu" does not (over gloo), and "auto" does if this
    node has a GPU for each of its ranks."""
    if backend == "auto":
        return torch.cuda.is_available() and torch.cuda.device_count() >= num_ranks
    return backend == "cuda"


def _adopt_srun() -> None:
    """Give a rank that srun started the variables that torchrun would have set."""
    env = os.environ
    if "RANK" in env or not is_launched():
        return
    env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = env["SLURM_PROCID"], env["SLURM_NTASKS"], env["SLURM_LOCALID"]
    env["LOCAL_WORLD_SIZE"] = str(ranks_here())


def barrier() -> None:
    """Wait for all ranks. (NCCL's own barrier has to guess the device.)"""
    all_reduce_sum(torch.zeros(1))


def all_reduce_sum(vector: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum over the ranks of `group`. The input may be on any device and does not change. The result is on the same device."""
    if dist.get_world_size(group) == 1:
        return vector.clone()
    total = vector.to(device(), copy=True)
    dist.all_reduce(total, group=group)
    return total.to(vector.device)


def broadcast_text(text: str) -> str:
    """The first rank's `text`, on every rank. The text of the other ranks is ignored, but must have the same length."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return text
    raw = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device())
    dist.broadcast(raw, src=0)
    return bytes(raw.tolist()).decode()


def shared_store() -> dist.Store | None:
    """The key-value store in which the ranks found each other; None if there is only one rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.distributed_c10d._get_default_store()


def reduce_metrics(sums: Mapping[str, tuple[float, float]], group: dist.ProcessGroup | None = None) -> dict[str, float]:
    """Global means. Each entry is (sum, count) of this rank. One all-reduce gives sum(sums) / sum(counts), or 0 if the count is 0."""
    totals = all_reduce_sum(torch.tensor(list(sums.values()), dtype=torch.float64), group).tolist()
    return {name: total / count if count else 0.0 for name, (total, count) in zip(sums, totals, strict=True)}


LOCAL_ERRORS = (ValueError, RuntimeError, OSError)
"""What may happen to one rank alone. Anything else is a bug of ours."""
_KINDS: tuple[type[Exception], ...] = (ValueError, Unavailable, RuntimeError)  # the types that one rank's error can have on the others


@contextmanager
def rank_consistent(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run local work, no collectives inside; if it fails on any rank, raise the first failing rank's error on all.

    ValueError, RuntimeError and OSError are passed on (OSError as RuntimeError on the other ranks). Any other error is our bug. It
    propagates immediately, and the launcher ends the job.
    """
    error: Exception | None = None
    try:
        yield
    except LOCAL_ERRORS as caught:
        error = caught
    raise_together(error, group)


def raise_together(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise the first failing rank's error on all ranks, if there is one. Collective.

    error: of this rank, one of `LOCAL_ERRORS`; None if its work went well.
    """
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        if error is not None:
            raise error
        return
    failed = torch.tensor([0 if error is None else 1], device=device())
    dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
    if not failed.item():
        return
    kind, message = _first_failure(error, group)
    raise kind(message) from error


def _first_failure(error: Exception | None, group: dist.ProcessGroup | None) -> tuple[type[Exception], str]:
    """The error of the lowest failing rank. Messages are exchanged as plain bytes and never pickled."""
    code = 0 if error is None else 1 + next((i for i, kind in enumerate(_KINDS) if isinstance(error, kind)), len(_KINDS) - 1)
    text = b"" if error is None else str(error).encode()[:MESSAGE_BYTES]
    mine = torch.tensor(list(bytes([code]) + text.ljust(MESSAGE_BYTES, b"\0")), dtype=torch.uint8, device=device())
    parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, mine, group=group)
    for number, part in enumerate(parts):
        raw = bytes(part.tolist())
        if raw[0]:
            return _KINDS[raw[0] - 1], f"[rank {number}] " + raw[1:].rstrip(b"\0").decode(errors="replace")
    raise AssertionError("a rank reported a failure but none sent a message")


def gather_batch(local: Batch, group: dist.ProcessGroup | None) -> Batch:
    """Join the rows that the ranks of one model-parallel group generated, in the order of ranks, on every rank.

    The numbers of rows and columns may differ between ranks, and a rank may have no rows. There are two collectives: the sizes, and
    all fields packed as bytes in one tensor.
    """
    world = dist.get_world_size(group)
    if world == 1:
        return local
    routes = local.routed_experts
    kind = (0, 0, 0) if routes is None else (*routes.shape[2:], routes.itemsize)
    mine = torch.tensor([*local.tokens.shape, *kind, local.inputs is not None], device=device())
    sizes = [torch.empty_like(mine) for _ in range(world)]
    dist.all_gather(sizes, mine, group=group)
    max_rows, seq, layers, top_k, itemsize, masked = (int(v) for v in torch.stack(sizes).amax(0))
    raw = _pack(local.pad_columns(seq), (layers, top_k), _ROUTES[itemsize], bool(masked))
    packed = torch.nn.functional.pad(raw, (0, 0, 0, max_rows - len(local))).to(device())
    parts = [torch.empty_like(packed) for _ in range(world)]
    dist.all_gather(parts, packed, group=group)
    rows = torch.cat([part[: int(size[0])].cpu() for part, size in zip(parts, sizes, strict=True)])
    return _unpack(rows, seq, (layers, top_k), _ROUTES[itemsize], bool(masked))


_ROUTES = {0: torch.int8, 1: torch.int8, 2: torch.int16, 4: torch.int32}  # by number of bytes; 0: no rank has routes


def _pack(batch: Batch, experts: tuple[int, int], routes_dtype: torch.dtype, masked: bool) -> Tensor:
    """uint8 ``[rows, bytes]``: tokens, rollout log-probabilities and (length, advantage, reward) with 4 bytes each, then what a diffusion
    model reads and how often it counts, routes and mask."""
    per_row = [batch.lengths.int(), batch.advantages.view(torch.int32), batch.rewards.view(torch.int32)]
    fields = [batch.tokens.int(), batch.rollout_logprobs, torch.stack(per_row, 1)]
    if masked:
        repeats = torch.ones_like(batch.lengths) if batch.repeats is None else batch.repeats
        fields += [batch.read.int(), repeats.int()[:, None]]
    if experts[0]:
        shape = (*batch.tokens.shape, *experts)
        routes = torch.full(shape, -1, dtype=routes_dtype) if batch.routed_experts is None else batch.routed_experts.to(routes_dtype)
        fields.append(routes.flatten(1))
    return torch.cat([field.contiguous().view(torch.uint8) for field in (*fields, batch.loss_mask)], 1)


def _unpack(raw: Tensor, seq: int, experts: tuple[int, int], routes_dtype: torch.dtype, masked: bool) -> Batch:
    layers, top_k = experts
    read = [4 * seq, 4] if masked else [0, 0]
    parts = raw.split([4 * seq, 4 * seq, 4 * 3, *read, seq * layers * top_k * routes_dtype.itemsize, seq], dim=1)
    dtypes = (torch.int32, torch.float32, torch.int32, torch.int32, torch.int32, routes_dtype, torch.bool)
    fields = (_from_bytes(part, dtype) for part, dtype in zip(parts, dtypes, strict=True))
    tokens, logprobs, per_row, inputs, repeats, routed, mask = fields
    lengths, advantages, rewards = (column.contiguous() for column in per_row.unbind(1))
    return Batch(
        tokens=tokens.long(),
        loss_mask=mask,
        lengths=lengths.long(),
        rollout_logprobs=logprobs,
        advantages=advantages.view(torch.float32),
        rewards=rewards.view(torch.float32),
        routed_experts=routed.reshape(-1, seq, layers, top_k) if layers else None,
        inputs=inputs.long() if masked else None,
        repeats=repeats[:, 0].long() if masked else None,
    )


def _from_bytes(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns of bytes as values of `dtype`. They are copied, because values must be aligned."""
    values = torch.empty(len(part), part.shape[1] // dtype.itemsize, dtype=dtype)
    values.view(torch.uint8).copy_(part)
    return values
