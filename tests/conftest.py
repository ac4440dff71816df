"""Shared fixtures: the pool of ranks, and tiny Qwen3 checkpoints made on the spot."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.helpers")  # so that their assertions say what they compared

from tests.helpers.checkpoints import write_checkpoint  # noqa: E402
from tests.helpers.ranks import RankPool  # noqa: E402


def pytest_configure() -> None:
    """A shell starts `make check &` with Ctrl-C ignored. Programs that tests interrupt would inherit that, and never end."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Where several processes share the tests (pytest -n), long groups come first, so that all processes end at about the same time. A
# process takes two groups to begin with: hence the two short ones behind the longest two.
FIRST = ("tests/sglang", "tests/slurm", "tests/algorithm", "tests/benchmarks", "tests/virtual_cuda")
TOGETHER = ("tests/sglang", "tests/slurm", "tests/virtual_cuda")


def group_of(nodeid: str) -> str:
    """What one process runs: a file, or all tests with real servers, which they share, or all with the one Slurm of a machine, or all on
    virtual GPUs, which are compared with the same results of CPU ranks."""
    return next((folder for folder in TOGETHER if nodeid.startswith(f"{folder}/")), nodeid.partition("::")[0])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        items.sort(key=lambda item: next((i for i, folder in enumerate(FIRST) if item.nodeid.startswith(folder)), len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """pytest-xdist's own marks for groups have no effect under pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class InGroups(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return InGroups(config, log)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session", params=["untied", pytest.param("tied", marks=pytest.mark.slow)])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 Qwen3 checkpoint written by transformers, with weights far from their initial values."""
    return make_checkpoint(tmp_path_factory.mktemp("qwen3"), tied=request.param == "tied")


@pytest.fixture(scope="session")
def untied_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen3"), tied=False)


@pytest.fixture(scope="session")
def moe_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as Qwen3-MoE: 8 experts, 2 per token, in every layer."""
    return make_checkpoint(tmp_path_factory.mktemp("qwen3_moe"), tied=False, experts=8)


def make_checkpoint(folder: Path, tied: bool, experts: int = 0) -> Path:
    from transformers import Qwen3ForCausalLM, Qwen3MoeForCausalLM

    moe = dict(num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True) if experts else {}
    return write_checkpoint(folder, Qwen3MoeForCausalLM if experts else Qwen3ForCausalLM, head_dim=16, tie_word_embeddings=tied, **moe)
