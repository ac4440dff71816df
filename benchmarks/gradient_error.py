"""How far each correction's gradient is from the one that unquantised rollouts give: its bias and its noise, measured.

    python benchmarks/gradient_error.py CONFIG|RUN [KEY=VALUE ...] [--batches 48] [--horizon 90 ...] [--save FILE] [--trainer aligned]
    python benchmarks/gradient_error.py --from FILE [--horizon 90 ...] [--reference ARM]

The policy stands still, as its warm start (CONFIG) or its last checkpoint (RUN) left it. Every batch of prompts is answered by
two engines with the same random numbers: one as the configuration says, whose distribution is mu, and one with BF16 weights and
KV cache, whose distribution is the trainer's own but for rounding. t is a batch's gradient from the second, g a correction's
from the first:

    bias      |E (g - t)| / |E t|                (below 0: none seen; its size says how much would have been)
    cosine    of E g and E t                     (above 1: noise)
    norm      |E g| / |E t|
    noise     tr Var(g) / tr Var(t), of one batch
    B*        batches that must be averaged until their variance is as small as the squared bias
    error(H)  (|E (g - t)|^2 + tr Var(g) / H) / |E t|^2, what is left after averaging H batches

error(H) judges: training accumulates the bias and averages out the noise. "against" is the difference to the best of
gradient_arms.BASELINES, with an error that knows that both have the same batches. A rule passes if it is no worse within two of
these errors. The best baseline is chosen after the fact, so it looks a little better than it is. `--against ARM` takes another.

Arms that the configuration refuses are left out, and a line says why.

E are estimated without the batches' noise, and ± are jackknife errors over batches (gradient_statistics.py). Only a basis of
gradients needs backward passes, because every rule for alpha and C mixes them (gradient_arms.py). What is kept are inner products
of their sketches (gradient_sketch.py). So `--from` judges any other rule for alpha and C later, without the model. The arms are
those of gradient_arms.py, and the limits of weights those of `ais.caps` and `ais.bands`; "limit" shows an arm's most frequent one.
Arms named "whole gradients" and "in hindsight" know what training cannot know (whole_gradients.py).

`--trainer aligned` adds a trainer with policy.forward_precision=fp8_aligned. It has the same weights, and trains on the same
quantised rollouts:

    aligned       its straight-through gradient. The engine samples from its policy but for rounding, so no weights are needed.
                  Against t it shows what aligning changes: the objective, which is now the reward of the quantised policy, and
                  whatever going straight through the rounding of inputs, K and V gets wrong. So its "bias" need not be a mistake.
    aligned, tis  the same with the weights of its remaining D. How it differs from `aligned` is the sampling bias that is left.
    --reference "aligned, tis"
                  measures all arms against the straight-through gradient of the quantised policy instead. This is the
                  score-function gradient with respect to the dequantised weights, which straight-through passes on unchanged.
                  So it tells how well BF16's gradients, corrected or not, serve a quantised policy.

Time, per batch: two generations, forward and backward passes over all responses with an advantage for five basic gradients (seven with
an aligned trainer), and for the other seven over those among them with a weight above the least C. Memory: two engines and the
trainers, with weights in float32 and gradients, and 4 MB for each basic gradient of each batch. SmolLM2 (135 M) takes 3.7 GB.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import whole_gradients
from contract import machine
from gradient_arms import BASELINES, TARGET, BasicGradient, Mixture, basic_gradient, basis, changed, limit_text, mixture, possible_arms
from gradient_basis import Record, build_rig, measure
from gradient_statistics import Estimate, GradientError, best_alpha, combined, estimate, gradient_error, moments

from ais_megatron.algorithm.measured import limits
from ais_megatron.config import load_config
from ais_megatron.distributed import init_process_group
from ais_megatron.policy.saver import newest_on_all_ranks

NAME = 30  # characters of an arm's name in a table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, nargs="?")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--batches", type=int, default=48)
    parser.add_argument("--trainer", choices=["plain", "aligned"], default="plain")
    parser.add_argument("--sketch", type=int, default=2**20, help="numbers in a sketch")
    parser.add_argument("--save", type=Path, help="write what was measured here after every batch, for --from")
    parser.add_argument("--from", type=Path, dest="file", help="only report what --save wrote")
    parser.add_argument("--against", help="compare error(H) with that of this arm; by default with that of the best fixed rule")
    parser.add_argument("--horizon", type=float, nargs="+", default=[90.0], help="H of error(H), in batches; inf: the squared bias alone")
    parser.add_argument("--reference", default=TARGET, help="the arm that the others are measured against")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if (arguments.file is None) == (arguments.target is None):
        parser.error("give a CONFIG or a RUN, or --from FILE")
    if arguments.batches < 3:
        parser.error(f"--batches={arguments.batches}: must be 3 or more")
    record = Record.load(arguments.file) if arguments.file else collect(arguments)
    report(record, arguments.horizon, arguments.reference, arguments.against, arguments.json)


def collect(arguments: argparse.Namespace) -> Record:
    target, is_run, with_aligned = arguments.target, arguments.target.is_dir(), arguments.trainer == "aligned"
    fixed = ["parallel.dp=1", "train.updates_per_batch=1", "ais.lag=0", "policy.forward_precision=bf16"]
    config = load_config(target / "config.yaml" if is_run else target, [*arguments.overrides, *fixed])
    arms, _ = possible_arms(config, with_aligned)
    vectors = basis(config, arms.values())
    init_process_group("cpu")
    rig = build_rig(config, newest_on_all_ranks(target / "checkpoints") if is_run else None, with_aligned)
    return measure(rig, config, vectors, arguments.batches, arguments.sketch, str(target), arguments.save)


@dataclass(frozen=True)
class Judged:
    """One arm."""

    mixture: Mixture
    error: GradientError


def judge(record: Record, reference: str) -> dict[str, Judged]:
    """Every arm whose gradients were taken, against the gradient of the arm `reference`."""
    configs, refused = possible_arms(record.config, any(aligned for _, aligned in record.seen))
    for name, why in refused.items():
        print(f"left out: {name}: {why}")
    mixtures = {}
    for name, config in configs.items():
        kind = basic_gradient(config)
        if (kind.quantised, kind.aligned) in record.seen:
            mixtures[name] = mixture(config, record.vectors, record.seen[kind.quantised, kind.aligned])
    mixtures |= {f"ais, {name}": mixed for name, mixed in whole_gradients.mixtures(record).items()}
    if reference not in mixtures:
        raise SystemExit(f"--reference={reference}: must be one of {', '.join(mixtures)}")
    target = mixtures[reference].coefficients
    return {name: Judged(mixed, gradient_error(record.gram, mixed.coefficients, target)) for name, mixed in mixtures.items()}


def report(record: Record, horizons: list[float], reference: str, against: str | None, out: Path | None) -> None:
    arms = judge(record, reference)
    if against is not None and against not in arms:
        raise SystemExit(f"--against={against}: must be one of {', '.join(arms)}")
    mean, config = statistics.fmean, record.config
    responses = config.rollout.prompts_per_step * config.rollout.group_size
    divergence, truncated, raw = (
        mean(getattr(d, key) for d in arms["ais, product"].mixture.diagnostics)
        for key in ("divergence_severity", "weight_reliability", "weight_reliability_raw")
    )
    batches = len(record.gram)
    print(f"{record.target}: rollouts in {config.rollout.quantization}, {batches} batches of {responses} responses; {machine()}")
    print(f"{record.parameters:,} parameters in sketches of {record.sketch:,}; {record.seconds:.0f} s")
    print("right answers: {:.1%} quantised, {:.1%} BF16".format(*(mean(record.accuracy[key]) for key in (True, False))))
    print(f"D {divergence:.2e} nats/token, ESS ratio {truncated:.4f} truncated, {raw:.4f} raw\n")
    if hidden := hidden_by_noise(record, arms[reference]):
        print(f"{hidden}\n")
    table = print_arms(arms, reference)
    for horizon in horizons:
        print_horizon(arms, horizon, table, against)
    best = {f"{horizon:g}": print_best_alphas(record, arms[reference].mixture, horizon) for horizon in horizons}
    if out is not None:
        figures = {
            "batches": batches,
            "reference": reference,
            "D": divergence,
            "ess": truncated,
            "ess_raw": raw,
            "best": best,
            "arms": table,
        }
        out.write_text(json.dumps(figures, indent=1) + "\n")


def hidden_by_noise(record: Record, target: Judged) -> str | None:
    """What to do if so few batches do not show the gradient that all figures are relative to."""
    square = estimate(moments(combined(record.gram, target.mixture.coefficients, target.mixture.coefficients)).product)
    if square.value > 2.0 * square.error:
        return None
    return (
        f"WARNING: noise hides the reference's gradient: |E t|^2 is {square.value:.2g} ± {square.error:.2g}, and all figures below are "
        "relative to it; raise --batches"
    )


def print_arms(arms: dict[str, Judged], reference: str) -> dict[str, dict[str, Any]]:
    """The table of all arms. Returns it for a file."""
    print(
        f"{'against ' + reference:<{NAME}} {'alpha':>6} {'limit':>7}  {'bias':>16}  {'cosine':>15}  {'norm':>15}  {'noise':>15}  {'B*':>8}"
    )
    table = {}
    for name, arm in arms.items():
        alpha, limit = statistics.fmean(arm.mixture.alphas), statistics.mode(arm.mixture.limits)
        figures = {key: estimate(getattr(arm.error, key)) for key in ("bias", "cosine", "norm", "noise")}
        cells = "  ".join(f"{f.value:>{width}.4f} ± {f.error:.4f}" for f, width in zip(figures.values(), (7, 6, 6, 6), strict=True))
        print(f"{name:<{NAME}} {alpha:>6.3f} {limit:>7}  {cells}  {arm.error.batches_to_bias:>8.0f}")
        errors = {key: figure.error for key, figure in figures.items()}
        values = {key: figure.value for key, figure in figures.items()}
        table[name] = {"alpha": alpha, "limit": limit, **values, "batches_to_bias": arm.error.batches_to_bias, "errors": errors}
    return table


def print_horizon(arms: dict[str, Judged], horizon: float, table: dict[str, dict[str, Any]], against: str | None) -> None:
    """error(H) of all arms, and its difference to that of one arm, by default the best baseline. Adds both to the table."""
    errors = {name: arm.error.error(horizon) for name, arm in arms.items()}
    best = against or min((name for name in BASELINES if name in errors), key=lambda name: float(errors[name][0]))
    print(f"\n{f'H = {horizon:g} batches':<{NAME}} {'error(H)':>17}  {'against ' + best:>19}")
    for name, values in errors.items():
        own, difference = estimate(values), estimate(values - errors[best])
        verdict = "worse" if difference.value > 2.0 * difference.error else ""
        print(
            f"{name:<{NAME}} {own.value:>8.4f} ± {own.error:.4f}  {difference.value:>+10.4f} ± {difference.error:.4f}  {verdict}".rstrip()
        )
        table[name].setdefault("horizons", {})[f"{horizon:g}"] = {"error": own, "against": best, "difference": difference}


def print_best_alphas(record: Record, target: Mixture, horizon: float) -> dict[str, tuple[Estimate, Estimate]]:
    """For every limit of the weights the constant alpha of least error(H), and that error. Nobody can know it in training."""
    print(f"\n{f'best constant, H = {horizon:g}':<{NAME}} {'alpha':>15}  {'error(H)':>17}")
    result = {}
    for limit in limits(changed(record.config, {"correction": "ais"})):
        full, name = basic_gradient(record.config, limit), limit_text(limit)
        if full not in record.vectors:
            continue
        none, alone = (one_gradient(record, vector) for vector in (full.uncorrected, full))
        alpha, least = map(estimate, best_alpha(record.gram, none, alone, target.coefficients, horizon))
        print(f"{name:<{NAME}} {alpha.value:>6.2f} ± {alpha.error:>6.2f}  {least.value:>8.4f} ± {least.error:.4f}")
        result[name] = (alpha, least)
    return result


def one_gradient(record: Record, vector: BasicGradient) -> torch.Tensor:
    """The coefficients of one basic gradient alone, ``[batches, vectors]``."""
    coefficients = torch.zeros(record.gram.shape[:2], dtype=record.gram.dtype)
    coefficients[:, record.vectors.index(vector)] = 1.0
    return coefficients


if __name__ == "__main__":
    main()
