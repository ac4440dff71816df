"""Scenarios on virtual GPUs and on CPU ranks, and what must be equal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.ranks import RankPool
from tests.virtual_cuda import scenarios
from tests.virtual_cuda.scenarios import TRAINED_LAYOUTS

_OF_CPUS: dict[tuple[str, ...], list[Any]] = {}  # what CPU ranks gave; every kind of virtual machine is compared with the same


def assert_equal(ours: Any, theirs: Any, where: str) -> None:
    """Numbers within rounding: kernels and the order of sums differ."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for name in theirs:
            assert_equal(ours[name], theirs[name], f"{where}: {name}")
    elif isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5, msg=lambda text: f"{where}: {text}")
    else:
        assert ours == pytest.approx(theirs, rel=1e-4, abs=2e-5), where


def on_both(
    gpus: RankPool, cpus: RankPool, layout: str, scenario: Callable[..., Any], weights: dict[str, Path], **arguments: Any
) -> list[Any]:
    """What each rank of the virtual GPUs returns, found equal to what the CPU ranks do."""
    arguments |= {"layout": layout, "weights": weights[layout.split(",")[0]]}
    ours = gpus.run(TRAINED_LAYOUTS[layout][0], scenario, **arguments)
    key = (scenario.__name__, *(str(value) for name, value in arguments.items() if name != "folder"))
    if key not in _OF_CPUS:
        _OF_CPUS[key] = cpus.run(TRAINED_LAYOUTS[layout][0], scenario, **arguments)
    theirs = _OF_CPUS[key]
    for rank, (mine, reference) in enumerate(zip(ours, theirs, strict=True)):
        assert_equal(mine, reference, f"rank {rank}")
    return ours


def assert_same_training(gpus: RankPool, cpus: RankPool, weights: dict[str, Path], layout: str, **arguments: Any) -> None:
    for result in on_both(gpus, cpus, layout, scenarios.training, weights, **arguments):
        assert result["update"]["grad_norm"] > 0.0


def assert_checkpoints_come_back(gpus: RankPool, weights: dict[str, Path], layout: str, folder: Path, fp8: bool = False) -> None:
    arguments = {"layout": layout, "weights": weights[layout.split(",")[0]], "folder": folder, "fp8": fp8}
    for differences in gpus.run(TRAINED_LAYOUTS[layout][0], scenarios.checkpoints, **arguments):
        assert differences == [0.0, 0.0]


def assert_same_weights_everywhere(gpus: RankPool, cpus: RankPool, weights: dict[str, Path], layout: str, folder: Path) -> None:
    for result in on_both(gpus, cpus, layout, scenarios.engine_and_files, weights, folder=folder):
        assert result["read back"]
