"""Saves and loads a policy's weights, optimizer and schedule with Megatron's distributed checkpointing, independent of the layout.

Optimizer state is stored "fully reshardable", so it can be loaded with another TP, PP or DP. A save has three parts, so that the second
one can run during training:

    begin    collective: decides which rank writes which tensor, and copies the tensors if training goes on
    write    writes this rank's files, without collectives
    finish   collective: a failure of one rank becomes a failure of all, and the metadata completes the checkpoint

`saver` decides when each happens and puts the finished folder in place.
"""

from __future__ import annotations

import inspect
import queue
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ais_megatron.distributed import all_reduce_sum, device, rank_consistent
from ais_megatron.policy import cpu_backend
from ais_megatron.policy.policy import Policy
from ais_megatron.policy.training_state import STATE_FILE, TrainingState
from ais_megatron.runs.checkpoint_files import Entries, entries

_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}

# Megatron returns a writer's results through the server process of a multiprocessing Manager, because the writer may be another
# process. Our writer runs in this process. A server would take seconds to start, die of a SIGTERM to the whole job, and outlive
# a killed rank. (In 0.16 the function's name begins with an underscore, in 0.19 it does not.)
for _name in ("_get_write_results_queue", "get_write_results_queue"):
    if hasattr(filesystem_async, _name):
        setattr(filesystem_async, _name, queue.Queue)

# By default Megatron 0.19 saves through nvidia-resiliency-ext. This chooses the method that 0.16 has too.
_SAVE_OPTIONS = {"async_strategy": "mcore"} if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters else {}


class PendingSave:
    """A save of `policy` into the existing, empty `folder`. The constructor is `begin`, and collective.

    Args:
        copies: copy the tensors, so that training may change weights before `write` has run.
    Raises:
        RuntimeError: the disk has no room. All ranks raise it together.
    """

    def __init__(self, policy: Policy, folder: Path, copies: bool) -> None:
        self._folder = folder
        with cpu_backend.active():
            state = _sharded_state(policy, is_loading=False)
            _check_room(state, folder)
            self._request: AsyncRequest = dist_checkpointing.save(
                state, str(folder), content_metadata=_OPTIMIZER_FORMAT, async_sharded_save=True, **_SAVE_OPTIONS
            )
            self._arguments = list(self._request.async_fn_args)
            if self._request.preload_fn is not None:
                buckets = self._request.preload_fn()  # on CUDA this copies to the CPU; on a CPU it returns the model's own tensors
                must_copy = copies and device().type == "cpu"
                self._arguments[1] = [_copied(bucket) for bucket in buckets] if must_copy else buckets
        self._written: Entries = {}

    def write(self) -> None:
        """Write this rank's files, and read them again for the manifest. May run in a thread."""
        if self._request.async_fn is not None:
            self._request.async_fn(*self._arguments, **self._request.async_fn_kwargs)
        self._arguments = []  # releases the copies
        self._written = entries(self._folder, sorted(path.name for path in self._folder.glob(f"__{dist.get_rank()}_*")))

    def finish(self) -> Entries:
        """Complete the save after `write`. Collective. Returns the manifest's entries for the files of all ranks.

        Raises:
            RuntimeError: a rank could not write its files. All ranks raise it together.
        """
        failure = None
        try:
            with cpu_backend.active():
                for finalize in self._request.finalize_fns:
                    finalize()
        except CheckpointException as error:  # a BaseException that every rank raises, but only the first rank's has the reasons
            failure = error
        with rank_consistent():
            if failure is not None:
                reasons = "; ".join(sorted({str(wrapped[0]) for wrapped in failure.failures.values()})) or "on another rank"
                raise RuntimeError(f"{self._folder}: the checkpoint could not be written ({reasons}); is the disk full?")
        parts: list[Entries] = [{}] * dist.get_world_size()
        dist.all_gather_object(parts, self._written)
        return {name: entry for part in parts for name, entry in part.items()}


