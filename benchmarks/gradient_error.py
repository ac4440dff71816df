"""How far each correction's gradient is from the one that unquantised rollouts give: its bias and its variance, measured.

    python benchmarks/gradient_error.py CONFIG|RUN [KEY=VALUE ...] [--batches 48] [--json FILE]

The policy stands still, as its warm start (CONFIG) or its last checkpoint (RUN) left it. Every batch of prompts is answered by
two engines with the same random numbers: one as the configuration says, whose distribution is mu, and one with BF16 weights and
KV cache, whose distribution is the trainer's own but for rounding. With t_i the gradient of batch i from the second and g_i one
correction's from the first, over B batches,

    |E x|^2    estimated by (|sum x_i|^2 - sum |x_i|^2) / (B (B - 1)), which the noise of the batches does not inflate
    bias       |E (g - t)| / |E t|
    cosine     of E g and E t
    noise      tr Var(g) / tr Var(t), one batch
    B*         batches that must be averaged until bias^2 is as large as the variance that is left: tr Var(g) / |E (g - t)|^2

alpha only mixes (g = g_none + alpha (g_full - g_none)), so one backward pass serves all rules for it. The constant alpha of
least bias is printed too; nobody can know it in training. Errors are a jackknife over `BLOCKS` blocks of batches.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from contract import machine
from torch import Tensor

from ais_megatron.algorithm import ais
from ais_megatron.algorithm.ais import AISState
from ais_megatron.algorithm.correction import Correction
from ais_megatron.algorithm.diagnostics import Diagnostics, diagnose
from ais_megatron.batch import Batch
from ais_megatron.collection import collect
from ais_megatron.config import Config, build_config, load_config
from ais_megatron.distributed import init_process_group
from ais_megatron.generation import Generator
from ais_megatron.metrics import PhaseTimer
from ais_megatron.policy.policy import Policy, data_parallel_group
from ais_megatron.policy.saver import newest_on_all_ranks
from ais_megatron.rollout.build import build_engine
from ais_megatron.session import Session, build_session
from ais_megatron.trainer import begin
from ais_megatron.weight_sync import WeightSync

BLOCKS = 8
TARGET, GAP = "t", "g_tis - g_none"  # beside the arms
ARMS = {
    "none": {"correction": "none"},
    "tis": {"correction": "tis"},
    "tis, C = 1.5": {"correction": "tis", "ais": {"weight_cap": 1.5}},
    "tis, C = 5": {"correction": "tis", "ais": {"weight_cap": 5.0}},
    "tis, geometric": {"correction": "tis", "correction_options": {"level": "geometric"}},
    "tis, sequence": {"correction": "tis", "correction_options": {"level": "sequence"}},
    "mis": {"correction": "mis"},
    "icepop": {"correction": "icepop"},
    "ais": {"correction": "ais"},
    "ais, tau = 5e-4": {"correction": "ais", "ais": {"tau": 5e-4}},
    "ais, tau = 1e-2": {"correction": "ais", "ais": {"tau": 1e-2}},
    "ais, tau auto": {"correction": "ais", "ais": {"tau": "auto"}},
    "ais without rho": {"correction": "ais", "ais": {"factors": ["severity", "amplification"]}},
    "ais without severity": {"correction": "ais", "ais": {"factors": ["reliability", "amplification"]}},
    "ais without nu": {"correction": "ais", "ais": {"factors": ["reliability", "severity"]}},
    "ais, oracle": {"correction": "ais", "ais": {"coefficient": "oracle"}},
    "ais, sequence": {"correction": "ais", "ais": {"level": "sequence"}},
}


@dataclass
class Sums:
    """Over batches, by block: sums of g and g - t (``[BLOCKS, parameters]``), and of their squares and products with t (``[BLOCKS]``)."""

    g: Tensor
    d: Tensor
    gg: Tensor = field(default_factory=lambda: torch.zeros(BLOCKS, dtype=torch.float64))
    dd: Tensor = field(default_factory=lambda: torch.zeros(BLOCKS, dtype=torch.float64))
    gt: Tensor = field(default_factory=lambda: torch.zeros(BLOCKS, dtype=torch.float64))
    alphas: list[float] = field(default_factory=list)

    @staticmethod
    def zeros(parameters: int) -> Sums:
        return Sums(torch.zeros(BLOCKS, parameters), torch.zeros(BLOCKS, parameters))

    def add(self, block: int, g: Tensor, t: Tensor, alpha: float) -> None:
        self.g[block] += g
        self.d[block] += g - t
        self.gg[block] += g.dot(g)
        self.dd[block] += (g - t).dot(g - t)
        self.gt[block] += g.dot(t)
        self.alphas.append(alpha)


@dataclass(frozen=True)
class Row:
    bias: float
    cosine: float
    noise: float
    crossing: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--batches", type=int, default=48)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    is_run = arguments.target.is_dir()
    config = load_config(arguments.target / "config.yaml" if is_run else arguments.target, [*arguments.overrides, "parallel.dp=1"])
    batches = arguments.batches // BLOCKS * BLOCKS
    init_process_group("cpu")
    quantised = build_session(config, from_checkpoint=is_run)
    begin(quantised, newest_on_all_ranks(arguments.target / "checkpoints") if is_run else None, with_optimizer=False)
    unquantised = _with_bf16_engine(quantised)
    arms = {name: build_config(_merged(config.model_dump(), changes)) for name, changes in ARMS.items()}
    sums, diagnostics, accuracy = _measure(quantised, unquantised, arms, batches)
    report(config, arguments.target, sums, diagnostics, accuracy, arguments.json)


def _with_bf16_engine(session: Session) -> Session:
    """The same policy behind an engine that rounds nothing, with the policy's weights in it."""
    rollout = session.config.rollout.model_copy(update={"quantization": "none", "kv_cache": "auto"})
    config = session.config.model_copy(update={"rollout": rollout})
    engine = build_engine(config, eos_id=session.tokenizer.eos_id, pad_id=session.tokenizer.pad_id)
    sync = WeightSync(session.policy, engine, rollout)
    sync.push(session.policy.calibrator.latest.scales, version=0)
    return replace(session, config=config, engine=engine, sync=sync, generator=Generator(engine, sync, rollout))


