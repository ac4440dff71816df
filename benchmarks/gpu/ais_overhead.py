"""What AIS costs: a GRPO update with correction=ais against none, by the product formula and by the measured coefficient, and the
diagnosis alone.

    python benchmarks/gpu/ais_overhead.py        [--device cpu --tiny] [--layers 8]

The same policy and batch, rollout log-probabilities a little off the policy's. Checked first: rollouts without mismatch leave every
weight at 1, so that both corrections give the same loss; with mismatch alpha lies within its bounds. NOT YET RUN ON A GPU.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from bench import Bench, ms, number, ratio
from model import batch_of, make_config, make_policy

from ais_megatron.algorithm import ais
from ais_megatron.algorithm.ais import AISState
from ais_megatron.algorithm.correction import Correction
from ais_megatron.algorithm.diagnostics import diagnose
from ais_megatron.runs.metrics import PhaseTimer
from ais_megatron.update import Update, update


def main() -> None:
    bench = Bench(__doc__, lambda parser: parser.add_argument("--layers", type=int, default=8))
    uncorrected = make_config(bench, bench.options.layers, train={"optimizer": {"lr": 1e-12}})
    measured = uncorrected.model_copy(update={"correction": "ais"})
    product = measured.model_copy(update={"ais": measured.ais.model_copy(update={"coefficient": "product"})})
    configs = {"none": uncorrected, "product": product, "measured": measured}
    policy = make_policy(measured, None)
    batch = batch_of(measured, *((8, 32) if bench.tiny else (8, 2048)))
    timer = PhaseTimer(torch.cuda.synchronize if bench.on_gpu else None)

    def step(name: str, rollout_logprobs: torch.Tensor) -> Update:
        policy.config = configs[name]
        return update(policy, replace(batch, rollout_logprobs=rollout_logprobs), AISState(), timer)

    same = policy.logprobs(batch)
    losses = [step(name, same).metrics["loss"] for name in configs]
    bench.check("without mismatch all losses agree", max(losses) - min(losses) < 1e-5, ", ".join(f"{loss:.2e}" for loss in losses))
    off = same + 0.05 * torch.randn(same.shape, generator=torch.Generator().manual_seed(1)) * batch.loss_mask
    bounds = measured.ais
    for name in ("product", "measured"):
        alpha = step(name, off).alpha
        bench.check(f"with mismatch alpha is within its bounds ({name})", bounds.alpha_min <= alpha <= bounds.alpha_max, f"{alpha:.3f}")

    def diagnosis() -> None:
        parts = (same, off, batch.advantages, batch.loss_mask, Correction.of(product))
        ais.loss_scaler(diagnose(*parts), product, AISState())

    bench.columns("what", "time", "ratio to correction=none", "share of the update")
    base = 0.0
    for name, work in (
        ("update, correction=none", lambda: step("none", off)),
        ("update, ais.coefficient=product", lambda: step("product", off)),
        ("update, ais.coefficient=measured", lambda: step("measured", off)),
        ("diagnosis and alpha alone", diagnosis),
    ):
        seconds = bench.time(work)
        base = base or seconds
        bench.row(name, ms(seconds), ratio(base, seconds), number(seconds / base, "share", ".2%"))
    bench.finish()


if __name__ == "__main__":
    main()
