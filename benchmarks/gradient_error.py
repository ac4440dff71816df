"""How far each correction's gradient is from the one that unquantised rollouts give: its bias and its noise, measured.

    python benchmarks/gradient_error.py CONFIG|RUN [KEY=VALUE ...] [--batches 48] [--json FILE]

The policy stands still, as its warm start (CONFIG) or its last checkpoint (RUN) left it. Every batch of prompts is answered by
two engines with the same random numbers: one as the configuration says, whose distribution is mu, and one with BF16 weights and
KV cache, whose distribution is the trainer's own but for rounding. t is a batch's gradient from the second, g a correction's
from the first:

    bias     |E (g - t)| / |E t|                (below 0: none seen; its size says how much would have been)
    cosine   of E g and E t                     (above 1: noise)
    noise    tr Var(g) / tr Var(t), of one batch
    B*       batches that must be averaged until their variance is as small as the squared bias

E are estimated without the batches' noise (gradient_statistics.py); errors are a jackknife over blocks of batches. alpha only
mixes, g = g_none + alpha (g_full - g_none), so one backward pass serves every rule for it. The constant alpha of least bias is
printed too; nobody can know it in training.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from contract import machine
from gradient_statistics import BLOCKS, Sums, best_alpha, error_of
from torch import Tensor

from ais_megatron.algorithm import ais
from ais_megatron.algorithm.ais import AISState
from ais_megatron.algorithm.correction import Correction
from ais_megatron.algorithm.diagnostics import Diagnostics, diagnose
from ais_megatron.algorithm.scaler import LossScaler
from ais_megatron.batch import Batch
from ais_megatron.collection import Collected, collect
from ais_megatron.config import Config, build_config, load_config
from ais_megatron.distributed import init_process_group
from ais_megatron.policy.policy import Policy
from ais_megatron.policy.saver import newest_on_all_ranks
from ais_megatron.runs.metrics import PhaseTimer
from ais_megatron.session import Session, build_session, with_engine
from ais_megatron.trainer import begin

ARMS: dict[str, dict[str, Any]] = {
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
    "ais, tau = auto": {"correction": "ais", "ais": {"tau": "auto"}},
    "ais without rho": {"correction": "ais", "ais": {"factors": ["severity", "amplification"]}},
    "ais without severity": {"correction": "ais", "ais": {"factors": ["reliability", "amplification"]}},
    "ais without nu": {"correction": "ais", "ais": {"factors": ["reliability", "severity"]}},
    "ais, C = 5": {"correction": "ais", "ais": {"weight_cap": 5.0}},
    "ais, oracle": {"correction": "ais", "ais": {"coefficient": "oracle"}},
    "ais, sequence": {"correction": "ais", "ais": {"level": "sequence"}},
}


@dataclass
class Measured:
    """target: t. gap: g_tis - g_none. arms, alphas: by name. diagnostics: of the quantised batches. accuracy: of both engines, by batch."""

    target: Sums
    gap: Sums
    arms: dict[str, Sums]
    alphas: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in ARMS})
    diagnostics: list[Diagnostics] = field(default_factory=list)
    accuracy: tuple[list[float], list[float]] = field(default_factory=lambda: ([], []))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--batches", type=int, default=48, help=f"a multiple of {BLOCKS}")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.batches % BLOCKS or arguments.batches < 2 * BLOCKS:
        parser.error(f"--batches={arguments.batches}: must be a multiple of {BLOCKS}, {2 * BLOCKS} or more")
    is_run = arguments.target.is_dir()
    file = arguments.target / "config.yaml" if is_run else arguments.target
    config = load_config(file, [*arguments.overrides, "parallel.dp=1", "train.updates_per_batch=1", "ais.lag=0"])
    init_process_group("cpu")
    quantised = build_session(config, from_checkpoint=is_run)
    begin(quantised, newest_on_all_ranks(arguments.target / "checkpoints") if is_run else None, with_optimizer=False)
    measured = measure(quantised, _behind_bf16(quantised), arguments.batches)
    report(config, arguments.target, measured, arguments.json)


def _behind_bf16(session: Session) -> Session:
    """The same policy with an engine that rounds neither weights nor KV cache."""
    rollout = session.config.rollout.model_copy(update={"quantization": "none", "kv_cache": "auto"})
    config = session.config.model_copy(update={"rollout": rollout})
    unquantised = with_engine(config, session.policy, session.task, session.tokenizer)
    unquantised.sync.push(None, version=0)
    return unquantised


def measure(quantised: Session, unquantised: Session, batches: int) -> Measured:
    """Every arm's gradient on `batches` batches of the prompt stream."""
    policy, gradient = quantised.policy, _gradient_of(quantised.policy)
    arms = {name: _changed(quantised.config, changes) for name, changes in ARMS.items()}
    states = dict.fromkeys(arms, AISState())
    uncorrected = ais.lagged_loss_scaler(arms["none"], AISState())  # looks at no batch
    size = sum(p.numel() for p in policy.model.parameters())
    result = Measured(Sums.empty(size), Sums.empty(size), {name: Sums.empty(size) for name in arms})
    position = 0
    for number in range(batches):
        block = number * BLOCKS // batches
        wanted, sampled = collect(unquantised, position, PhaseTimer()), collect(quantised, position, PhaseTimer())
        position = sampled.next_prompt
        for values, collected in zip(result.accuracy, (sampled, wanted), strict=True):
            values.append(_accuracy(collected))
        t = gradient(wanted.batch, policy.logprobs(wanted.batch), uncorrected)
        result.target.add(block, t, t)
        old, batch = policy.logprobs(sampled.batch), sampled.batch
        g_none = gradient(batch, old, uncorrected)
        full: dict[Correction, Tensor] = {}  # at alpha = 1
        for name, config in arms.items():
            correction = Correction.of(config)
            diagnostics = diagnose(old, batch.rollout_logprobs, batch.advantages, batch.loss_mask, correction)
            scaler, states[name] = ais.loss_scaler(diagnostics, config, states[name])
            weights = replace(correction, name="tis") if correction.name == "ais" else correction
            if scaler.alpha and weights not in full:
                full[weights] = gradient(batch, old, replace(scaler, alpha=1.0))
            g = torch.lerp(g_none, full[weights], scaler.alpha) if scaler.alpha else g_none
            result.arms[name].add(block, g, t)
            result.alphas[name].append(scaler.alpha)
            if name == "tis":
                result.gap.add(block, g - g_none, t)
            if name == "ais":
                result.diagnostics.append(diagnostics)
    return result