def _merged(data: dict[str, object], changes: dict[str, object]) -> dict[str, object]:
    return data | {k: data[k] | v if isinstance(v, dict) else v for k, v in changes.items()}


def _measure(
    quantised: Session, unquantised: Session, arms: dict[str, Config], batches: int
) -> tuple[dict[str, Sums], list[Diagnostics], tuple[float, float]]:
    """Sums of every arm (and of `TARGET` and `GAP`), the diagnostics of every quantised batch, and both engines' share of right answers."""
    policy, gradient = quantised.policy, gradients(quantised.policy)
    sums: dict[str, Sums] = {}
    states = dict.fromkeys(arms, AISState())
    diagnostics, right = [], ([], [])
    uncorrected = next(config for config in arms.values() if config.correction == "none")
    position = 0
    for number in range(batches):
        block = number * BLOCKS // batches
        target = collect(unquantised, position, PhaseTimer())
        sampled = collect(quantised, position, PhaseTimer())
        position = sampled.next_prompt
        for into, collected in zip(right, (sampled, target), strict=True):
            into.append(statistics.fmean(reward.correct for reward in collected.rewards))
        t = gradient(target.batch, policy.logprobs(target.batch), uncorrected)
        sums.setdefault(TARGET, Sums.zeros(len(t))).add(block, t, t, 0.0)
        old = policy.logprobs(sampled.batch)
        full: dict[Correction, Tensor] = {}
        for name, config in arms.items():
            correction, rollouts = (
                replace(Correction.of(config), name="tis" if config.correction == "ais" else config.correction),
                sampled.batch,
            )
            if correction not in full:
                full[correction] = gradient(rollouts, old, config, correction)
            parts = (old, rollouts.rollout_logprobs, rollouts.advantages, rollouts.loss_mask)
            seen = diagnose(*parts, config.ais.weight_cap, data_parallel_group(), Correction.of(config))
            scaler, states[name] = ais.loss_scaler(seen, config, states[name])
            none = full[next(iter(full))]  # the first arm's
            g = none + scaler.alpha * (full[correction] - none) if config.correction == "ais" else full[correction]
            sums.setdefault(name, Sums.zeros(len(t))).add(block, g, t, scaler.alpha)
            if name == "tis":
                sums.setdefault(GAP, Sums.zeros(len(t))).add(block, g - none, t, 0.0)
            if name == "ais":
                diagnostics.append(seen)
    return sums, diagnostics, (statistics.fmean(right[0]), statistics.fmean(right[1]))


