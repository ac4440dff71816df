"""How close an aligned forward pass comes to the rollout engine, and how much of what is left is chaos.

    python benchmarks/alignment.py CONFIG [KEY=VALUE ...] [--batches 2] [--moved X] [--json FILE]

The policy stands still. The engine answers prompts in its precision, and trainers with the same weights score the same responses:

    D         k3 estimate of the KL divergence between engine and trainer, in nats per token, ± its standard error over responses
    |d|       mean absolute difference of tokens' log-probabilities
    D moved   D between the trainer and itself, after its embeddings have been multiplied by 1 + x, where x is normal with the standard
              deviation of --moved. Without chaos it is far below D

Trainer and engine differ by a step of the dtype in about every sum that they take in another order.
"""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from contract import machine
from gradient_basis import starting_policy_in
from torch import Tensor

from ais_megatron.batch import Batch
from ais_megatron.collection import collect
from ais_megatron.config import load_config
from ais_megatron.distributed import init_process_group
from ais_megatron.policy.policy import Policy
from ais_megatron.runs.metrics import PhaseTimer
from ais_megatron.session import build_session
from ais_megatron.trainer import begin

PRECISIONS = ("bf16", "fp8_weights_aligned", "fp8_aligned")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--batches", type=int, default=2)
    parser.add_argument("--moved", type=float, help="without it: one step of model.dtype, 1.2e-7 in float32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    fixed = ["parallel.dp=1", "correction=none", "policy.forward_precision=fp8_aligned"]
    config = load_config(arguments.config, [*arguments.overrides, *fixed])
    eps = torch.finfo(torch.bfloat16 if config.model.dtype == "bf16" else torch.float32).eps
    moved = eps if arguments.moved is None else arguments.moved
    init_process_group("cpu")
    session, batches, position = build_session(config), [], 0
    with closing(session.engine):
        begin(session, None)
        for _ in range(arguments.batches):
            collected = collect(session, position, PhaseTimer())
            batches.append(collected.batch)
            position = collected.next_prompt

    cache, responses = "FP8" if config.rollout.kv_cache_is_fp8 else "BF16", sum(len(batch) for batch in batches)
    engine = f"{config.rollout.engine} engine in {config.rollout.quantization}, {cache} KV cache"
    print(f"{arguments.config}: {engine}, {responses} responses; {machine()}\n")
    print(f"{'trainer':<22} {'D':>19}  {'|d|':>9}  {'D moved':>19}")
    figures = {}
    for precision in PRECISIONS:
        # That of the session has the scales of the engine's cache.
        is_own = precision == config.policy.forward_precision
        policy = session.policy if is_own else starting_policy_in(config, precision)
        figures[precision] = figures_of(policy, batches, moved)
        (d, error), size, (d_moved, its_error) = figures[precision].values()
        print(f"{precision:<22} {d:.2e} ± {error:.1e}  {size:.3e}  {d_moved:.2e} ± {its_error:.1e}", flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps({"responses": responses, "moved": moved, "trainers": figures}, indent=1) + "\n")


def figures_of(policy: Policy, batches: list[Batch], moved: float) -> dict[str, Any]:
    scored = [policy.logprobs(batch) for batch in batches]
    embeddings = next(p for name, p in policy.model.named_parameters() if name.endswith("word_embeddings.weight"))
    noise = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(0))
    embeddings.data.mul_(1.0 + moved * noise)
    again = [policy.logprobs(batch) for batch in batches]
    masks = [batch.loss_mask for batch in batches]
    rollouts = [batch.rollout_logprobs for batch in batches]
    sizes = [(ours - theirs)[mask].abs() for ours, theirs, mask in zip(scored, rollouts, masks, strict=True)]
    return {
        "D": divergence(scored, rollouts, masks),
        "|d|": float(torch.cat(sizes).mean()),
        "D moved": divergence(again, scored, masks),
    }


def divergence(ours: list[Tensor], theirs: list[Tensor], masks: list[Tensor]) -> tuple[float, float]:
    """D of samples from `theirs`, and its standard error. Responses are independent, and their tokens are not."""
    sums, counts = [], []
    for x, y, mask in zip(ours, theirs, masks, strict=True):
        ratio = ((x - y) * mask).double()
        sums.append(((torch.expm1(ratio) - ratio) * mask).sum(1))
        counts.append(mask.sum(1))
    total, count = torch.cat(sums), torch.cat(counts)
    mean = total.sum() / count.sum()
    return float(mean), float((total - mean * count).square().sum().sqrt() / count.sum())


if __name__ == "__main__":
    main()
