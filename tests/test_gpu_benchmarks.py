"""The benchmarks for a GPU run on a CPU at their smallest size: their checks pass, and their tables come out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "benchmarks" / "gpu"
HELPERS = {"bench.py", "model.py"}


def test_every_script_passes_its_checks_on_a_cpu() -> None:
    scripts = sorted(path for path in SCRIPTS.glob("*.py") if path.name not in HELPERS)
    assert len(scripts) == 6
    command = [sys.executable, "{}", "--device", "cpu", "--tiny"]
    for start in range(0, len(scripts), 2):  # two at a time: most of each is importing torch and Megatron
        running = {
            path.name: subprocess.Popen(
                [part.format(path) for part in command] + (["--sglang-python", sys.executable] if path.name == "serving.py" else []),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for path in scripts[start : start + 2]
        }
        for name, process in running.items():
            output, _ = process.communicate(timeout=240)
            assert process.returncode == 0, f"{name}:\n{output}"
            assert "times mean nothing" in output and "skipped: " in output, output
            assert name == "serving.py" or ("check: " in output and "FAILED" not in output), output
