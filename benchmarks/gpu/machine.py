"""What `run.py` finds on a machine and puts there: packed packages, versions, the revision of the sources."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


def packages(folder: Path, target: Path) -> tuple[dict[str, str], list[str]]:
    """The environment of the scripts, with the packed packages installed, and what there is to say about them."""
    wheels = sorted(str(path) for path in folder.glob("*.whl"))
    paths, notes = [str(REPOSITORY)], []
    if wheels:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-index",
            "--no-deps",
            "--no-compile",
        ]
        done = subprocess.run([*command, "--target", str(target), *wheels], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the packages in {folder} cannot be installed with {sys.executable}:\n{done.stderr.strip()}")
        paths.insert(0, str(target))
    else:
        notes.append(f"packed packages: there are none in {folder}; what is installed is used")
    inherited = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths + inherited), "PYTHONUNBUFFERED": "1"}, notes


MACHINE = """
import json, platform, torch
from importlib.metadata import PackageNotFoundError, version
def of(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
names = ("triton", "transformers", "megatron-core", "transformer-engine", "sglang")
print(json.dumps({"python": platform.python_version(), "torch": torch.__version__, "CUDA": torch.version.cuda, "GPU": gpu,
                  **{name: of(name) for name in names}}))
"""


def machine(options: argparse.Namespace, environment: dict[str, str]) -> dict[str, Any]:
    """Versions, GPU, date and revision. Raises RuntimeError where torch or the GPU is missing."""
    done = subprocess.run([sys.executable, "-c", MACHINE], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"torch cannot be used with {sys.executable}:\n{done.stderr.strip()}")
    about = json.loads(done.stdout.splitlines()[-1])
    if options.device == "cuda" and about["GPU"] is None:
        raise RuntimeError("torch sees no CUDA device here; --device cpu --tiny shows whether everything runs")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    date = datetime.now(UTC).isoformat(timespec="seconds")
    sizes = {"device": options.device, "tiny": options.tiny}
    return {**about, "driver": output_of(query), "date": date, "revision": revision(options.packages), **sizes}


def revision(packed: Path) -> str | None:
    """Of git; where the sources came without it, what pack.sh noted."""
    head = output_of(["git", "-C", str(REPOSITORY), "rev-parse", "HEAD"])
    if head is not None:
        return head + (" with changes" if output_of(["git", "-C", str(REPOSITORY), "status", "--porcelain"]) else "")
    noted = packed / "REVISION"
    return f"{noted.read_text().strip()} when it was packed" if noted.is_file() else None


def output_of(command: Sequence[str]) -> str | None:
    """The first line that it prints; None where it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.split("\n")
    return lines[0].strip() or None if done.returncode == 0 else None
