"""Every benchmark, one after the other, each in a process of its own; the table, and benchmarks/results/latest.json.

    python benchmarks/run_all.py [--rounds N] [NAME ...]     NAMEs select from the list below; `make bench` runs all

A benchmark is a script that prints ``RESULT {json}`` last (contract.py). One that fails is a line of the table and stops none of
the others, but the exit status is then 1. Ratios and medians come from within one run each, so that a busy machine, whose load
average is noted, disturbs both sides alike.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from contract import MARK, Figure, describe, machine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TRL, VERL, SGLANG = (str(ROOT / f".venv-{name}" / "bin" / "python") for name in ("trl", "verl", "sglang"))
BENCHMARKS = {
    "grpo_step": ["--peer-python", TRL],
    "diagnostics": ["--peer-python", VERL],
    "overhead": [],
    "lagged": [],
    "local_engine": ["--sglang-python", SGLANG],
    "weights": [],
    "sglang_client": [],
    "sglang_sync": ["--sglang-python", SGLANG],
    "logprob_memory": [],
    "scaling": [],
}
LIMIT_S = 900.0
PACKAGES = ("torch", "megatron-core", "transformers", "aiohttp", "orjson")


def run(name: str, rounds: int | None) -> tuple[dict[str, Figure], str | None]:
    """The figures of one benchmark, and why there are none."""
    command = [sys.executable, str(HERE / f"{name}.py"), *BENCHMARKS[name]]
    if rounds and name != "logprob_memory":  # (which is no matter of time)
        command += ["--rounds", str(rounds)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes) as process:
        try:
            output, _ = process.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)  # peers and servers are processes of its own
            return {}, f"not finished after {LIMIT_S:g} s"
    lines = [line for line in output.splitlines() if line.strip()]
    results = [line for line in lines if line.startswith(MARK)]
    if process.returncode or not results:
        return {}, f"exit status {process.returncode}: {' | '.join(lines[-3:])}"
    return json.loads(results[-1].removeprefix(MARK)), None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHMARKS], metavar="NAME")
    parser.add_argument("--rounds", type=int, help="of each benchmark, instead of its own number")
    arguments = parser.parse_args()
    names = arguments.names or list(BENCHMARKS)
    figures: dict[str, Figure] = {}
    failures: dict[str, str] = {}
    load, started = [os.getloadavg()[0]], time.monotonic()
    print(f"machine: {machine()}\n{'':<52} {'ours':>10} {'peer':>10} {'ratio':>8}")
    for name in names:
        found, failure = run(name, arguments.rounds)
        load.append(os.getloadavg()[0])
        print(f"{name}.py" + (f"  FAILED  {failure}" if failure else ""))
        for title, figure in found.items():
            print(describe(title, figure), flush=True)
        figures |= found
        if failure:
            failures[name] = failure
    keys = ("ours", "peer", "ratio", "goal", "met", "unit", "note")
    result = {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python benchmarks/run_all.py", *sys.argv[1:]]),
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES},
        "load_average": {"start": load[0], "after each": load[1:]},
        "minutes": (time.monotonic() - started) / 60,
        "goals": {name: {key: f[key] for key in keys} for name, f in figures.items() if f["goal"] is not None},
        "figures": {name: f for name, f in figures.items() if f["goal"] is None},
        "failures": failures,
    }
    into = HERE / "results" / ("latest.json" if names == list(BENCHMARKS) else "partial.json")
    into.parent.mkdir(exist_ok=True)
    into.write_text(json.dumps(result, indent=2) + "\n")
    missed = [name for name, figure in result["goals"].items() if not figure["met"]]
    print(f"goals missed: {', '.join(missed) or 'none'}; failures: {', '.join(failures) or 'none'}; written to {into.relative_to(ROOT)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
