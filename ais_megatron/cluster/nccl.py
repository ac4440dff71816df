"""NCCL as trainer and SGLang servers must share it: one version, one set of switches.

Weights travel in a communicator that has ranks of both. NCCL refuses one with two versions (ncclInvalidUsage, "Mismatched NCCL
version detected"). SGLang 0.5.23 turns two features off in its processes where the user has said nothing
(`entrypoints/engine.py`, _set_envs_and_config): the trainer then has to do the same.

Nothing outside the standard library is imported: another environment's interpreter runs this file to describe itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, MutableMapping
from importlib import metadata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ais_megatron.config.sglang import SGLangConfig

CUMEM, NVLS = "NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"
PACKAGES = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
ASK_TORCH = "import torch; print('.'.join(map(str, torch.cuda.nccl.version())))"


def match_sglang_nccl_environment(sglang: SGLangConfig, environment: MutableMapping[str, str] = os.environ) -> None:
    """Give this process the servers' NCCL switches where `environment` says nothing. Call it before NCCL starts in the process.

    Nothing changes unless weights travel over NCCL. Without NVLS the trainer's own all-reduces do not use NVLink SHARP either.
    """
    if sglang.weights_travel_over_nccl:
        for name, value in server_switches(sglang, environment).items():
            environment.setdefault(name, value)


def server_switches(sglang: SGLangConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """The switches of a server that a process with `environment` starts, as SGLang 0.5.23 settles them on one node."""
    found = {name: sglang.env.get(name, environment.get(name, "0")) for name in (CUMEM, NVLS)}
    if "--enable-symm-mem" in sglang.extra_args:
        found[CUMEM] = found[NVLS] = "1"
    if "--enable-nccl-nvls" in sglang.extra_args:
        found[NVLS] = "1"
    return found


def installed() -> dict[str, str | None]:
    """`torch` and `nccl`: versions in this environment, None where absent. torch is imported, elsewhere, only if no package says it."""
    try:
        torch, required = metadata.version("torch"), metadata.requires("torch") or []
    except metadata.PackageNotFoundError:
        return {"torch": None, "nccl": None}
    for package in PACKAGES:
        if any(requirement.startswith(package) for requirement in required):
            try:
                return {"torch": torch, "nccl": metadata.version(package)}
            except metadata.PackageNotFoundError:
                break
    return {"torch": torch, "nccl": None if torch.endswith("+cpu") else _ask_torch()}


def _ask_torch() -> str | None:
    """What the library that torch links against says of itself: a container's torch requires no NCCL package."""
    done = subprocess.run([sys.executable, "-P", "-c", ASK_TORCH], capture_output=True, text=True, timeout=120, check=False)
    return done.stdout.strip() or None


if __name__ == "__main__":
    print(json.dumps(installed()))
