"""Takes the basic gradients of batch after batch, and keeps what a later judgement needs: inner products, and tokens' log-probabilities."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gradient_arms import ARMS, TARGET, BasicGradient, Seen, at_full_strength, changed, possible_arms
from gradient_sketch import GramMatrix, Sketcher
from torch import Tensor

from ais_megatron.algorithm import ais
from ais_megatron.algorithm.ais import AISState
from ais_megatron.algorithm.correction import METHODS, Correction, log_importance_ratio
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
        vectors = [
            BasicGradient(**{**vector, "correction": at_full_strength(Correction(**vector["correction"]))}) for vector in plain["vectors"]
        ]
        seen = {kind: [Seen(*batch) for batch in batches] for kind, batches in plain["seen"].items()}
        return Record(**{**plain, "config": build_config(plain["config"]), "vectors": vectors, "seen": seen})


@dataclass(frozen=True)
class Rig:
    """Two engines and one or two trainers with the same weights."""

    sessions: dict[bool, Session]
    """With the quantised engine (True), and with one that rounds neither weights nor KV cache (False)."""
    policies: dict[bool, Policy]
    """The aligned trainer (True), if there is one, and the other (False)."""


def starting_policy_in(config: Config, precision: str) -> Policy:
    """A further policy with the starting weights, and another `policy.forward_precision`."""
    folder = starting_folder(config)
    updates = config.train.steps * config.train.updates_per_batch
    other = changed(config, {"policy": {"forward_precision": precision}})
    return Policy(other, other.train.optimizer, updates, config.likelihood_temperature, None if folder is None else str(folder))


def build_rig(config: Config, checkpoint: Path | None, with_aligned: bool) -> Rig:
    """checkpoint: its weights are used; otherwise those of the starting policy."""
    arms, _ = possible_arms(config, with_aligned)
    config = next((arm for name, arm in arms.items() if arm.measures_gradients and name in ARMS), config)  # its policy sketches gradients
    policy, task, tokenizer = build_policy(config, from_checkpoint=checkpoint is not None)
    policies = {False: policy}
    if with_aligned:
        policies[True] = starting_policy_in(config, "fp8_aligned")
    # The policy that syncs with an engine learns the scales of its cache, so the quantised engine belongs to the aligned trainer.
    owners = {False: policy, True: policies[with_aligned]}
    sessions = {}
    for quantised, owner in owners.items():
        changes = {} if quantised else ARMS[TARGET]
        sessions[quantised] = with_engine(changed(owner.config, changes), owner, task, tokenizer)
        begin(sessions[quantised], checkpoint, with_optimizer=False)
    return Rig(sessions, policies)


def measure(
    rig: Rig, config: Config, vectors: list[BasicGradient], batches: int, sketch_size: int, target: str, path: Path | None
) -> Record:
    """The basic gradients of `batches` batches of the prompt stream. path: the record is saved there after every batch."""
    trained = [p.numel() for p in rig.policies[False].model.parameters() if p.requires_grad]
    sketcher = Sketcher(trained, sketch_size)
    takers = {aligned: Taker(policy, sketcher) for aligned, policy in rig.policies.items()}
    gram = GramMatrix(batches, len(vectors), sketcher.size)
    seen: dict[Kind, list[Seen]] = {(vector.quantised, vector.aligned): [] for vector in vectors}
    record = Record(target, config, vectors, gram.values, seen, {True: [], False: []}, sum(trained), sketcher.size)
    position, started = 0, time.perf_counter()
    for number in range(batches):
        collected = {quantised: collect(session, position, PhaseTimer()) for quantised, session in rig.sessions.items()}
        position = collected[True].next_prompt
        for quantised, one in collected.items():
            record.accuracy[quantised].append(statistics.fmean(reward.correct for reward in one.rewards))
        sketches: dict[BasicGradient, Tensor] = {}
        for (quantised, aligned), batches_seen in seen.items():
            batch = collected[quantised].batch
            gradients = rig.policies[aligned].response_gradients(batch)
            old = rig.policies[aligned].logprobs(batch, gradients)
            sums = None if gradients is None else gradients.sums()
            batches_seen.append(Seen(old, batch.rollout_logprobs, batch.advantages, batch.loss_mask, sums))
            same_kind = [vector for vector in vectors if (vector.quantised, vector.aligned) == (quantised, aligned)]
            sketches |= basic_gradients(same_kind, batch, old, takers[aligned])
        gram.add(torch.stack([sketches[vector] for vector in vectors]))
        record.gram, record.seconds = gram.values, time.perf_counter() - started
        if path is not None:
            record.save(path)
        print(f"batch {number + 1}/{batches}  {record.seconds / (number + 1):.1f} s each", flush=True)
    return record


def basic_gradients(vectors: list[BasicGradient], batch: Batch, old_logprobs: Tensor, take: Taker) -> dict[BasicGradient, Tensor]:
    """The sketches of one batch's gradients, all with the same rollouts and trainer.

    Most weights lie below every C and inside every band. So corrections of single tokens differ in few responses, and only these go
    through all backward passes:  g = g_base + (their share of the loss) (g - g_base of these responses alone).
    """
    similar = [vector for vector in vectors if vector.correction.acts_on_tokens]
    result = {vector: take(batch, old_logprobs, vector.correction) for vector in vectors if vector not in similar}
    if not similar:
        return result
    base = max(similar, key=lambda vector: (vector.correction.name == "tis", vector.correction.weight_cap))
    result |= dict.fromkeys(similar, take(batch, old_logprobs, base.correction))
    log_ratio = log_importance_ratio(old_logprobs, batch.rollout_logprobs)
    weights = {vector: vector.correction.weights(log_ratio, batch.loss_mask) for vector in similar}
    differs = torch.stack([(weights[vector] != weights[base]) & batch.loss_mask for vector in similar])
    rows = (differs.any(2).any(0) & (batch.advantages != 0)).nonzero()[:, 0]
    if not len(rows):
        return result
    part, old = batch.rows(rows), old_logprobs[rows]
    share = take.share(part, batch)
    of_base = take(part, old, base.correction)
    for vector in similar:
        if vector != base:
            result[vector] = result[vector] + share * (take(part, old, vector.correction) - of_base)
    return result


class Taker:
    """Sketches the gradients of one policy's loss: what its optimizer would have stepped along, which it no longer does."""

    def __init__(self, policy: Policy, sketcher: Sketcher) -> None:
        config, self._policy, self._sketcher = policy.config, policy, sketcher
        self._unweighted = ais.lagged_loss_scaler(changed(config, {"correction": "none"}), AISState())  # looks at no batch
        self._needs_advantage = not (config.objective.kl_coefficient or config.objective.entropy_bonus or config.architecture.is_moe)
        policy.optimizer.step = self._keep

    def _keep(self) -> None:
        self._sketch = self._sketcher(p.main_grad for p in self._policy.model.parameters() if p.requires_grad)

    def __call__(self, batch: Batch, old_logprobs: Tensor, correction: Correction) -> Tensor:
        """float32 ``[sketch]``: the gradient of the batch's loss with this correction at full strength.

        Where nothing but the policy loss has a gradient, responses without an advantage have none, and are left out.
        """
        rejects = METHODS[correction.name].accepts is not None  # then the share of the others depends on their weights
        rows = batch.advantages.nonzero()[:, 0] if self._needs_advantage and not rejects else torch.arange(len(batch))
        if not len(rows):
            return torch.zeros(self._sketcher.size)
        part, alpha = batch.rows(rows), 0.0 if correction.name == "none" else 1.0
        self._policy.train_step(part, old_logprobs[rows], replace(self._unweighted, alpha=alpha, correction=correction))
        return self._sketch * self.share(part, batch)

    def share(self, part: Batch, batch: Batch) -> float:
        """What the loss of some rows counts in that of all: their share of the tokens, each as often as it counts, or, if responses are
        averaged, of the rows."""

        def count(rows: Batch) -> int:
            if self._unweighted.aggregation != "token":
                return int(rows.loss_mask.any(1).sum())
            tokens = rows.loss_mask.sum(1)
            return int((tokens if rows.repeats is None else tokens * rows.repeats).sum())

        return count(part) / max(count(batch), 1)
