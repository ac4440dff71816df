"""Pools of ranks on a machine with virtual GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.ranks import RankPool
from tests.virtual_cuda import machine, scenarios


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def gpus() -> Iterator[RankPool]:
    """With the libraries of this environment, which has no Transformer Engine."""
    pool = RankPool(4, prepare=machine.install, backend="nccl")
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def gpus_with_fla() -> Iterator[RankPool]:
    pool = RankPool(4, prepare=partial(machine.install, fla=True), backend="nccl")
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("weights")
    return {kind: scenarios.write_weights(folder / kind, kind) for kind in scenarios.ARCHITECTURES}
