"""Runs every GPU benchmark on a bare machine: correctness first, then speed; one table, one JSON file, and an end in time.

    benchmarks/gpu/run.sh                        on the card: 8 minutes at most, benchmarks/results/gpu.json
    benchmarks/gpu/run.sh --device cpu --tiny    anywhere: whether it runs; nothing is written without --out

Packages that the machine lacks come from the folder that pack.sh filled. Each script is a process of its own: one that fails or hangs is
recorded, and the others go on. Status: 0 all well, 1 a check failed or a script broke, 2 nothing could be started.

The time is shared by the weights below, seconds that we expect on one H200 (NOT YET RUN ON A GPU: reckoned from FLOPs, bytes and launches).
What a script does not use goes to those after it. Three at a time the checks should take about 80 s, mostly imports and compilation; one
after the other the timed runs then take about 300 s. serving.py comes last: with SGLang there it wants more than is left.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from driver import Driver, Result, Script, has_failed
from machine import REPOSITORY, machine, packages

FOLDER = Path(__file__).resolve().parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "gpu.json"
ENDING = 8.0  # seconds kept for ending the last script and for the table

SCRIPTS = (
    Script("quantize", 30),
    Script("vocab_logprobs", 30),
    Script("fp8_matmul", 40),
    Script("policy_step", 100, checks=("--layers", "2"), times=("--rounds", "10")),
    Script("ais_overhead", 80, checks=("--layers", "2"), times=("--rounds", "10")),
    Script("end_to_end", 110, checks=("--steps", "2")),
    Script("serving", 60, times=("--layers", "12", "--rounds", "2")),
)


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER, scripts: Sequence[Script] = SCRIPTS) -> int:
    options = parse(arguments, scripts)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-benchmarks-") as temporary:
        try:
            environment, notes = packages(options.packages, Path(temporary) / "site")
            about = machine(options, environment)
        except RuntimeError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        chosen = [script for script in scripts if not options.only or script.name in options.only]
        driver = Driver(options, folder, Path(temporary), environment, began + 60 * options.minutes - ENDING)
        results = driver.run(chosen)
    report = {**about, "command": sys.argv[1:], "seconds": round(time.monotonic() - began, 1)}
    report |= {"notes": notes, "scripts": results}
    print("\n" + "\n".join(f"{key}: {value}" for key, value in {**about, "seconds": report["seconds"]}.items()))
    print_table(notes, results)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written: {options.out}")
    return int(any(has_failed(result) for result in results))


def parse(arguments: Sequence[str] | None, scripts: Sequence[Script]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: whether it runs, not how fast")
    parser.add_argument("--minutes", type=float, default=8.0, help="the whole run ends within them (8)")
    parser.add_argument("--packages", type=Path, default=FOLDER / "packages", metavar="DIR", help="what pack.sh filled")
    parser.add_argument("--out", type=Path, metavar="FILE", help="benchmarks/results/gpu.json; with --device cpu or --tiny: none")
    parser.add_argument("--only", action="append", choices=[script.name for script in scripts], help="this script; may be repeated")
    parser.add_argument("--sglang-python", default=sys.executable, help="interpreter of the environment that holds SGLang, for serving.py")
    options = parser.parse_args(arguments)
    if options.out is None and options.device == "cuda" and not options.tiny:
        options.out = RESULTS
    return options


def print_table(notes: Sequence[str], results: Sequence[Result]) -> None:
    """Every check, row and gap as one table: the script, what it was about, what came of it."""
    rows = [("script", "what", "result")]
    for result in results:
        rows += [(result["name"], what, came) for what, came in lines_of(result)]
    for note in notes:
        what, _, came = note.partition(": ")
        rows.append(("run.py", what, came))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    print()
    for row in rows:
        print(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}")


def lines_of(result: Result) -> list[tuple[str, str]]:
    checks = result["checks"]
    lines = [("checks", f"{sum(check['passed'] for check in checks)} of {len(checks)} passed")] if checks else []
    lines += [(f"check: {check['what']}", f"FAILED {check['detail']}".strip()) for check in checks if not check["passed"]]
    lines += [(f"run of the {run['run']}", run["status"]) for run in result["runs"] if run["status"].startswith("broke")]
    for row in result["rows"]:
        labels = [cell for cell in row.values() if isinstance(cell, str)]
        figures = [f"{name} {cell['text']}" for name, cell in row.items() if not isinstance(cell, str) and cell["value"] is not None]
        lines.append((", ".join(labels), ", ".join(figures)))
    return lines + [(f"skipped: {entry['what']}", entry["why"]) for entry in result["skipped"]]


if __name__ == "__main__":
    sys.exit(main())
