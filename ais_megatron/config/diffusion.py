"""What masked diffusion models can and cannot do."""

from __future__ import annotations

from ais_megatron.config.architecture import Architecture
from ais_megatron.config.settings import ParallelConfig, TrainConfig


def diffusion_problems(arch: Architecture | None, parallel: ParallelConfig, train: TrainConfig) -> list[str]:
    """Settings that make no sense for a masked diffusion model, or that do not work with it."""
    if arch is None or not arch.family.is_diffusion:
        return []
    family, problems = f"model_type={arch.model_type}", []
    if train.packing:
        problems.append(f"train.packing=true: not supported for {family}, whose attention sees both directions; set it to false")
    if parallel.cp > 1:
        problems.append(f"parallel.cp={parallel.cp}: not supported for {family}; set parallel.cp=1, and raise parallel.tp or parallel.pp")
    return problems