def _copied(bucket: tuple[Any, ...]) -> tuple[Any, ...]:
    """Megatron's (path, key, (bytes, tensors)) with copies of the tensors."""
    path, key, (in_bytes, tensors) = bucket
    return path, key, (in_bytes, [(item, tensor.clone()) for item, tensor in tensors])


def _check_room(state: dict[str, object], folder: Path) -> None:
    """Raise on all ranks before anything is written. If the disk became full for only one rank, the others would wait for it."""
    mine = [t for t in nested_values(state) if isinstance(t, ShardedTensor) and t.data is not None and is_main_replica(t.replica_id)]
    need = int(all_reduce_sum(torch.tensor(sum(t.data.numel() * t.data.element_size() for t in mine), dtype=torch.float64)))
    with rank_consistent():
        free = shutil.disk_usage(folder).free
        if need > free:
            raise RuntimeError(
                f"{folder}: the checkpoint needs about {need / 2**20:,.1f} MiB, but the disk has only {free / 2**20:,.1f} MiB left; "
                "make room, lower checkpoint.keep, or choose another run.dir"
            )


def load(policy: Policy, folder: Path, with_optimizer: bool) -> TrainingState:
    """Load the checkpoint in `folder` into the policy, whatever its layout, and return its `state`. Collective.

    Raises:
        ValueError: the folder is not a checkpoint.
    """
    with rank_consistent():
        if not (folder / STATE_FILE).is_file():
            raise ValueError(f"{folder}: not a checkpoint ({STATE_FILE} is missing)")
        state = TrainingState.from_json((folder / STATE_FILE).read_text())
    with cpu_backend.active():
        wanted = _sharded_state(policy, is_loading=True) if with_optimizer else {"model": policy.sharded_weights()}
        loaded = dist_checkpointing.load(wanted, str(folder))
        policy.load_weights(loaded["model"])
        if with_optimizer:
            _load_optimizer(policy.optimizer, loaded["optimizer"])
            policy.schedule.load_state_dict(loaded["schedule"])
        else:
            policy.optimizer.reload_model_params()
    state.restore(policy)
    return state


def _load_optimizer(optimizer: ChainedOptimizer, state: dict[str, object]) -> None:
    """`load_state_dict` with two corrections for torch's Adam, which Megatron 0.16 uses without Transformer Engine. Megatron reads the step
    count from tensors that do not have it, and all parameters would share one step tensor, so that each would advance it."""
    for part in optimizer.chained_optimizers:
        original = part._set_main_param_and_optimizer_states

        def with_step(model_param: Tensor, tensors: dict[str, Tensor], part: Any = part, original: Any = original) -> None:
            group, position = part.model_param_group_index_map[model_param]
            own = part.optimizer.state[part.optimizer.param_groups[group]["params"][position]]
            original(model_param, tensors | ({"step": own["step"]} if "step" in own else {}))

        part._set_main_param_and_optimizer_states = with_step
    optimizer.load_state_dict(state)
    for part in optimizer.chained_optimizers:
        del part._set_main_param_and_optimizer_states
        for own in part.optimizer.state.values():
            if "step" in own:
                own["step"] = own["step"].clone()


def _sharded_state(policy: Policy, is_loading: bool) -> dict[str, object]:
    for optimizer in policy.optimizer.chained_optimizers:
        if not optimizer.optimizer.state:
            _make_state(optimizer)
    model = policy.sharded_weights()
    optimizer = policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_OPTIMIZER_FORMAT)
    return {"model": model, "optimizer": optimizer, "schedule": policy.schedule.state_dict()}


def _make_state(optimizer: DistributedOptimizer) -> None:
    """Create the optimizer state: step 0 and zero moments. Megatron reads it from torch's optimizer before it loads values, and it may not
    exist before the first update. It is created by an update with zero gradients, whose weight decay must change nothing."""
    rates = [group["lr"] for group in optimizer.optimizer.param_groups]
    for group in optimizer.optimizer.param_groups:
        group["lr"] = 0.0
    optimizer._init_optimizer_states_with_dummy_values()
    for group, rate in zip(optimizer.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for own in optimizer.optimizer.state.values():
        if "step" in own:
            own["step"].zero_()
