"""A job on CPUs, on a machine with GPUs: `run.backend` decides, whatever else is there."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from ais_megatron.cluster.launcher import ranks_here
from ais_megatron.distributed import init_process_group, uses_cuda
from tests.helpers.ranks import RankPool
from tests.virtual_cuda import machine
from tests.virtual_cuda.comparing import assert_same_training
from tests.virtual_cuda.scenarios import LAYOUTS


@pytest.fixture(scope="module")
def beside_gpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    packages = tmp_path_factory.mktemp("packages")
    for name in ("transformer_engine", "apex"):
        (packages / name).mkdir()
        (packages / name / "__init__.py").write_text("raise RuntimeError('this package needs a GPU, and nobody asked for one')")
    pool = RankPool(1, prepare=partial(machine.with_idle_gpus, packages))
    yield pool
    pool.close()


@pytest.mark.parametrize("layout", [layout for layout, (world, *_) in LAYOUTS.items() if world == 1])
def test_training_is_the_same(beside_gpus: RankPool, ranks: RankPool, weights: dict[str, Path], layout: str) -> None:
    assert_same_training(beside_gpus, ranks, weights, layout)


def test_auto_takes_gpus_where_there_is_one_for_each_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for gpus, num_ranks, expected in ((0, 1, False), (1, 1, True), (1, 2, False), (8, 2, True)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpus=gpus: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert uses_cuda("auto", num_ranks) == expected
        assert uses_cuda("cuda", num_ranks) and not uses_cuda("cpu", num_ranks)


def test_more_ranks_than_gpus_is_an_error_of_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for rank in ("0", "1"):
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match="run.backend=cuda: 2 ranks on this node and 1 GPUs that they can see"):
            init_process_group("cuda")


def test_ranks_of_this_node(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_here() == 1
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "1")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "8(x2),4")
    assert ranks_here() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert ranks_here() == 4
