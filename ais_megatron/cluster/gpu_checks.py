"""Finds out why a job with run.backend=cuda would fail on this node, before any of its processes starts.

torch is imported to ask the driver for GPUs. Transformer Engine and Apex are recognised by their files.
"""

from __future__ import annotations

import os
import sys
from importlib import metadata

from ais_megatron.cluster.doctor import lacking_of_transformer_engine
from ais_megatron.config import Config
from ais_megatron.config.policy import BLOCK_SCALING

INSTALL = f"{sys.executable} -m pip install --no-build-isolation '.[cuda]' (Python 3.12; docs/operations.md has the order)"


def gpu_problems(config: Config, local_ranks: int | None = None) -> list[str]:
    """What the trainer needs and this node lacks, each with what to do about it. Empty unless run.backend=cuda. Never raises.

    local_ranks: number of ranks on this node; None: as many as `train` starts by itself.
    """
    if config.run.backend != "cuda":
        return []
    ranks = config.parallel.local_world_size if local_ranks is None else local_ranks
    problems = []
    for check in (lambda: _devices(ranks), lambda: _transformer_engine(config), lambda: _block_scaling(config)):
        try:
            problems += check()
        except Exception as error:  # half-installed packages can raise anything, and the user must know
            problems.append(f"run.backend=cuda: GPUs cannot be checked ({type(error).__name__}: {error}); repair the installation")
    return problems


def _devices(ranks: int) -> list[str]:
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if torch.version.cuda is None:
        return [
            f"run.backend=cuda: torch {torch.__version__} is built without CUDA; install a CUDA build: {INSTALL}, or set run.backend=cpu"
        ]
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return [
            f"run.backend=cuda: CUDA_VISIBLE_DEVICES={visible!r} hides every GPU; unset it or name the GPUs to use (in a Slurm job ask for "
            "GPUs with --gpus-per-node)"
        ]
    if not torch.cuda.is_available():
        return [
            f"run.backend=cuda: torch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable GPU: {_why()}; run `nvidia-smi` to "
            "see whether the node has a GPU, and a driver that is new enough for that CUDA"
        ]
    count = torch.cuda.device_count()
    if count < ranks:
        shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
        return [
            f"run.backend=cuda: {ranks} ranks on this node, but {count} GPUs{shown}; each rank needs one of its own; use more nodes, "
            "make more GPUs visible, or lower parallel.tp, parallel.pp, parallel.cp or parallel.dp"
        ]
    return []


def _why() -> str:
    import torch

    try:
        torch.cuda.init()
    except Exception as error:
        return str(error).splitlines()[0]
    return "the driver reports none"


def _transformer_engine(config: Config) -> list[str]:
    lacking = lacking_of_transformer_engine()
    if lacking is None or config.model.transformer_impl == "local":
        return []
    return [
        f"run.backend=cuda: Transformer Engine cannot be used, because {lacking}; install it: {INSTALL}, or set "
        "model.transformer_impl=local for Megatron's own, slower layers"
    ]


def _block_scaling(config: Config) -> list[str]:
    """What Transformer Engine's blockwise FP8 recipe needs and this node lacks."""
    if config.policy.forward_precision != "fp8_te":
        return []
    import torch

    version, capability, cuda = BLOCK_SCALING
    lacking = []
    if (problem := lacking_of_transformer_engine()) is not None:
        lacking.append(f"Transformer Engine cannot be used, because {problem}")
    elif _numbers(found := metadata.version("transformer-engine")) < _numbers(version):
        lacking.append(f"Transformer Engine is {found}")
    if torch.cuda.is_available():
        found = ".".join(map(str, min(torch.cuda.get_device_capability(gpu) for gpu in range(torch.cuda.device_count()))))
        lacking += [f"a GPU has compute capability {found}"] if _numbers(found) < _numbers(capability) else []
    if torch.version.cuda is not None and _numbers(torch.version.cuda) < _numbers(cuda):
        lacking.append(f"torch is built for CUDA {torch.version.cuda}")
    return [
        f"policy.forward_precision=fp8_te: {reason}; it needs Transformer Engine {version}, compute capability {capability} and CUDA "
        f"{cuda}, or newer ones; otherwise set it to bf16 or fp8_aligned"
        for reason in lacking
    ]


def _numbers(version: str) -> tuple[int, ...]:
    """(2, 20) for 2.20.2."""
    return tuple(int(part) for part in version.split(".")[:2])
