"""``state.json`` of a checkpoint: what a run needs besides weights and optimizer to continue exactly."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ais_megatron.algorithm.ais import AISState
from ais_megatron.distributed import device
from ais_megatron.policy.calibration import Calibration
from ais_megatron.policy.policy import Policy
from ais_megatron.quantization.kv_scales import KVScales

STATE_FILE = "state.json"


@dataclass(frozen=True)
class TrainingState:
    """What a run needs besides the policy.

    The weight version is `step`. There is no random state. Prompts and sampling depend only on the seed and the position in the stream,
    dropout is 0, and nothing else in a step is random.
    """

    step: int = 0
    """Number of finished steps."""
    start_accuracy: float | None = None
    """Held-out accuracy at the start of the run; None until it is measured."""
    calibration: Calibration | None = None
    """The current scales of the KV cache."""
    next_prompt: int = 0
    """The position in the prompt stream."""
    ais: AISState = AISState()
    expert_fractions: Tensor | None = None
    """float32 ``[num_layers, num_experts]``, the share of the last batch's tokens that each expert got. The load-balancing loss of a lagged
    run uses it. None for a dense model."""
    skipped_in_a_row: int = 0
    """How many of the latest updates in a row were skipped."""

    def to_json(self) -> str:
        calibration = self.calibration and {
            "amax": torch.stack([self.calibration.scales.q_amax, self.calibration.scales.k_amax, self.calibration.scales.v_amax]).tolist(),
            "margin": self.calibration.scales.margin,
            "saturated_fraction": self.calibration.saturated_fraction,
        }
        plain = {"step": self.step, "start_accuracy": self.start_accuracy, "next_prompt": self.next_prompt, "ais": self.ais.to_json()}
        fractions = None if self.expert_fractions is None else self.expert_fractions.tolist()
        return json.dumps(plain | {"calibration": calibration, "expert_fractions": fractions, "skipped_in_a_row": self.skipped_in_a_row})

    @staticmethod
    def from_json(text: str) -> TrainingState:
        raw = json.loads(text)
        calibration = raw["calibration"]
        if calibration:
            q, k, v = torch.tensor(calibration["amax"], dtype=torch.float32)
            scales = KVScales(k_amax=k, v_amax=v, q_amax=q, margin=calibration["margin"])
            calibration = Calibration(scales, calibration["saturated_fraction"])
        fractions = raw["expert_fractions"] and torch.tensor(raw["expert_fractions"], dtype=torch.float32)
        return TrainingState(
            step=raw["step"],
            start_accuracy=raw["start_accuracy"],
            calibration=calibration,
            next_prompt=raw["next_prompt"],
            ais=AISState.from_json(raw["ais"]),
            expert_fractions=fractions,
            skipped_in_a_row=raw["skipped_in_a_row"],
        )

    def of(self, policy: Policy) -> TrainingState:
        """This state, with what the policy has besides its weights."""
        fractions = policy.routing.fractions if policy.routing else None
        return replace(
            self,
            calibration=policy.calibrator.latest,
            expert_fractions=None if fractions is None else fractions.cpu(),
            skipped_in_a_row=policy.guard.skipped_in_a_row,
        )

    def restore(self, policy: Policy) -> None:
        """The reverse of `of`."""
        if self.calibration:
            policy.calibrator.restore(self.calibration)
        if self.expert_fractions is not None and policy.routing is not None:
            policy.routing.fractions = self.expert_fractions.to(device())
        policy.guard.skipped_in_a_row = self.skipped_in_a_row
