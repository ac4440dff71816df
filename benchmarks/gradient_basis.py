"""Takes the basic gradients of batch after batch, and keeps what a later judgement needs: inner products, and tokens' log-probabilities."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gradient_arms import ARMS, TARGET, BasicGradient, Seen, changed
from gradient_sketch import GramMatrix, Sketcher
from torch import Tensor

from ais_megatron.algorithm import ais
from ais_megatron.algorithm.ais import AISState
from ais_megatron.algorithm.correction import Correction
from ais_megatron.algorithm.scaler import LossScaler
from ais_megatron.batch import Batch
from ais_megatron.collection import collect
from ais_megatron.config import Config, build_config
from ais_megatron.policy.policy import Policy
from ais_megatron.runs.metrics import PhaseTimer
from ais_megatron.runs.warm_start import starting_folder
from ais_megatron.session import Session, build_policy, with_engine
from ais_megatron.trainer import begin

Kind = tuple[bool, bool]
"""(rollouts from the quantised engine, aligned trainer)."""


@dataclass
class Record:
    """What was measured. `save` and `load` keep it in a file."""

    target: str
    config: Config
    vectors: list[BasicGradient]
    gram: Tensor
    """float64 ``[batches, vectors, batches, vectors]``: the inner product of any two basic gradients of any two batches."""
    seen: dict[Kind, list[Seen]]
    """By batch, as each trainer sees it."""
    accuracy: dict[bool, list[float]]
    """By batch, of the quantised engine (True) and the other (False)."""
    parameters: int
    sketch: int
    """Numbers in a gradient, and in its sketch."""
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Plain values and tensors only, in torch's format."""
        plain = {
            **vars(self),
            "config": self.config.model_dump(mode="json"),
            "vectors": [asdict(vector) for vector in self.vectors],
            "seen": {kind: [tuple(seen) for seen in batches] for kind, batches in self.seen.items()},
        }
        part = path.with_name(path.name + ".part")
        torch.save(plain, part)
        part.replace(path)

    @staticmethod
    def load(path: Path) -> Record:
        plain: dict[str, Any] = torch.load(path)
        vectors = [BasicGradient(**{**vector, "correction": Correction(**vector["correction"])}) for vector in plain["vectors"]]
        seen = {kind: [Seen(*batch) for batch in batches] for kind, batches in plain["seen"].items()}
        return Record(**{**plain, "config": build_config(plain["config"]), "vectors": vectors, "seen": seen})


@dataclass(frozen=True)
class Rig:
    """Two engines and one or two trainers with the same weights."""

    sessions: dict[bool, Session]
    """With the quantised engine (True), and with one that rounds neither weights nor KV cache (False)."""
    policies: dict[bool, Policy]
    """The aligned trainer (True), if there is one, and the other (False)."""


def build_rig(config: Config, checkpoint: Path | None, with_aligned: bool) -> Rig:
    """checkpoint: its weights are used; otherwise those of the starting policy."""
    policy, task, tokenizer = build_policy(config, from_checkpoint=checkpoint is not None)
    policies = {False: policy}
    if with_aligned:
        aligned = changed(config, {"policy": {"forward_precision": "fp8_aligned"}})
        folder = starting_folder(config)
        path = None if folder is None else str(folder)
        updates = config.train.steps * config.train.updates_per_batch
        policies[True] = Policy(aligned, aligned.train.optimizer, updates, config.rollout.temperature, path)
    # The policy that syncs with an engine learns the scales of its cache, so the quantised engine belongs to the aligned trainer.
    owners = {False: policy, True: policies[with_aligned]}
    sessions = {}
    for quantised, owner in owners.items():
        changes = {} if quantised else ARMS[TARGET]
        sessions[quantised] = with_engine(changed(owner.config, changes), owner, task, tokenizer)
        begin(sessions[quantised], checkpoint, with_optimizer=False)
    return Rig(sessions, policies)


def measure(rig: Rig, vectors: list[BasicGradient], batches: int, sketch_size: int, target: str, path: Path | None) -> Record:
    """The basic gradients of `batches` batches of the prompt stream. path: the record is saved there after every batch."""
    trained = [p.numel() for p in rig.policies[False].model.parameters() if p.requires_grad]
    sketcher = Sketcher(trained, sketch_size)
    gradients = {aligned: _sketched_gradient(policy, sketcher) for aligned, policy in rig.policies.items()}
    gram = GramMatrix(batches, len(vectors), sketcher.size)
    seen: dict[Kind, list[Seen]] = {(vector.quantised, vector.aligned): [] for vector in vectors}
    config = rig.policies[False].config
    record = Record(target, config, vectors, gram.values, seen, {True: [], False: []}, sum(trained), sketcher.size)
    unweighted = ais.lagged_loss_scaler(changed(config, {"correction": "none"}), AISState())  # looks at no batch
    position, started = 0, time.perf_counter()
    for number in range(batches):
        collected = {quantised: collect(session, position, PhaseTimer()) for quantised, session in rig.sessions.items()}
        position = collected[True].next_prompt
        for quantised, one in collected.items():
            record.accuracy[quantised].append(statistics.fmean(reward.correct for reward in one.rewards))
        for (quantised, aligned), batches_seen in seen.items():
            batch = collected[quantised].batch
            batches_seen.append(Seen(rig.policies[aligned].logprobs(batch), batch.rollout_logprobs, batch.advantages, batch.loss_mask))
        sketches = []
        for vector in vectors:
            old = seen[vector.quantised, vector.aligned][-1].old_logprobs
            scaler = _at_full_strength(unweighted, vector.correction)
            sketches.append(gradients[vector.aligned](collected[vector.quantised].batch, old, scaler))
        gram.add(torch.stack(sketches))
        record.gram, record.seconds = gram.values, time.perf_counter() - started
        if path is not None:
            record.save(path)
        print(f"batch {number + 1}/{batches}  {record.seconds / (number + 1):.1f} s each", flush=True)
    return record


def _at_full_strength(unweighted: LossScaler, correction: Correction) -> LossScaler:
    return unweighted if correction.name == "none" else replace(unweighted, alpha=1.0, correction=correction)


def _sketched_gradient(policy: Policy, sketcher: Sketcher) -> Callable[[Batch, Tensor, LossScaler], Tensor]:
    """The gradient of a batch's loss, sketched: what the optimizer would have stepped along, which it no longer does."""
    kept: list[Tensor] = []

    def step() -> None:
        kept[:] = [sketcher(p.main_grad for p in policy.model.parameters() if p.requires_grad)]

    policy.optimizer.step = step

    def gradient(batch: Batch, old_logprobs: Tensor, scaler: LossScaler) -> Tensor:
        policy.train_step(batch, old_logprobs, scaler)
        return kept[0]

    return gradient
