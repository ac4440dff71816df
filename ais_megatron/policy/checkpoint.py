"""Checkpoints of the policy through Megatron's distributed checkpointing: layout-independent, complete or absent.

A checkpoint is first written under a temporary name and renamed when every rank is done, so a folder called
``step_000120`` is always whole. Optimizer state is stored "fully reshardable": it loads under another TP, PP or DP.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from ais_megatron.algorithm.ais import AISState
from ais_megatron.distributed import rank_consistent
from ais_megatron.policy import cpu_backend
from ais_megatron.policy.calibration import Calibration
from ais_megatron.policy.policy import Policy
from ais_megatron.quantization.kv_scales import KVScales


@dataclass(frozen=True)
class TrainingState:
    """What a run needs besides the policy.

    step: steps done. start_accuracy: held-out, at the start of the run; None until it is measured. calibration: of the KV
    cache, in force. next_prompt: the position in the prompt stream. ais: what alpha remembers.
    (Prompts and sampling noise are functions of the seed and the stream's position, so there is no random state to keep.)
    """

    step: int = 0
    start_accuracy: float | None = None
    calibration: Calibration | None = None
    next_prompt: int = 0
    ais: AISState = AISState()

    def to_json(self) -> str:
        calibration = self.calibration and {
            "amax": torch.stack([self.calibration.scales.q_amax, self.calibration.scales.k_amax, self.calibration.scales.v_amax]).tolist(),
            "margin": self.calibration.scales.margin,
            "saturated_fraction": self.calibration.saturated_fraction,
        }
        plain = {"step": self.step, "start_accuracy": self.start_accuracy, "next_prompt": self.next_prompt, "ais": self.ais.to_json()}
        return json.dumps(plain | {"calibration": calibration})

    @staticmethod
    def from_json(text: str) -> TrainingState:
        raw = json.loads(text)
        calibration = raw["calibration"]
        if calibration:
            q, k, v = torch.tensor(calibration["amax"], dtype=torch.float32)
            scales = KVScales(k_amax=k, v_amax=v, q_amax=q, margin=calibration["margin"])
            calibration = Calibration(scales, calibration["saturated_fraction"])
        return TrainingState(raw["step"], raw["start_accuracy"], calibration, raw["next_prompt"], AISState(**raw["ais"]))


_OPTIMIZER_FORMAT = {"distrib_optim_sharding_type": "fully_reshardable"}
STATE_FILE = "state.json"


def save(policy: Policy, folder: Path, state: TrainingState, keep: int) -> None:
    """Write weights, optimizer, schedule and `state` to `folder`, then delete all but the newest `keep`. Collective."""
    partial = folder.with_name(folder.name + ".partial")
    with rank_consistent():
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    with cpu_backend.active():
        dist_checkpointing.save(_sharded_state(policy, is_loading=False), str(partial), content_metadata=_OPTIMIZER_FORMAT)
    with rank_consistent():
        if dist.get_rank() == 0:
            (partial / STATE_FILE).write_text(state.to_json())
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
            for old in complete_checkpoints(folder.parent)[:-keep]:
                shutil.rmtree(old)


def load(policy: Policy, folder: Path, with_optimizer: bool) -> TrainingState:
    """Bring the policy to what `folder` holds, under the present layout; returns its `state`. Collective.

    Raises:
        ValueError: the folder is no checkpoint.
    """
    with rank_consistent():
        if not (folder / STATE_FILE).is_file():
            raise ValueError(f"{folder}: not a checkpoint ({STATE_FILE} is missing)")
        state = TrainingState.from_json((folder / STATE_FILE).read_text())
    with cpu_backend.active():
        wanted = _sharded_state(policy, is_loading=True) if with_optimizer else {"model": policy.model.sharded_state_dict()}
        loaded = dist_checkpointing.load(wanted, str(folder))
        policy.model.load_state_dict(loaded["model"])
        if with_optimizer:
            _load_optimizer(policy.optimizer, loaded["optimizer"])
            policy.schedule.load_state_dict(loaded["schedule"])
        else:
            policy.optimizer.reload_model_params()
    if state.calibration:
        policy.calibrator.restore(state.calibration)
    return state


def complete_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a run's ``checkpoints`` folder, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step_*/{STATE_FILE}") if not path.parent.name.endswith(".partial"))


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a run's ``checkpoints`` folder, None where there is none."""
    found = complete_checkpoints(folder)
    return found[-1] if found else None


def _load_optimizer(optimizer: ChainedOptimizer, state: dict[str, object]) -> None:
    """`load_state_dict`, mended for torch's Adam, which Megatron 0.16 uses without Transformer Engine: its step count is
    asked of tensors that never hold it, and then one tensor is shared by all parameters, so that each would advance it."""
    for part in optimizer.chained_optimizers:
        original = part._set_main_param_and_optimizer_states

        def with_step(model_param: Tensor, tensors: dict[str, Tensor], part=part, original=original) -> None:  # noqa: ANN001
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
    if is_loading:
        # Megatron asks torch's optimizer for its step and moments before it fills them in: let it make some.
        for optimizer in policy.optimizer.chained_optimizers:
            if not optimizer.optimizer.state:
                optimizer._init_optimizer_states_with_dummy_values()
    model = policy.model.sharded_state_dict()
    optimizer = policy.optimizer.sharded_state_dict(model, is_loading=is_loading, metadata=_OPTIMIZER_FORMAT)
    return {"model": model, "optimizer": optimizer, "schedule": policy.schedule.state_dict()}
