"""Releases of Megatron-Core and Transformer Engine that GPU nodes have and this environment does not: fetched and unpacked, a few
megabytes. Their Python is all that is wanted, so wheels for another Python version do."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.virtual_cuda.transformer_engine import VERSION as TRANSFORMER_ENGINE

MEGATRON = "0.19.2"
WHEELS = {
    "megatron": [f"megatron-core=={MEGATRON}", "--python-version=3.12", "--platform=manylinux_2_28_x86_64"],
    "transformer_engine": [f"transformer-engine=={TRANSFORMER_ENGINE}"],
}


class NotToBeHad(Exception):
    """Why a package could not be fetched."""


def unpacked(names: tuple[str, ...], folder: Path, fetched: Path) -> Path:
    """`folder` with these packages in it. fetched: a folder for their wheels, which are not fetched twice."""
    for name in names:
        for wheel in wheels(name, fetched / name):
            zipfile.ZipFile(wheel).extractall(folder)
    return folder


def wheels(name: str, folder: Path) -> list[Path]:
    """The wheel of a package, fetched into `folder` unless it lies there."""
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", f"--dest={folder}"]
        done = subprocess.run([*command, *WHEELS[name]], capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            raise NotToBeHad(f"pip cannot fetch {WHEELS[name][0]}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    return list(folder.glob("*.whl"))
