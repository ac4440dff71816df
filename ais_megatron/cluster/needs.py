"""Checks whether this machine has what a configuration needs, for `ais-megatron doctor CONFIG`.

The trainer and the servers of a job may run on different nodes and in different environments. Each side can then be checked where
it will run. The trainer's side writes its versions into a folder that both sides can read, and the servers' side compares them.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ais_megatron.cluster import nccl
from ais_megatron.cluster.gpu_checks import gpu_problems
from ais_megatron.cluster.sglang_doctor import PROBE_TIMEOUT_S, Check, check_sglang
from ais_megatron.config import Config
from ais_megatron.config.sglang import SGLangConfig
from ais_megatron.runs.folder import write_json_atomic
from ais_megatron.runs.inputs import input_problems

Part = Literal["all", "trainer", "servers"]


def check_needs(config: Config, part: Part = "all", folder: Path | None = None, local_ranks: int | None = None) -> list[Check]:
    """All checks that are possible before a process is started. A failed check is returned, not raised.

    Args:
        part: the part of the job that will run on this machine.
        folder: a folder that all nodes of the job share. The trainer's side writes HOST.json there, and the servers' side compares
            itself with every such file.
        local_ranks: number of trainer ranks on this node; see `gpu_problems`.
    """
    checks = []
    if part != "servers":
        missing = [Check("files", False, problem) for problem in input_problems(config)]
        checks += missing or [Check("files", True, "all that the configuration names are there")]
        checks += _gpus(config, local_ranks)
    if not config.rollout.engine_traits.has_servers:
        return checks
    sglang = config.rollout.sglang
    if part != "trainer":
        checks += check_sglang(sglang, with_adapters=config.rollout.lora_sync == "adapter")
    return checks + (_nccl(sglang, part, folder) if sglang.weights_travel_over_nccl else [])


def _gpus(config: Config, local_ranks: int | None) -> list[Check]:
    if config.run.backend != "cuda":
        return []
    return [Check("GPUs", False, problem) for problem in gpu_problems(config, local_ranks)] or [
        Check("GPUs", True, "there is one for each rank")
    ]


def _nccl(sglang: SGLangConfig, part: Part, folder: Path | None) -> list[Check]:
    """Whether both sides agree on NCCL, as far as they are known here. `rollout.sglang.python` tells the servers' side."""
    if part == "trainer":
        mine = trainer_facts(sglang, os.environ)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            write_json_atomic(folder / f"{socket.gethostname()}.json", mine)
        return [_trainer_nccl(mine)]
    if part == "all" and sglang.servers:
        mine = trainer_facts(sglang, os.environ)
        note = "the servers run on another machine; run `doctor CONFIG --part servers` there to see their NCCL"
        return [_trainer_nccl(mine), Check("NCCL of the servers", True, note)]
    theirs = _server_facts(sglang, os.environ)
    if part == "all":
        return compare(trainer_facts(sglang, os.environ), theirs, sglang.python)
    if folder is None:
        return [Check("NCCL of the servers", theirs["nccl"] is not None, f"{_described(theirs)}; the trainer's must be the same")]
    files = sorted(folder.glob("*.json"))
    if not files:
        return [
            Check("NCCL", False, f"{folder}: holds nothing to compare with; first run `doctor CONFIG --part trainer` with the same --facts")
        ]
    return [check for file in files for check in compare(json.loads(file.read_text()), theirs, sglang.python, f" ({file.stem})")]


def trainer_facts(sglang: SGLangConfig, environment: Mapping[str, str]) -> dict[str, Any]:
    """Versions of torch and NCCL in this environment, and the NCCL variables that the ranks will have."""
    own = dict(environment)
    nccl.match_sglang_nccl_environment(sglang, own)
    return {**nccl.installed(), "switches": {name: own.get(name, "unset") for name in (nccl.CUMEM, nccl.NVLS)}}


def _server_facts(sglang: SGLangConfig, environment: Mapping[str, str]) -> dict[str, Any]:
    """The same for SGLang's environment, whose interpreter runs nccl.py."""
    facts: dict[str, Any] = {"torch": None, "nccl": None}
    try:
        done = subprocess.run([sglang.python, "-P", nccl.__file__], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
        facts |= json.loads(done.stdout)
    except (OSError, ValueError, subprocess.TimeoutExpired):
        pass  # check_sglang reports an interpreter that cannot be used
    return {**facts, "switches": nccl.server_switches(sglang, environment)}


def compare(trainer: dict[str, Any], servers: dict[str, Any], python: str, where: str = "") -> list[Check]:
    """Compare the versions and the variables of both sides.

    python: interpreter of the servers. where: the trainer's host in brackets, if it is not this one."""
    versions = f"trainer{where} {_described(trainer)}, servers {_described(servers)}"
    same = trainer["nccl"] is not None and trainer["nccl"] == servers["nccl"]
    if not same:
        torch = f"torch=={servers['torch']}" if servers["torch"] else "SGLang's torch"
        versions += (
            ": trainer and servers need the same NCCL version. Install the same torch on both sides. SGLang pins its own, so install "
            f"{torch} in the trainer's environment (`pip install '.[cuda]'` asks for the torch of SGLang 0.5.23). The servers' "
            f"interpreter is {python}"
        )
    different = [name for name, value in servers["switches"].items() if trainer["switches"].get(name) != value]
    switches = ", ".join(f"{name}={value}" for name, value in servers["switches"].items())
    if different:
        switches = "; ".join(
            f"{name} is {trainer['switches'].get(name)} at the trainer, {servers['switches'][name]} here" for name in different
        )
        switches += "; set the same value on both sides (in the job's environment, rollout.sglang.env and rollout.sglang.extra_args)"
    return [Check("NCCL version", same, versions), Check("NCCL switches", not different, switches)]


def _trainer_nccl(facts: dict[str, Any]) -> Check:
    switches = ", ".join(f"{name}={value}" for name, value in facts["switches"].items())
    return Check("NCCL of the trainer", facts["nccl"] is not None, f"{_described(facts)}, {switches}")


def _described(facts: dict[str, Any]) -> str:
    return f"NCCL {facts['nccl'] or '(none)'} (torch {facts['torch'] or 'unknown'})"
