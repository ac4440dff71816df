"""The second stage: the CUDA path under the libraries that GPU nodes have, against CPU ranks with those of this environment.

Megatron-Core 0.19, without and with the real Python of Transformer Engine (`transformer_engine`), and the Megatron-Core of this
environment with it. What cannot be fetched is skipped, and says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import metadata
from pathlib import Path

import pytest

from tests.helpers.ranks import RankPool
from tests.virtual_cuda import machine, scenarios
from tests.virtual_cuda.comparing import assert_checkpoints_come_back, assert_same_training, assert_same_weights_everywhere
from tests.virtual_cuda.packages import MEGATRON, NotToBeHad, unpacked
from tests.virtual_cuda.scenarios import FAMILY_LAYOUTS, TRAINED_LAYOUTS

MACHINES = {
    f"Megatron {MEGATRON}": ("megatron",),
    f"Megatron {MEGATRON} with Transformer Engine": ("megatron", "transformer_engine"),
    "Transformer Engine": ("transformer_engine",),
}


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheels")


@pytest.fixture(scope="module", params=MACHINES)
def others(request: pytest.FixtureRequest, fetched: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPool]:
    names = MACHINES[request.param]
    try:
        packages = unpacked(names, tmp_path_factory.mktemp("packages"), fetched)
    except NotToBeHad as reason:
        pytest.skip(f"second stage of virtual CUDA, {request.param}: {reason}")
    prepare = partial(machine.install, packages, transformer_engine="transformer_engine" in names, fla=True)
    pool = RankPool(4, prepare=prepare, backend="nccl")
    pool.names = names  # type: ignore[attr-defined]
    yield pool
    pool.close()


def test_the_libraries_are_those_that_were_asked_for(others: RankPool, weights: dict[str, Path]) -> None:
    megatron, linear = others.run(1, scenarios.libraries, weights=weights["dense"])[0]
    assert megatron == (MEGATRON if "megatron" in others.names else metadata.version("megatron-core"))
    assert linear == ("TELayerNormColumnParallelLinear" if "transformer_engine" in others.names else "ColumnParallelLinear")


@pytest.mark.parametrize("layout", TRAINED_LAYOUTS)
def test_training_computes_what_it_computes_on_cpus(others: RankPool, ranks: RankPool, weights: dict[str, Path], layout: str) -> None:
    assert_same_training(others, ranks, weights, layout)


@pytest.mark.parametrize("layout", ["dense, one rank", "moe, TP2 x EP2", "qwen35, TP2 x PP2"])
def test_checkpoints_come_back(others: RankPool, weights: dict[str, Path], layout: str, tmp_path: Path) -> None:
    assert_checkpoints_come_back(others, weights, layout, tmp_path)


# Without Qwen3.5: its engine would call FLA with states, which the stand-in does not keep.
@pytest.mark.parametrize("layout", ["dense, TP2 x PP2", "moe, one rank", *FAMILY_LAYOUTS, "llada, one rank", "llada, TP2 x PP2"])
def test_weights_reach_engines_and_files(others: RankPool, ranks: RankPool, weights: dict[str, Path], layout: str, tmp_path: Path) -> None:
    assert_same_weights_everywhere(others, ranks, weights, layout, tmp_path)


@pytest.fixture
def with_transformer_engine(others: RankPool) -> RankPool:
    if "transformer_engine" not in others.names:
        pytest.skip("needs Transformer Engine, which this virtual machine does not have")
    return others


@pytest.mark.parametrize("layout", ["dense, TP2 x PP2", "moe, TP2 x EP2"])
def test_every_product_of_the_layers_is_in_blockwise_fp8(with_transformer_engine: RankPool, weights: dict[str, Path], layout: str) -> None:
    """With float32 scales, and sizes that FP8 kernels accept. (The kernels' stand-ins compute in plain precision.)"""
    kind = layout.split(",")[0]
    layers = {"TELayerNormColumnParallelLinear", "TERowParallelLinear"}
    layers |= {"TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"} if kind == "moe" else set()
    for passes in with_transformer_engine.run(4, scenarios.products_in_fp8, layout=layout, weights=weights[kind]):
        for products in passes:
            assert products.keys() == {(layer, "Float8BlockScaling", True) for layer in layers}


@pytest.mark.parametrize("layout", ["moe, TP2 x EP2"])
def test_training_in_fp8_passes_everywhere(
    with_transformer_engine: RankPool, ranks: RankPool, weights: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    assert_same_training(with_transformer_engine, ranks, weights, layout, fp8=True)
    assert_checkpoints_come_back(with_transformer_engine, weights, layout, tmp_path, fp8=True)


@pytest.mark.parametrize("layout", ["dense, TP2 x PP2", "qwen2, TP2"])
def test_lora_beside_layers_with_the_norm_inside(
    with_transformer_engine: RankPool, ranks: RankPool, weights: dict[str, Path], layout: str
) -> None:
    assert_same_training(with_transformer_engine, ranks, weights, layout, lora=4)
