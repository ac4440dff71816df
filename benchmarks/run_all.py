"""Every benchmark, one after the other, each in a process of its own; the table, and benchmarks/results/latest.json.

    python benchmarks/run_all.py [--rounds N] [NAME ...]     NAMEs select from the list below; `make bench` runs all

A benchmark is a script that prints ``RESULT {json}`` last (contract.py). One that fails is a line of the table and stops none of
the others, but the exit status is then 1. Ratios and medians come from within one run each; the load average before and after it is
noted. Named benchmarks replace their own figures in latest.json and leave the others' there.
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
    "lora": [],
    "aligned": [],
    "packing": [],
    "local_engine": ["--sglang-python", SGLANG],
    "weights": [],
    "sglang_client": [],
    "sglang_sync": ["--sglang-python", SGLANG],
    "logprob_memory": [],
    "scaling": [],
    "plan_calibration": [],
    "client_load": [],
}
LIMIT_S = 900.0
# The others take seconds, and need their rounds.
SLOW = ("grpo_step", "lagged", "lora", "aligned", "packing", "local_engine", "sglang_sync")
PEERS = {"trl": "1.16.0", "verl": "0.9.1", "sglang": "0.5.23"}
PACKAGES = ("torch", "megatron-core", "transformers", "aiohttp", "orjson")


def run(name: str, rounds: int | None) -> tuple[dict[str, Figure], str | None]:
    """The figures of one benchmark, and why there are none."""
    command = [sys.executable, str(HERE / f"{name}.py"), *BENCHMARKS[name]]
    if rounds and name in SLOW:
        command += ["--rounds", str(rounds)]
    with subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
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
    parser.add_argument("--rounds", type=int, help="of each slow benchmark, instead of its own number")
    arguments = parser.parse_args()
    names = arguments.names or list(BENCHMARKS)
    into = HERE / "results" / "latest.json"
    before = json.loads(into.read_text()) if arguments.names and into.exists() else {}
    result = before | {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "command": "make bench",
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in PACKAGES} | PEERS,
        "benchmarks": before.get("benchmarks", {}),
        "goals": before.get("goals", {}),
        "figures": before.get("figures", {}),
    }
    print(f"machine: {result['machine']}\n{'':<52} {'ours':>10} {'peer':>10} {'ratio':>8}")
    failures = []
    for name in names:
        load, started = os.getloadavg()[0], time.monotonic()
        found, failure = run(name, arguments.rounds)
        print(f"{name}.py" + (f"  FAILED  {failure}" if failure else ""))
        for title, figure in found.items():
            print(describe(title, figure), flush=True)
            result["figures" if figure["goal"] is None else "goals"][title] = figure
        failures += [name] if failure else []
        result["benchmarks"][name] = {
            "command": " ".join(
                [f"python benchmarks/run_all.py {name}", *(["--rounds", str(arguments.rounds)] if arguments.rounds else [])]
            ),
            "seconds": round(time.monotonic() - started),
            "load_average": [round(load, 2), round(os.getloadavg()[0], 2)],
            "failure": failure,
        }
        into.parent.mkdir(exist_ok=True)
        into.write_text(json.dumps(result, indent=2) + "\n")
    missed = [name for name, figure in result["goals"].items() if not figure["met"]]
    print(f"goals missed: {', '.join(missed) or 'none'}; failures: {', '.join(failures) or 'none'}; written to {into.relative_to(ROOT)}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
