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
from pathlib import Path

import torch
from contract import machine
from torch import Tensor

from ais_megatron.algorithm.ais import product_coefficient
from ais_megatron.algorithm.correction import Correction, log_importance_ratio
from ais_megatron.algorithm.diagnostics import diagnose
from ais_megatron.batch import Batch
from ais_megatron.collection import collect
from ais_megatron.config import load_config
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
    checkpoint = newest_on_all_ranks(target / "checkpoints") if target.is_dir() else None
    session = build_session(config, from_checkpoint=checkpoint is not None)
    begin(session, checkpoint, with_optimizer=False)
    batches, position = [], 0
    for number in range(arguments.batches):
        collected = collect(session, position, PhaseTimer())
        position = collected.next_prompt
        batches.append((collected.batch, session.policy.logprobs(collected.batch)))
        print(f"batch {number + 1}/{arguments.batches}", flush=True)
    old, rollout, mask = (torch.cat(parts) for parts in zip(*(_responses(*batch, lengths[-1]) for batch in batches), strict=True))
    tau = 5e-4 if config.ais.tau == "auto" else config.ais.tau
    ais = config.ais.model_copy(update={"tau": tau})

    longest = mask.sum(1)
    cache = "FP8" if config.rollout.kv_cache_is_fp8 else "BF16"
    print(f"{target}: rollouts in {config.rollout.quantization}, {cache} KV cache, {len(mask)} responses; {machine()}")
    print(f"{int(longest.sum())} tokens; a response has {longest.float().mean():.0f} on average\n")
    print(f"{'tokens':>6} {'reach it':>9} {'D':>10} {'D here':>10} {'ESS, tokens':>12} {'ESS, resp.':>11} {'in band':>8} {'alpha':>7}")
    rows, before = [], 0
    for length in lengths:
        up_to = mask & (torch.arange(mask.shape[1]) < length)
        here = up_to & (torch.arange(mask.shape[1]) >= before)
        log_ratio = log_importance_ratio(old, rollout)
        diagnostics = diagnose(old, rollout, torch.ones(len(mask)), up_to, Correction("tis"))
        weights = (log_ratio * up_to).sum(1).double().exp()
        row = {
            "tokens": length,
            "reached": float((longest >= length).float().mean()),
            "D": diagnostics.divergence_severity,
            "D_here": float(_k3(log_ratio)[here].mean()) if here.any() else float("nan"),
            "ess_tokens": diagnostics.weight_reliability_raw,
            "ess_responses": float(weights.sum() ** 2 / weights.square().sum() / len(weights)),
            "in_band": float(((weights >= BAND[0]) & (weights <= BAND[1])).float().mean()),
            "alpha": product_coefficient(diagnostics, ais),
        }
        print(
            f"{length:>6} {row['reached']:>9.1%} {row['D']:>10.2e} {row['D_here']:>10.2e} {row['ess_tokens']:>12.4f} "
            f"{row['ess_responses']:>11.4f} {row['in_band']:>8.1%} {row['alpha']:>7.3f}"
        )
        rows.append(row)
        before = length
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


def _k3(log_ratio: Tensor) -> Tensor:
    """exp(r) - 1 - r: an estimate of KL(mu || pi) for tokens from mu, with r = log pi - log mu."""
    return torch.expm1(log_ratio) - log_ratio


def _responses(batch: Batch, old_logprobs: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The trainer's and the engine's log-probabilities and their mask, ``[batch, length]``. Every response begins at column 0."""
    start = batch.loss_mask.int().argmax(1)
    columns = (start[:, None] + torch.arange(length)).clamp(max=batch.loss_mask.shape[1] - 1)
    inside = start[:, None] + torch.arange(length) < batch.loss_mask.shape[1]
    mask = batch.loss_mask.gather(1, columns) & inside
    return old_logprobs.gather(1, columns) * mask, batch.rollout_logprobs.gather(1, columns) * mask, mask


if __name__ == "__main__":
    main()
