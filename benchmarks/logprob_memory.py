"""Peak memory of log-probabilities and entropy with their backward pass, against a float32 log-softmax; each in a process of its own.

    python benchmarks/logprob_memory.py [--tokens 2048] [--vocab 65536]

The logits are bfloat16 ``[tokens, vocab]``; what is counted is the rise of the process's peak above the logits themselves.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys

import torch
from contract import against_peer, emit

from ais_megatron.policy.logprobs import vocab_parallel_logprobs


def naive(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logp = torch.log_softmax(logits.float(), dim=-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def measure(which: str, tokens: int, vocab: int) -> None:
    torch.manual_seed(0)
    logits = torch.zeros(tokens, vocab, dtype=torch.bfloat16).uniform_(-4, 4).requires_grad_()
    targets = torch.randint(0, vocab, (tokens,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if which == "naive":
        logprobs, entropy = naive(logits, targets)
    else:
        logprobs, entropy, _ = vocab_parallel_logprobs(logits, targets, vocab_size=vocab, chunk_tokens=256)
    (logprobs.sum() + 0.01 * entropy.sum()).backward()
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocab", type=int, default=65536)
    parser.add_argument("--which", choices=("ours", "naive"))
    arguments = parser.parse_args()
    if arguments.which:
        return measure(arguments.which, arguments.tokens, arguments.vocab)
    sizes = [f"--tokens={arguments.tokens}", f"--vocab={arguments.vocab}"]
    ours, theirs = (
        int(subprocess.run([sys.executable, __file__, *sizes, "--which", which], check=True, stdout=subprocess.PIPE).stdout)
        for which in ("ours", "naive")
    )
    note = f"[{arguments.tokens}, {arguments.vocab}] with backward, chunks of 256 tokens; the gradient of the logits is in both"
    emit({"logprob pass, peak memory against float32 softmax": against_peer(ours, theirs, "bytes", note=note)})


if __name__ == "__main__":
    main()