def _changed(config: Config, changes: dict[str, Any]) -> Config:
    data = config.model_dump()
    return build_config(data | {key: data[key] | value if isinstance(value, dict) else value for key, value in changes.items()})


def _accuracy(collected: Collected) -> float:
    return statistics.fmean(reward.correct for reward in collected.rewards)


def _gradient_of(policy: Policy) -> Callable[[Batch, Tensor, LossScaler], Tensor]:
    """The gradient of a batch's loss, flat, float32, on the CPU: what the optimizer would have stepped along, which it no longer does."""
    kept: list[Tensor] = []

    def step() -> None:
        kept[:] = [torch.cat([p.main_grad.reshape(-1) for p in policy.model.parameters()]).float().cpu()]

    policy.optimizer.step = step

    def gradient(batch: Batch, old_logprobs: Tensor, scaler: LossScaler) -> Tensor:
        policy.train_step(batch, old_logprobs, scaler)
        return kept[0]

    return gradient


def report(config: Config, target: Path, measured: Measured, out: Path | None) -> None:
    mean, batches, seen = statistics.fmean, len(measured.diagnostics), measured.diagnostics
    responses = config.rollout.prompts_per_step * config.rollout.group_size
    divergence, truncated, raw = (
        mean(getattr(d, key) for d in seen) for key in ("divergence_severity", "weight_reliability", "weight_reliability_raw")
    )
    best = best_alpha(measured.arms["none"], measured.arms["tis"], measured.gap)
    print(f"{target}: rollouts in {config.rollout.quantization}, {batches} batches of {responses} responses; {machine()}")
    print("right answers: {:.1%} quantised, {:.1%} BF16".format(*map(mean, measured.accuracy)))
    print(f"D {divergence:.2e} nats/token, ESS ratio {truncated:.4f} truncated, {raw:.4f} raw")
    print(f"constant alpha of least bias, C = {config.ais.weight_cap:g}: {best:.2f}")
    print(f"{'arm':<22} {'alpha':>6}  {'bias':>16}  {'cosine':>15}  {'noise':>6}  {'B*':>8}")
    table = {}
    for name, sums in measured.arms.items():
        value, error = error_of(sums, measured.target, batches)
        alpha = mean(measured.alphas[name])
        print(
            f"{name:<22} {alpha:>6.3f}  {value.bias:>7.4f} ± {error.bias:.4f}  {value.cosine:>7.4f} ± {error.cosine:.4f}  "
            f"{value.noise:>6.3f}  {value.batches_to_bias:>8.0f}"
        )
        table[name] = {"alpha": alpha, **asdict(value), "errors": asdict(error)}
    if out is not None:
        figures = {"batches": batches, "D": divergence, "ess": truncated, "ess_raw": raw, "best_alpha": best, "arms": table}
        out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
