"""How mismatch grows with the length of responses: D, weights of tokens and weights of whole responses, up to each length.

    python benchmarks/response_length.py CONFIG|RUN [KEY=VALUE ...] [--lengths 32 64 128 256 512] [--batches 1] [--json FILE]

The policy stands still. The engine answers prompts in its precision, and the trainer takes the log-probabilities of all responses
once. Each line is about the first L tokens of every response, so the lines share their tokens:

    D            k3 estimate of the KL divergence, in nats per token
    D here       the same, only of the tokens that this line adds to the one above it
    ESS, tokens  effective sample size of the tokens' raw importance weights, as a share of the tokens
    ESS, resp.   the same of the responses' raw weights, which are products over their tokens
    in band      share of responses with a weight in [0.5, 2], the band of `mis` at its default
    alpha        of the product formula with the configuration's tau (5e-4 if it is automatic)
"""

from __future__ import annotations

import argparse
import json
from itertools import pairwise
from pathlib import Path

import torch
from contract import machine
from torch import Tensor

from ais_megatron.algorithm.ais import product_coefficient
from ais_megatron.algorithm.correction import Correction, log_importance_ratio
from ais_megatron.algorithm.diagnostics import diagnose
from ais_megatron.batch import Batch
from ais_megatron.collection import collect
from ais_megatron.config import Config, load_config
from ais_megatron.config.algorithm import AISConfig
from ais_megatron.distributed import init_process_group
from ais_megatron.policy.saver import newest_on_all_ranks
from ais_megatron.runs.metrics import PhaseTimer
from ais_megatron.session import build_session
from ais_megatron.trainer import begin

BAND = (0.5, 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--batches", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    target, lengths = arguments.target, sorted(arguments.lengths)
    fixed = ["parallel.dp=1", f"rollout.max_response_tokens={lengths[-1]}"]
    config = load_config(target / "config.yaml" if target.is_dir() else target, [*arguments.overrides, *fixed])
    init_process_group("cpu")
    old, rollout, mask = collect_responses(config, target if target.is_dir() else None, arguments.batches)
    ais = config.ais.model_copy(update={"tau": 5e-4}) if config.ais.tau == "auto" else config.ais

    longest, cache = mask.sum(1), "FP8" if config.rollout.kv_cache_is_fp8 else "BF16"
    print(f"{target}: rollouts in {config.rollout.quantization}, {cache} KV cache, {len(mask)} responses; {machine()}")
    print(f"{int(longest.sum())} tokens; a response has {longest.float().mean():.0f} on average\n")
    print(f"{'tokens':>6} {'reach it':>9} {'D':>10} {'D here':>10} {'ESS, tokens':>12} {'ESS, resp.':>11} {'in band':>8} {'alpha':>7}")
    rows = [row(old, rollout, mask, length, before, ais) for before, length in pairwise([0, *lengths])]
    for r in rows:
        print(
            f"{r['tokens']:>6} {r['reached']:>9.1%} {r['D']:>10.2e} {r['D_here']:>10.2e} {r['ess_tokens']:>12.4f} "
            f"{r['ess_responses']:>11.4f} {r['in_band']:>8.1%} {r['alpha']:>7.3f}"
        )
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def collect_responses(config: Config, run: Path | None, batches: int) -> tuple[Tensor, Tensor, Tensor]:
    """The trainer's and the engine's log-probabilities and their mask, ``[responses, tokens]``. run: its newest checkpoint is used."""
    checkpoint = newest_on_all_ranks(run / "checkpoints") if run is not None else None
    session = build_session(config, from_checkpoint=checkpoint is not None)
    begin(session, checkpoint, with_optimizer=False)
    parts, position = [], 0
    for number in range(batches):
        collected = collect(session, position, PhaseTimer())
        position = collected.next_prompt
        parts.append(_responses(collected.batch, session.policy.logprobs(collected.batch), config.rollout.max_response_tokens))
        print(f"batch {number + 1}/{batches}", flush=True)
    old, rollout, mask = (torch.cat(part) for part in zip(*parts, strict=True))
    return old, rollout, mask


def row(old: Tensor, rollout: Tensor, mask: Tensor, length: int, before: int, ais: AISConfig) -> dict[str, float]:
    """The figures of the first `length` tokens of all responses, of which the line above has `before`."""
    position = torch.arange(mask.shape[1])
    up_to, here = mask & (position < length), mask & (position < length) & (position >= before)
    log_ratio = log_importance_ratio(old, rollout)
    unweighted = torch.ones(len(mask))
    diagnostics = diagnose(old, rollout, unweighted, up_to, Correction("tis"))
    weights = (log_ratio * up_to).sum(1).double().exp()
    return {
        "tokens": length,
        "reached": float((mask.sum(1) >= length).float().mean()),
        "D": diagnostics.divergence_severity,
        "D_here": diagnose(old, rollout, unweighted, here, Correction("tis")).divergence_severity,
        "ess_tokens": diagnostics.weight_reliability_raw,
        "ess_responses": float(weights.sum() ** 2 / weights.square().sum() / len(weights)),
        "in_band": float(((weights >= BAND[0]) & (weights <= BAND[1])).float().mean()),
        "alpha": product_coefficient(diagnostics, ais),
    }


def _responses(batch: Batch, old_logprobs: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The trainer's and the engine's log-probabilities and their mask, ``[batch, length]``. Every response begins at column 0."""
    start = batch.loss_mask.int().argmax(1)
    columns = (start[:, None] + torch.arange(length)).clamp(max=batch.loss_mask.shape[1] - 1)
    inside = start[:, None] + torch.arange(length) < batch.loss_mask.shape[1]
    mask = batch.loss_mask.gather(1, columns) & inside
    return old_logprobs.gather(1, columns) * mask, batch.rollout_logprobs.gather(1, columns) * mask, mask


if __name__ == "__main__":
    main()
