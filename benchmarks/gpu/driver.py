"""Runs scripts as processes within the time there is: correctness first, three at a time, then speed, one at a time.

A script gets a share of what is left: its expected seconds over those of all that still wait. It is told to time nothing new when 80 % of
that is over, and is killed at the end. Its data (`Bench` with --json) is read from a file, also of one that was killed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKS_AT_ONCE = 3  # on one GPU: with two layers each they fit its memory side by side
CHECKS_SHARE = 0.45  # of the whole time, at most
FINISHING = 0.2  # of a script's time, for what it does after its last timing began
LEAST_SECONDS = 5.0  # less is not worth a start
LAST_LINES = 20  # kept of a script that failed
GRACE_SECONDS = 10.0  # for a script to end after its table is finished: libraries now and then hang as they are unloaded
NO_TIME = "no time left"
Result = dict[str, Any]


@dataclass(frozen=True)
class Script:
    """One benchmark.

    seconds: expected of its timed run on one H200. checks, times: options of the run that only checks, and of the one that is timed.
    """

    name: str
    seconds: float
    checks: tuple[str, ...] = ()
    times: tuple[str, ...] = ()


class Driver:
    """Runs scripts of `folder` until `deadline` (of time.monotonic). options: those of run.py."""

    def __init__(self, options: argparse.Namespace, folder: Path, temporary: Path, environment: dict[str, str], deadline: float) -> None:
        self._options, self._folder, self._temporary, self._environment = options, folder, temporary, environment
        self._deadline, self._began = deadline, time.monotonic()

    @property
    def _left(self) -> float:
        return self._deadline - time.monotonic()

    def run(self, scripts: Sequence[Script]) -> list[Result]:
        """One result for each script, in their order: its runs, checks, rows, and what was skipped and why."""
        order = sorted(scripts, key=lambda script: -script.seconds)  # side by side: the whole ends soonest if the longest begin
        if self._options.device == "cpu":  # where times mean nothing, one run has them and the checks; two at a time, one a core
            with ThreadPoolExecutor(2) as pool:
                runs = dict(zip(order, pool.map(lambda script: [self._run(script, self._left)], order), strict=True))
            return [merged(script.name, runs[script]) for script in scripts]
        checks_end = time.monotonic() + CHECKS_SHARE * self._left

        def check(script: Script) -> list[Result]:
            return [self._run(script, checks_end - time.monotonic(), "--only-checks", *script.checks)]

        with ThreadPoolExecutor(CHECKS_AT_ONCE) as pool:
            runs = dict(zip(order, pool.map(check, order), strict=True))
        waiting = [script for script in scripts if is_worth_timing(runs[script][0])]
        while waiting:
            share = waiting[0].seconds / sum(script.seconds for script in waiting)
            script = waiting.pop(0)
            runs[script].append(self._run(script, share * self._left, *script.times))
        return [merged(script.name, runs[script]) for script in scripts]

    def _run(self, script: Script, seconds: float, *arguments: str) -> Result:
        """One process, of at most so many seconds: its data and how it ended."""
        kind = "checks" if "--only-checks" in arguments else "times"
        result: Result = {"run": kind, "status": NO_TIME, "seconds": 0.0, "checks": [], "rows": [], "skipped": []}
        seconds = min(seconds, self._left)
        if seconds < LEAST_SECONDS:
            return result
        data, log = (self._temporary / f"{script.name}-{kind}.{suffix}" for suffix in ("json", "log"))
        command = [sys.executable, "-W", "ignore", str(self._folder / f"{script.name}.py"), "--device", self._options.device]
        command += ["--tiny"] if self._options.tiny else []
        command += ["--sglang-python", self._options.sglang_python] if script.name == "serving" else []
        command += ["--seconds", f"{(1 - FINISHING) * seconds:.1f}", "--json", str(data), *arguments]
        began = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(command, env=self._environment, stdout=output, stderr=output, start_new_session=True)
            code = wait(process, data, began + seconds)
        result |= read(data)
        result |= {"status": status_of(code, result), "seconds": round(time.monotonic() - began, 1)}
        if result["status"] != "ok":
            result["last_lines"] = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        self._say(script, result)
        return result

    def _say(self, script: Script, result: Result) -> None:
        passed = sum(check["passed"] for check in result["checks"])
        found = f"{passed} of {len(result['checks'])} checks, {len(result['rows'])} rows, {result['seconds']} s"
        lines = [f"{time.monotonic() - self._began:6.1f} s  {script.name} ({result['run']}): {result['status']}; {found}"]
        print("\n        | ".join(lines + result.get("last_lines", [])), flush=True)


def read(data: Path) -> Result:
    """What a script has written so far (`Bench` replaces the file as a whole)."""
    return json.loads(data.read_text()) if data.is_file() else {}


def wait(process: subprocess.Popen[bytes], data: Path, deadline: float) -> int | None:
    """Its exit status; None if it took too long, or did not end after all was written. It is then ended with all it had started."""
    finished = False
    try:
        while (left := deadline - time.monotonic()) > 0:
            try:
                return process.wait(min(left, 0.25))
            except subprocess.TimeoutExpired:
                if not finished and read(data).get("finished"):
                    finished, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
        return None
    finally:  # (also where this process is interrupted itself)
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break
            try:
                process.wait(3)
            except subprocess.TimeoutExpired:
                continue


def status_of(code: int | None, found: Result) -> str:
    if not all(check["passed"] for check in found["checks"]):
        return "a check failed"
    if code is None:
        return "ok" if found.get("finished") else NO_TIME
    return "ok" if code == 0 else f"broke with status {code}"


def is_worth_timing(checked: Result) -> bool:
    return checked["status"] == "ok" and not any(entry["what"] == "everything" for entry in checked["skipped"])


def merged(name: str, runs: Sequence[Result]) -> Result:
    """What the runs of one script found, together."""
    entries = [
        entry for run in runs for entry in run["skipped"] if not (run["run"] == "checks" and entry["what"] == "the rest of the times")
    ]
    skipped = [entry for number, entry in enumerate(entries) if entry not in entries[:number]]
    skipped += [{"what": f"the rest of the {run['run']}", "why": NO_TIME} for run in runs if run["status"] == NO_TIME]
    if runs[-1]["run"] == "checks" and runs[-1]["status"] != "ok":
        skipped.append({"what": "the times", "why": f"the checks ended with: {runs[-1]['status']}"})
    return {
        "name": name,
        "runs": [{key: run[key] for key in ("run", "status", "seconds", "last_lines") if key in run} for run in runs],
        "checks": [{"run": run["run"], **check} for run in runs for check in run["checks"]],
        "rows": [row for run in runs if run["run"] == "times" for row in run["rows"]],
        "skipped": skipped,
    }


def has_failed(result: Result) -> bool:
    """Whether a check failed or a run broke; what there was no time for has not failed."""
    return any(run["status"] not in ("ok", NO_TIME) for run in result["runs"])
