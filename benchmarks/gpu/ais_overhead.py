"""What AIS costs: a GRPO update with correction=ais against none, and its diagnosis alone.

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
    configs = {name: make_config(bench, bench.options.layers, train={"optimizer": {"lr": 1e-12}}) for name in ("none", "ais")}
    configs = {name: config.model_copy(update={"correction": name}) for name, config in configs.items()}
    policy = make_policy(configs["none"], None)
    batch = batch_of(configs["none"], *((4, 32) if bench.tiny else (8, 2048)))
    timer = PhaseTimer(torch.cuda.synchronize if bench.on_gpu else None)

    def step(name: str, rollout_logprobs: torch.Tensor) -> Update:
        policy.config = configs[name]
        return update(policy, replace(batch, rollout_logprobs=rollout_logprobs), AISState(), timer)

    same = policy.logprobs(batch)
    losses = [step(name, same).metrics["loss"] for name in configs]
    bench.check("without mismatch both losses agree", abs(losses[0] - losses[1]) < 1e-5, f"{losses[0]:.2e} and {losses[1]:.2e}")
    off = same + 0.05 * torch.randn(same.shape, generator=torch.Generator().manual_seed(1)) * batch.loss_mask
    alpha, bounds = step("ais", off).alpha, configs["ais"].ais
    bench.check("with mismatch alpha is within its bounds", bounds.alpha_min <= alpha <= bounds.alpha_max, f"{alpha:.3f}")

    def diagnosis() -> None:
        parts = (same, off, batch.advantages, batch.loss_mask, Correction.of(configs["ais"]))
        ais.loss_scaler(diagnose(*parts), configs["ais"], AISState())

    bench.columns("what", "time", "ratio to correction=none", "share of the update")
    base = 0.0
    for name, work in (
        ("update, correction=none", lambda: step("none", off)),
        ("update, correction=ais", lambda: step("ais", off)),
        ("diagnosis and alpha alone", diagnosis),
    ):
        seconds = bench.time(work)
        base = base or seconds
        bench.row(name, ms(seconds), ratio(base, seconds), number(seconds / base, "share", ".2%"))
    bench.finish()


if __name__ == "__main__":
    main()
