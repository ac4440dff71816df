"""Log-probabilities over a vocabulary of 151,936: ours in chunks against log_softmax, time and peak memory.

    python benchmarks/gpu/vocab_logprobs.py      [--device cpu --tiny]

Forward and backward from BF16 logits of one tensor-parallel rank. Checked first: log-probabilities, entropy and gradient against
log_softmax in float32. NOT YET RUN ON A GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from bench import Bench, mib, ms, ratio
from torch import Tensor

from ais_megatron.policy.logprobs import vocab_parallel_logprobs

TEMPERATURE = 1.3

Function = Callable[..., tuple[Tensor, Tensor]]


def naive(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logp = (logits.float() / TEMPERATURE).log_softmax(-1)
    return logp.gather(-1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def main() -> None:
    bench = Bench(__doc__)
    vocabulary, tokens = (1001, 64) if bench.tiny else (151_936, 4096)

    def chunked(logits: Tensor, targets: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
        return vocab_parallel_logprobs(logits, targets, vocab_size=vocabulary, temperature=TEMPERATURE, chunk_tokens=chunk)[:2]

    def both(function: Function, logits: Tensor, targets: Tensor, *arguments: int) -> Tensor:
        logits = logits.detach().requires_grad_()
        logprobs, entropy = function(logits, targets, *arguments)
        (logprobs.sum() - 0.01 * entropy.sum()).backward()
        assert logits.grad is not None
        return logits.grad

    logits = (torch.randn(48, vocabulary) * 3).to(bench.device)
    targets = torch.randint(0, vocabulary, (48,), device=bench.device)
    for name, got, want in zip(("logprobs", "entropy"), chunked(logits, targets, 7), naive(logits, targets), strict=True):
        error = (got - want).abs().max().item()
        bench.check(f"{name}, float32", error < 1e-4, f"largest difference {error:.1e}")
    error = (both(chunked, logits, targets, 7) - both(naive, logits, targets)).abs().max().item()
    bench.check("gradient, float32", error < 1e-5, f"largest difference {error:.1e}")
    difference = (both(chunked, logits.bfloat16(), targets, 7) - both(naive, logits.bfloat16(), targets)).abs().max().item()
    bench.check("gradient, BF16", difference < 1e-2, f"largest difference {difference:.1e}")
    if bench.tiny:
        bench.skip("vocabulary 151,936", "--tiny uses 1,001")

    bench.columns("variant", "forward", "forward + backward", "ratio to naive", "peak memory")
    logits = torch.randn(tokens, vocabulary, dtype=torch.bfloat16, device=bench.device)
    targets = torch.randint(0, vocabulary, (tokens,), device=bench.device)
    base = 0.0
    variants: list[tuple[str, Function, tuple[int, ...]]] = [("naive", naive, ())]
    variants += [(f"chunks of {c}", chunked, (c,)) for c in ((16, 64) if bench.tiny else (512, 2048, 4096))]
    for name, function, arguments in variants:
        with torch.no_grad():
            forward = bench.time(partial(function, logits, targets, *arguments))
        whole = bench.time(partial(both, function, logits, targets, *arguments))
        base = base or whole
        peak = bench.peak_memory(partial(both, function, logits, targets, *arguments))
        bench.row(name, ms(forward), ms(whole), ratio(base, whole), mib(peak))
    bench.finish()


if __name__ == "__main__":
    main()
