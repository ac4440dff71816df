"""`ais-megatron doctor`: which parts are installed on this machine, and what each missing part switches off.

Packages are recognised by their metadata and files. Only torch is imported, because it alone can ask the driver for GPUs. If a
probe fails, the failure is reported as a finding, so a broken package does not hide the other findings.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from ais_megatron.cluster import nccl
from ais_megatron.cluster.cuda_environment import ALLOCATOR_VARIABLES, MAX_CONNECTIONS
from ais_megatron.cluster.sglang_doctor import Check

FP8_CAPABILITY = (8, 9)  # the first CUDA compute capability with FP8 tensor cores (Ada; Hopper is 9.0)


@dataclass(frozen=True)
class Finding:
    """One part of the environment."""

    name: str
    present: bool
    version: str | None
    """None if absent or unknown."""
    note: str
    """What the part provides, or what its absence switches off."""


def inspect_environment() -> list[Finding]:
    """All findings, in a fixed order. Never raises. A part whose probe fails is reported as absent, with the error as its note."""
    return [_safely(name, probe) for name, probe in _PROBES]


def _safely(name: str, probe: Callable[[], Finding]) -> Finding:
    try:
        return probe()
    except Exception as error:  # half-installed packages can raise anything, and each error is worth reporting
        return Finding(name, False, None, f"cannot be inspected: {type(error).__name__}: {error}")


def print_doctor() -> None:
    """Print `inspect_environment` to stdout as a table."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Environment", title_justify="left")
    for column in ("part", "there", "version", "what it means here"):
        table.add_column(column, overflow="fold")
    for finding in inspect_environment():
        mark = Text("yes", style="green") if finding.present else Text("no", style="yellow")
        table.add_row(Text(finding.name), mark, Text(finding.version or "-"), Text(finding.note))
    Console(force_terminal=sys.stdout.isatty()).print(table)


def print_checks(checks: list[Check], where: str = "") -> bool:
    """Print one line for each thing that a run needs. Returns whether all of them are there.

    where: text in front of each line, for several nodes."""
    for check in checks:
        print(f"{where}{'ok     ' if check.ok else 'PROBLEM'}  {check.name}: {check.note}", flush=True)
    return all(check.ok for check in checks)


def _python() -> Finding:
    note = "" if sys.version_info >= (3, 11) else "too old: ais_megatron needs Python 3.11 or newer"
    return Finding("Python", True, platform.python_version(), note)


def _cuda() -> Finding:
    if find_spec("torch") is None:
        return Finding("CUDA", False, None, "torch is missing, so there is no way to ask for GPUs")
    import torch

    if not torch.cuda.is_available():
        build = "this torch is built without CUDA" if torch.version.cuda is None else "torch sees no usable device or driver"
        return Finding("CUDA", False, torch.version.cuda, f"off: run.backend=cuda ({build}); run.backend=cpu works")
    devices: dict[str, int] = {}
    for index in range(torch.cuda.device_count()):
        major, minor = capability = torch.cuda.get_device_capability(index)
        fp8 = "FP8" if capability >= FP8_CAPABILITY else "no FP8 tensor cores"
        key = f"{torch.cuda.get_device_name(index)} (capability {major}.{minor}, {fp8})"
        devices[key] = devices.get(key, 0) + 1
    return Finding("CUDA", True, torch.version.cuda, "; ".join(f"{count} x {key}" for key, count in devices.items()))


def lacking_of_transformer_engine() -> str | None:
    """Why Transformer Engine cannot be used, or None if it can."""
    folders = _folders("transformer_engine")
    if not folders:
        return "it is not installed"
    # The package needs a compiled extension, whose place differs between releases.
    places = [place for folder in folders for place in (folder, folder.parent, folder / "wheel_lib")]
    if find_spec("transformer_engine_torch") is None and not any(any(place.glob("transformer_engine_torch*.so")) for place in places):
        return "its torch extension is missing (install transformer-engine[pytorch])"
    return None


def _transformer_engine() -> Finding:
    lacking, version = lacking_of_transformer_engine(), _version("transformer-engine")
    if lacking is None:
        return Finding("Transformer Engine", True, version, "fused CUDA layers")
    off = f"off: fused CUDA layers and FP8 training ({lacking}); Megatron's plain layers are used"
    return Finding("Transformer Engine", False, version, off)


def _apex() -> Finding:
    name, off = "NVIDIA Apex", "off: Apex's fused Adam and norms; torch's own are used"
    # On PyPI the name apex belongs to an unrelated web toolkit. NVIDIA's has apex/optimizers, and `amp_C` if built with --cuda_ext.
    folders = _folders("apex")
    if any((folder / "optimizers").is_dir() for folder in folders):
        extension = find_spec("amp_C") is not None
        note = "fused Adam and norms" if extension else "built without its CUDA extension (amp_C); " + off
        return Finding(name, extension, _version("apex"), note)
    if folders or find_spec("apex") is not None or _version("apex") is not None:
        return Finding(
            name,
            False,
            _version("apex"),
            "the installed apex is an unrelated package from PyPI; pip uninstall apex, then build NVIDIA/apex from source; " + off,
        )
    return Finding(name, False, None, off + " (do not `pip install apex`: on PyPI that is another project)")


def _gradient_accumulation_fusion() -> Finding:
    name = "gradient accumulation fusion"
    if find_spec("fused_weight_gradient_mlp_cuda") is not None:
        return Finding(name, True, None, "from NVIDIA Apex, for all of Megatron's linear layers")
    if lacking_of_transformer_engine() is None:
        return Finding(name, True, None, "from Transformer Engine, for its own linear layers")
    return Finding(name, False, None, "off: adding up weight gradients inside the matrix product; needs Transformer Engine or NVIDIA Apex")