def gradients(policy: Policy) -> Callable[..., Tensor]:
    """A function that gives the gradient of a batch, flat and in float32 on the CPU, where the optimizer would have stepped."""
    kept: list[Tensor] = []

    def step() -> None:
        kept[:] = [torch.cat([p.main_grad.reshape(-1) for p in policy.model.parameters()]).float().cpu()]

    policy.optimizer.step = step

    def gradient(batch: Batch, old: Tensor, config: Config, correction: Correction | None = None) -> Tensor:
        scaler = ais.loss_scaler(diagnose(old, batch.rollout_logprobs, batch.advantages, batch.loss_mask, config.ais.weight_cap), config)[0]
        scaler = replace(scaler, correction=correction or scaler.correction, alpha=0.0 if config.correction == "none" else 1.0)
        policy.train_step(batch, old, scaler)
        return kept[0]

    return gradient


def row(arm: Sums, target: Sums, blocks: Tensor, batches: int) -> Row:
    """The figures of one arm over the batches of these blocks."""

    def squared(vectors: Tensor, squares: Tensor) -> float:
        total = vectors[blocks].sum(0)
        return float((total.dot(total).double() - squares[blocks].sum()) / (batches * (batches - 1)))

    def variance(vectors: Tensor, squares: Tensor) -> float:
        total = vectors[blocks].sum(0)
        return float((squares[blocks].sum() - total.dot(total).double() / batches) / (batches - 1))

    t, g, d = squared(target.g, target.gg), squared(arm.g, arm.gg), squared(arm.d, arm.dd)
    product = arm.g[blocks].sum(0).dot(target.g[blocks].sum(0)).double() - arm.gt[blocks].sum()
    cosine = float(product) / (batches * (batches - 1)) / math.sqrt(max(t, 1e-30) * max(g, 1e-30))
    noise = variance(arm.g, arm.gg)
    bias = math.sqrt(max(d, 0.0) / max(t, 1e-30))
    return Row(bias, cosine, noise / variance(target.g, target.gg), noise / d if d > 0 else math.inf)


def best_alpha(none: Sums, full: Sums, gap: Sums) -> float:
    """Of least |E (g_none + alpha e - t)|^2, where e = g_full - g_none are `gap`'s vectors: - <E d, E e> / |E e|^2, without the noise."""
    products = (full.gg - none.gg - gap.gg) / 2 - gap.gt  # sums of <g_none - t, e>
    d, e = none.d.sum(0), gap.g.sum(0)
    return -float((d.dot(e).double() - products.sum()) / (e.dot(e).double() - gap.gg.sum()))


def report(
    config: Config, target: Path, sums: dict[str, Sums], seen: list[Diagnostics], accuracy: tuple[float, float], out: Path | None
) -> None:
    batches, size = len(seen), len(seen) // BLOCKS
    everything = torch.arange(BLOCKS)
    mean = statistics.fmean
    responses = config.rollout.prompts_per_step * config.rollout.group_size
    print(f"{target}: rollouts in {config.rollout.quantization}, {batches} batches of {responses} responses; {machine()}")
    print(f"right answers: {accuracy[0]:.1%} quantised, {accuracy[1]:.1%} BF16")
    divergence, truncated, raw = (
        mean(getattr(s, key) for s in seen) for key in ("divergence_severity", "weight_reliability", "weight_reliability_raw")
    )
    print(f"D {divergence:.2e} nats/token, ESS ratio {truncated:.4f} truncated, {raw:.4f} raw")
    best = best_alpha(sums["none"], sums["tis"], sums[GAP])
    print(f"constant alpha of least bias (C = {config.ais.weight_cap:g}): {best:.2f}")
    print(f"{'arm':<22} {'alpha':>6}  {'bias':>15}  {'cosine':>15}  {'noise':>6}  {'B*':>8}")
    result = {}
    for name, arm in sums.items():
        if name in (TARGET, GAP):
            continue
        figures = row(arm, sums[TARGET], everything, batches)
        others = [row(arm, sums[TARGET], everything[everything != block], batches - size) for block in range(BLOCKS)]
        errors = [
            math.sqrt((BLOCKS - 1) / BLOCKS * sum((getattr(o, key) - mean(getattr(p, key) for p in others)) ** 2 for o in others))
            for key in ("bias", "cosine")
        ]
        print(
            f"{name:<22} {mean(arm.alphas):>6.3f}  {figures.bias:>7.4f} ± {errors[0]:.4f}  {figures.cosine:>7.4f} ± {errors[1]:.4f}  "
            f"{figures.noise:>6.3f}  {figures.crossing:>8.0f}"
        )
        result[name] = {"alpha": mean(arm.alphas), **figures.__dict__, "bias_error": errors[0], "cosine_error": errors[1]}
    if out is not None:
        out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
