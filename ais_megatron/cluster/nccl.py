"""Makes trainer and SGLang servers agree on the version and the variables of NCCL.

Weights travel in a communicator that has members on both sides. NCCL refuses a communicator with two versions (ncclInvalidUsage,
"Mismatched NCCL version detected"). SGLang 0.5.23 turns two features off in its processes unless the user has set their variables
(`entrypoints/engine.py`, _set_envs_and_config). The trainer then has to do the same.

Only the standard library is imported, because the interpreter of another environment runs this file to describe itself.
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
    """Give this process the servers' NCCL variables, unless `environment` already sets them. Call this before NCCL starts.

    Nothing changes unless weights travel over NCCL. Without NVLS the trainer's own all-reduces do not use NVLink SHARP either.
    """
    if sglang.weights_travel_over_nccl:
        for name, value in server_switches(sglang, environment).items():
            environment.setdefault(name, value)


def server_switches(sglang: SGLangConfig, environment: Mapping[str, str]) -> dict[str, str]:
    """The NCCL variables of a server that a process with `environment` starts on one node, as SGLang 0.5.23 sets them."""
    found = {name: sglang.env.get(name, environment.get(name, "0")) for name in (CUMEM, NVLS)}
    if "--enable-symm-mem" in sglang.extra_args:
        found[CUMEM] = found[NVLS] = "1"
    if "--enable-nccl-nvls" in sglang.extra_args:
        found[NVLS] = "1"
    return found


def installed() -> dict[str, str | None]:
    """The versions of `torch` and `nccl` in this environment, None if missing. If no package names the NCCL version, torch is asked in
    another process."""
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
    """The version of the NCCL library that torch links against. The torch in a container needs no NCCL package."""
    done = subprocess.run([sys.executable, "-P", "-c", ASK_TORCH], capture_output=True, text=True, timeout=120, check=False)
    return done.stdout.strip() or None


if __name__ == "__main__":
    print(json.dumps(installed()))