def _fused_adam() -> Finding:
    for finding in (_transformer_engine(), _apex()):
        if finding.present:
            return Finding("fused Adam", True, None, f"from {finding.name}")
    return Finding("fused Adam", False, None, "off: the optimizer step in one kernel; torch's own AdamW is used")


def _nccl() -> Finding:
    found = nccl.installed()["nccl"]
    switches = ", ".join(f"{name}={os.environ.get(name, 'unset')}" for name in (nccl.CUMEM, nccl.NVLS))
    note = f"{switches}; servers need the same version" if found else "off: run.backend=cuda (this torch has no NCCL)"
    return Finding("NCCL", found is not None, found, note)


def _max_connections() -> Finding:
    value = os.environ.get(MAX_CONNECTIONS)
    if value in (None, "1"):
        return Finding(MAX_CONNECTIONS, True, value, "trainers with parallel.tp > 1 set it to 1, unless it is already set")
    off = "off: overlap of communication and compute under TP and SP on Hopper and older GPUs, which needs 1; unset it for the trainer"
    return Finding(MAX_CONNECTIONS, False, value, off)


def _expandable_segments() -> Finding:
    name, value = "expandable segments", next((os.environ[v] for v in ALLOCATOR_VARIABLES if v in os.environ), None)
    if value is None or "expandable_segments:true" in value.lower().replace(" ", ""):
        return Finding(name, True, None, "of the CUDA allocator, for less fragmentation; trainers on GPUs turn them on")
    off = f"off: GPU memory fragments more; add expandable_segments:True to {ALLOCATOR_VARIABLES[0]}, or unset it (now: {value})"
    return Finding(name, False, None, off)


def _slurm() -> Finding:
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        return Finding("Slurm", False, None, "off: submitting slurm/*.sbatch from this machine (no sbatch on PATH)")
    done = subprocess.run([sbatch, "--version"], capture_output=True, text=True, timeout=10, check=False)
    words = done.stdout.split()
    if done.returncode or not words:
        return Finding(
            "Slurm",
            False,
            None,
            f"off: submitting; sbatch --version failed with code {done.returncode}: {done.stderr.strip() or 'no output'}",
        )
    return Finding("Slurm", True, words[-1], "sbatch is on PATH")  # it prints `slurm 23.11.4`


def _package(name: str, distribution: str, module: str, gives: str, off: str) -> Callable[[], Finding]:
    """A probe for `module` (dots allowed), which belongs to `distribution`."""

    def probe() -> Finding:
        top, _, inner = module.partition(".")
        if inner:
            present = any((folder / inner).is_dir() for folder in _folders(top))
        else:
            present = find_spec(top) is not None
        return Finding(name, present, _version(distribution) if present else None, gives if present else f"off: {off}")

    return probe


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _folders(package: str) -> list[Path]:
    """Folders of a top-level package, found without importing it; empty if it is not installed."""
    spec = find_spec(package)
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec is not None else []


_PROBES: tuple[tuple[str, Callable[[], Finding]], ...] = (
    ("Python", _python),
    ("torch", _package("torch", "torch", "torch", "tensors, autograd, collectives", "everything but `doctor` and reading configs")),
    ("CUDA", _cuda),
    ("megatron-core", _package("megatron-core", "megatron-core", "megatron.core", "the policy", "`train`, `sft` and `export`")),
    ("Transformer Engine", _transformer_engine),
    ("NVIDIA Apex", _apex),
    (
        "FLA",
        _package(
            "FLA",
            "flash-linear-attention",
            "fla.ops",
            "kernels of the gated delta rule on GPUs (model_type=qwen3_5)",
            "kernels of the gated delta rule (model_type=qwen3_5; pip install flash-linear-attention); torch computes it, in chunks",
        ),
    ),
    ("gradient accumulation fusion", _gradient_accumulation_fusion),
    ("fused Adam", _fused_adam),
    ("NCCL", _nccl),
    ("CUDA_DEVICE_MAX_CONNECTIONS", _max_connections),
    ("expandable segments", _expandable_segments),
    (
        "SGLang",
        _package(
            "SGLang",
            "sglang",
            "sglang",
            "the SGLang rollout engine",
            "SGLang in this environment; servers have their own environment, which `doctor CONFIG` checks",
        ),
    ),
    ("Slurm", _slurm),
    (
        "nemo-run",
        _package("nemo-run", "nemo-run", "nemo_run", "the recipes in launch/", "the recipes in launch/; torchrun and sbatch work"),
    ),
    (
        "sentencepiece",
        _package("sentencepiece", "sentencepiece", "sentencepiece", "tokenizer.kind=sentencepiece", "tokenizer.kind=sentencepiece"),
    ),
    (
        "transformers",
        _package(
            "transformers",
            "transformers",
            "transformers",
            "rollout.engine=local, tokenizer.kind=hf",
            "rollout.engine=local and tokenizer.kind=hf",
        ),
    ),
    ("wandb", _package("wandb", "wandb", "wandb", "metrics.wandb=offline or online", "metrics.wandb; metrics.jsonl is always written")),
    (
        "tensorboard",
        _package(
            "tensorboard", "tensorboard", "tensorboard", "metrics.tensorboard=true", "metrics.tensorboard; metrics.jsonl is always written"
        ),
    ),
    ("lm_eval", _package("lm_eval", "lm_eval", "lm_eval", "ais-megatron eval --lm-eval", "ais-megatron eval --lm-eval")),
)
