"""Diagnostics and mixing beside verl 0.9's rollout-correction helper, on the same [512, 4096] tensors, one thread each.

    python benchmarks/diagnostics.py --peer-python PATH

Ours: all figures of `diagnose` (float64) and the factors s = 1 + alpha (wbar - 1) of every token, four rows at a time as
microbatches take them. verl: truncated weights and its metrics (float32). Where the definitions coincide the results must
agree, or nothing is timed. Rounds alternate; medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from pathlib import Path

import torch
from contract import Figure, against_peer, emit, plain, stopwatch
from torch import Tensor

from ais_megatron.algorithm.correction import Correction
from ais_megatron.algorithm.diagnostics import Diagnostics, diagnose
from ais_megatron.algorithm.scaler import LossScaler

BATCH, SEQ, CAP, ROWS = 512, 4096, 2.0, 4
SAME = {  # ours: its name there
    "weight_reliability": "rollout_is_eff_sample_size",
    "divergence_severity": "k3_kl",
    "k1_kl": "kl",
    "ppl_ratio": "ppl_ratio",
    "chi2_token": "chi2_token",
    "fraction_truncated": "rollout_is_ratio_fraction_high",
}


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rollout = -3 * torch.rand(BATCH, SEQ, generator=generator)
    old = (rollout + 0.15 * torch.randn(BATCH, SEQ, generator=generator)).clamp(max=0.0)
    lengths = torch.randint(SEQ // 4, SEQ, (BATCH, 1), generator=generator)
    return {"old": old, "rollout": rollout, "mask": torch.arange(SEQ) < lengths, "advantages": torch.randn(BATCH, generator=generator)}


def ours(data: dict[str, Tensor], alpha: float = 0.5) -> tuple[Diagnostics, Tensor]:
    figures = diagnose(data["old"], data["rollout"], data["advantages"], data["mask"], Correction(weight_cap=CAP))
    scaler, factors = LossScaler(alpha, correction=Correction(weight_cap=CAP)), torch.empty(BATCH, SEQ)
    for i in range(0, BATCH, ROWS):
        rows = slice(i, i + ROWS)
        factors[rows] = scaler.factors(data["old"][rows], data["rollout"][rows], data["mask"][rows]).policy
    return figures, factors


def check_same(data: dict[str, Tensor], metrics: dict[str, float]) -> None:
    figures, factors = ours(data, alpha=1.0)
    pairs = {name: (getattr(figures, name), metrics[f"rollout_corr/{theirs}"]) for name, theirs in SAME.items()}
    pairs["weights"] = (factors.double().sum().item(), metrics["weights_sum"])
    for name, (a, b) in pairs.items():
        assert abs(a - b) <= 1e-3 * abs(b) + 1e-6, f"{name}: ours {a}, verl's {b}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="of an environment with verl 0.9; without it only ours is timed")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = tensors()
    seconds: list[float] = []
    theirs: dict[str, list[float]] = {"int64": [], "float32": []}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(data, Path(folder) / "data.pt")
        ours(data)
        for number in range(arguments.rounds):
            for _ in range(3):
                with stopwatch(seconds):
                    ours(data)
            if arguments.peer_python:
                script = Path(__file__).parent / "peers" / "verl_correction.py"
                output = subprocess.run(
                    [arguments.peer_python, str(script), f"{folder}/data.pt", "3"], check=True, stdout=subprocess.PIPE, text=True
                ).stdout
                answer = json.loads(output.splitlines()[-1])
                if number == 0:
                    check_same(data, answer["metrics"])
                for kind in theirs:
                    theirs[kind].append(answer["seconds"][kind])
    ours_s = statistics.median(seconds)
    name, figures = "diagnostics and mixing, against verl 0.9", dict[str, Figure]()
    if arguments.peer_python:
        peers = {kind: statistics.median(values) for kind, values in theirs.items()}
        figures[name] = against_peer(ours_s, peers["int64"], "s", goal=3.0, note=f"[{BATCH}, {SEQ}], 1 thread; int64 mask, as verl's")
        figures[f"{name} with a float32 mask"] = against_peer(ours_s, peers["float32"], "s", note="the fastest mask for verl")
    else:
        figures[name] = plain(ours_s, "s", "verl is not installed")
    emit(figures)


if __name__ == "__main__":
    main()
