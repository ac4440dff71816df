"""The policy on one GPU: log-probabilities and a training step against transformers, seconds and achieved TFLOP/s.

    python benchmarks/gpu/policy_step.py         [--device cpu --tiny] [--layers 8]

A Qwen3-8B-shaped model cut to `--layers` layers (8: both models, their optimizers and transformers' float32 logits are about 100 GB),
BF16, transformers' random weights, written by it and loaded by the policy. Checked first: log-probabilities, loss and gradient norm of one
SFT step, against transformers on the same batch. Transformers' step is forward, backward and torch's fused AdamW on BF16 weights,
which has no FP32 master copy to update. NOT YET RUN ON A GPU.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from bench import Bench, mib, ms, number, ratio, share
from model import batch_of, make_config, make_policy, save_random_model

from ais_megatron.batch import Batch
from ais_megatron.planning.cost import forward_flops


def main() -> None:
    bench = Bench(__doc__, lambda parser: parser.add_argument("--layers", type=int, default=8))
    with tempfile.TemporaryDirectory() as folder:
        run(bench, Path(folder))


def run(bench: Bench, folder: Path) -> None:
    config = make_config(bench, bench.options.layers)
    peer = save_random_model(config, folder)
    rows, length = (4, 32) if bench.tiny else (4, 2048)
    batch = batch_of(config, rows, length)
    policy = make_policy(config, folder)

    def peer_logprobs(batch: Batch) -> torch.Tensor:
        tokens = batch.tokens.to(bench.device)
        logits = peer(tokens, use_cache=False).logits[:, :-1].float()
        return logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]

    with torch.no_grad():
        expected = peer_logprobs(batch).cpu()
    difference = (policy.logprobs(batch)[:, 1:] - expected).abs()
    detail = f"largest {difference.max():.1e}, mean {difference.mean():.1e}"
    bench.check("log-probabilities against transformers, BF16", bool(difference.mean() < 3e-2), detail)
    loss = -peer_logprobs(batch).mean()
    loss.backward()
    norm = torch.stack([p.grad.float().norm() for p in peer.parameters()]).norm().item()
    measured = policy.sft_step(batch)
    bench.check("loss of an SFT step", abs(measured["loss"] - loss.item()) < 3e-2, f"{measured['loss']:.4f} and {loss.item():.4f}")
    gap = abs(measured["grad_norm"] / norm - 1.0)
    bench.check("gradient norm", gap < 5e-2, f"{measured['grad_norm']:.4f} and {norm:.4f}")

    adam = torch.optim.AdamW(peer.parameters(), lr=1e-6, fused=bench.on_gpu)

    def peer_step() -> None:
        adam.zero_grad(set_to_none=True)
        (-peer_logprobs(batch).mean()).backward()
        adam.step()

    def peer_forward() -> None:
        with torch.no_grad():
            peer_logprobs(batch)

    bench.columns("what", "variant", "time", "ratio to transformers", "TFLOP/s", "of peak", "peak memory")
    forward = forward_flops(config.architecture, rows, length)
    for what, factor, theirs, ours in (
        ("logprobs", 1.0, peer_forward, lambda: policy.logprobs(batch)),
        ("training step", 3.0, peer_step, lambda: policy.sft_step(batch)),
    ):
        base = 0.0
        for name, work in (("transformers", theirs), ("ours", ours)):
            seconds = bench.time(work)
            base, rate = base or seconds, factor * forward / seconds
            bench.row(
                what,
                name,
                ms(seconds),
                ratio(base, seconds),
                number(rate / 1e12, "TFLOP/s", ".1f"),
                share(rate, bench.peak_flops),
                mib(bench.peak_memory(work)),
            )
    bench.finish()


if __name__ == "__main__":
    main()
