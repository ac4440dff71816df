"""What `ais.lag = 1` saves: trainer seconds per step with this batch's own alpha against the previous batch's.

    python benchmarks/lagged.py [--rounds 2]

The same model and batch as grpo_step.py (256 responses x 48 tokens, 0.9 M parameters, BF16 rollouts), alternating within
one run; the trainer is all between the reward and the sync. The first step of each run is warm-up and left out.
"""

from __future__ import annotations

import argparse
import statistics

from contract import emit, machine, plain
from grpo_step import STEPS, ours

TRAINER = ("logprobs", "diagnose", "train", "calibrate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    rounds = parser.parse_args().rounds
    rows: dict[int, list[dict[str, float]]] = {0: [], 1: []}
    for _ in range(rounds):
        for lag in rows:
            rows[lag] += ours(sections={"ais": {"lag": lag}})
    print(f"machine: {machine()}; {rounds} rounds of {STEPS - 1} steps, medians")
    seconds = {}
    for lag, measured in rows.items():
        phases = {name: statistics.median(row[f"time/{name}"] for row in measured) for name in TRAINER}
        seconds[lag] = statistics.median(sum(row[f"time/{name}"] for name in TRAINER) for row in measured)
        print(f"lag {lag}   trainer {seconds[lag]:.3f} s per step   " + "  ".join(f"{name} {s:.3f}" for name, s in phases.items()))
    note = f"{1 - seconds[1] / seconds[0]:.0%} of trainer time saved with the old-logprob pass"
    emit({"trainer time, ais.lag 1 against 0": plain(seconds[1] / seconds[0], "times", note)})


if __name__ == "__main__":
    main()
