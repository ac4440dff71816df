"""The CUDA path of everything between the configuration and the weights of an engine, on virtual devices.

Each scenario runs on ranks of a machine with virtual GPUs and, where it returns numbers, on CPU ranks too: both must agree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from ais_megatron.algorithm_config import CorrectionName
from ais_megatron.config import ObjectiveConfig
from tests.ranks import RankPool
from tests.virtual_cuda import machine, scenarios
from tests.virtual_cuda.scenarios import LAYOUTS


@pytest.fixture(scope="session")
def gpus() -> Iterator[RankPool]:
    pool = RankPool(4, prepare=machine.install, backend="nccl")
    yield pool
    pool.close()


def assert_equal(ours: Any, theirs: Any, where: str) -> None:
    """Numbers within rounding; their order of summation differs."""
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), where
        for name in theirs:
            assert_equal(ours[name], theirs[name], f"{where}: {name}")
    elif isinstance(theirs, torch.Tensor):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5, msg=lambda text: f"{where}: {text}")
    else:
        assert ours == pytest.approx(theirs, rel=1e-4, abs=2e-5), where


FAULTS = {
    scenarios.fault_in_a_cat: "aten::cat: expected all tensors on one device",
    scenarios.fault_in_an_index: "aten::index: a CPU tensor (3,) indexed by",
    scenarios.fault_in_a_collective: "NCCL collective allreduce_ of a CPU tensor (2,)",
    scenarios.fault_in_a_forward_pass: "aten::cat: expected all tensors on one device",
    scenarios.fault_in_a_backward_pass: "aten::mul: expected all tensors on one device",
    scenarios.fault_in_a_thread: "aten::add: expected all tensors on one device",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found(gpus: RankPool, fault: Callable[[], object]) -> None:
    assert gpus.run(1, scenarios.met, fault=fault)[0].startswith(f"WrongDevice: {FAULTS[fault]}")


def test_what_cuda_allows_is_allowed(gpus: RankPool) -> None:
    assert gpus.run(1, scenarios.no_fault)[0] == ["cuda:0", "cuda:0", "cpu", "cpu", "cuda:0"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_computes_what_it_computes_on_cpus(gpus: RankPool, ranks: RankPool, layout: str) -> None:
    world = LAYOUTS[layout][0]
    ours, theirs = (pool.run(world, scenarios.training, layout=layout) for pool in (gpus, ranks))
    for rank in range(world):
        assert_equal(ours[rank], theirs[rank], f"rank {rank}")


@pytest.mark.parametrize("layout", ["dense, TP2 x PP2", "moe, one rank"])
def test_every_objective_and_correction(gpus: RankPool, ranks: RankPool, layout: str) -> None:
    objectives = get_args(ObjectiveConfig.model_fields["name"].annotation)
    names = [(name, "ais") for name in objectives] + [("grpo", name) for name in get_args(CorrectionName)]
    ours, theirs = (pool.run(LAYOUTS[layout][0], scenarios.objectives, layout=layout, names=names)[0] for pool in (gpus, ranks))
    assert len(ours) == len(set(names))
    assert_equal(ours, theirs, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints_come_back(gpus: RankPool, layout: str, tmp_path: Path) -> None:
    for differences in gpus.run(LAYOUTS[layout][0], scenarios.checkpoints, layout=layout, folder=tmp_path):
        assert differences == [0.0, 0.0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_reach_engines_and_files(gpus: RankPool, ranks: RankPool, layout: str, tmp_path: Path) -> None:
    world = LAYOUTS[layout][0]
    ours, theirs = (
        pool.run(world, scenarios.engine_and_files, layout=layout, folder=tmp_path / name) for name, pool in (("g", gpus), ("c", ranks))
    )
    for rank in range(world):
        assert ours[rank].pop("read back") and theirs[rank].pop("read back")
        assert ours[rank].pop("responses") == theirs[rank].pop("responses")
        assert_equal(ours[rank], theirs[rank], f"rank {rank}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_whole_run(gpus: RankPool, layout: str, tmp_path: Path) -> None:
    rows = gpus.run(LAYOUTS[layout][0], scenarios.whole_run, layout=layout, folder=tmp_path, ahead="one" in layout)[0]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["grad_norm"] > 0.0 and row["skipped_updates"] == 0 and row["num_response_tokens"] > 0
