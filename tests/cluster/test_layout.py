"""Ranks and servers on nodes, by hand; what does not fit is refused with what to change."""

from __future__ import annotations

from pathlib import Path

import pytest

from ais_megatron.cluster.layout import layout_from_file, read_layout
from ais_megatron.config import ConfigError
from tests.helpers.paths import ROOT

CONFIGS = ROOT / "configs"
DENSE, MOE, TINY = (CONFIGS / f"{name}.yaml" for name in ("qwen3_8b_ais", "qwen3_30b_a3b_ais", "tiny_countdown"))


def test_dense_a_server_per_gpu() -> None:
    layout = layout_from_file(DENSE, [], ["a"], ["b"], 8)
    assert (layout.trainer_nodes, layout.ranks_per_node, layout.num_workers) == (("a",), 8, 16)
    assert [(s.node, s.port, s.gpus) for s in layout.servers] == [("b", 30000 + i, (i,)) for i in range(8)]
    assert layout.servers[1].url == "http://b:30001"


def test_experts_over_two_nodes_and_servers_of_two_gpus(tmp_path: Path) -> None:
    layout = layout_from_file(MOE, ["rollout.sglang.port=40000"], ["a", "b"], ["c", "d"], 8)
    assert [s.gpus for s in layout.servers] == [(0, 1), (2, 3), (4, 5), (6, 7)] * 2
    assert [s.port for s in layout.servers] == [40000, 40001, 40002, 40003] * 2
    (tmp_path / "layout.tsv").write_text("\n".join(layout.lines()) + "\n")
    assert read_layout(tmp_path / "layout.tsv") == layout


def test_cpu_ranks_are_the_product_of_the_parallel_sizes() -> None:
    assert layout_from_file(TINY, [], ["a", "b"], [], 0).lines() == ["trainer\ta\t1", "trainer\tb\t1"]
    assert layout_from_file(TINY, ["parallel.pp=2"], ["a"], [], 0).ranks_per_node == 4


@pytest.mark.parametrize(
    ("path", "overrides", "trainers", "rollouts", "gpus", "message"),
    [
        (DENSE, [], "a", "", 8, "no rollout nodes: rollout.engine=sglang needs at least one"),
        (DENSE, ["rollout.engine=local"], "a", "b", 8, "1 rollout nodes: rollout.engine=local generates on the trainer's ranks"),
        (DENSE, ["parallel.pp=4"], "a", "b", 8, r"parallel.tp=4 \* parallel.pp=4 .* = 16 GPUs for one copy .* the 8 GPUs"),
        (DENSE, ["parallel.dp=1"], "a b", "c", 8, "parallel.dp=1: 2 trainer nodes with 8 GPUs have room for 4 copies"),
        (DENSE, ["rollout.prompts_per_step=63"], "a b", "c", 8, "rollout.prompts_per_step=63: must be a multiple of parallel.dp=4"),
        (DENSE, ["rollout.sglang.tp=4"], "a", "b", 6, r"6 GPUs of 1 trainer|does not divide the 6 GPUs of a rollout node; use one of"),
        (DENSE, ["rollout.sglang.port=65530"], "a", "b", 8, "the last server of a node would get port 65537"),
        (DENSE, [], "a", "a", 8, "nodes a: named as trainer and as rollout node"),
        (MOE, ["parallel.pp=2", "model.recompute=none"], "a", "b", 8, r"parallel.ep=8 \* parallel.etp=1: does not divide .*=4"),
        (TINY, [], "a b c", "", 0, "2 ranks cannot be spread evenly over 3 trainer nodes"),
    ],
)
def test_refusals(path: Path, overrides: list[str], trainers: str, rollouts: str, gpus: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout_from_file(path, overrides, trainers.split(), rollouts.split(), gpus)
