"""The CUDA path of everything between the configuration and the weights of an engine, on virtual devices.

Each scenario runs on ranks of a machine with virtual GPUs and, where it returns numbers, on CPU ranks too: both must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch

from ais_megatron.config.algorithm import OBJECTIVE_PRESETS, CorrectionName
from tests.helpers.ranks import RankPool
from tests.virtual_cuda import scenarios
from tests.virtual_cuda.comparing import assert_checkpoints_come_back, assert_same_training, assert_same_weights_everywhere, on_both
from tests.virtual_cuda.scenarios import ALL_LAYOUTS, LAYOUTS, TRAINED_LAYOUTS

FAULTS = {
    scenarios.fault_in_a_cat: "aten::cat: expected all tensors on one device",
    scenarios.fault_in_an_index: "aten::index: a CPU tensor (3,) indexed by",
    scenarios.fault_in_a_collective: "NCCL collective allreduce_ of a CPU tensor (2,)",
    scenarios.fault_in_a_backward_pass: "aten::mul: expected all tensors on one device",
    scenarios.fault_in_a_thread: "aten::add: expected all tensors on one device",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_planted_fault_is_found(gpus: RankPool, fault: Callable[[], object]) -> None:
    assert gpus.run(1, scenarios.met, fault=fault)[0].startswith(f"WrongDevice: {FAULTS[fault]}")


def test_the_fault_that_killed_every_first_forward_pass_is_found(gpus: RankPool, weights: dict[str, Path]) -> None:
    met = gpus.run(1, scenarios.met, fault=scenarios.fault_in_a_forward_pass, weights=weights["dense"])[0]
    assert met.startswith("WrongDevice: aten::cat: expected all tensors on one device")


def test_what_cuda_allows_is_allowed(gpus: RankPool) -> None:
    assert gpus.run(1, scenarios.no_fault)[0] == ["cuda:0", "cuda:0", "cpu", "cpu", "cuda:0"]


@pytest.mark.parametrize("layout", TRAINED_LAYOUTS)
def test_training_computes_what_it_computes_on_cpus(gpus: RankPool, ranks: RankPool, weights: dict[str, Path], layout: str) -> None:
    assert_same_training(gpus, ranks, weights, layout)


@pytest.mark.parametrize("layout", ["dense, TP2 x PP2", "moe, TP2 x EP2", "qwen35, TP2 x PP2"])
def test_a_trainer_with_the_engines_weights(gpus: RankPool, ranks: RankPool, weights: dict[str, Path], layout: str) -> None:
    assert_same_training(gpus, ranks, weights, layout, aligned="fp8_weights_aligned")


def test_a_trainer_with_the_engines_inputs_too(gpus: RankPool, weights: dict[str, Path]) -> None:
    """Without comparison, because a sum in another order can move an input to the next value of FP8."""
    layout = "dense, TP2 x PP2"
    for result in gpus.run(4, scenarios.training, layout=layout, weights=weights["dense"], aligned="fp8_aligned"):
        assert result["update"]["grad_norm"] > 0.0 and result["logprobs"].isfinite().all()


@pytest.mark.parametrize(("layout", "heads"), [("qwen35, one rank", 4), ("qwen35, TP2 x PP2", 2)])
def test_the_gated_delta_rule_through_fla(
    gpus_with_fla: RankPool, ranks: RankPool, weights: dict[str, Path], layout: str, heads: int
) -> None:
    for calls in gpus_with_fla.run(TRAINED_LAYOUTS[layout][0], scenarios.delta_rules_of_fla, layout=layout, weights=weights["qwen35"]):
        assert calls.keys() == {(heads, heads, torch.float32)}, "every layer with the rule on every stage"
    assert_same_training(gpus_with_fla, ranks, weights, layout)


@pytest.mark.parametrize("layout", ["dense, TP2 x PP2", "moe, one rank"])
def test_every_objective_and_correction(gpus: RankPool, ranks: RankPool, weights: dict[str, Path], layout: str) -> None:
    names = [(name, "ais") for name in OBJECTIVE_PRESETS] + [("grpo", name) for name in get_args(CorrectionName)]
    for norms in on_both(gpus, ranks, layout, scenarios.objectives, weights, names=names):
        assert len(norms) == len(set(names)) == len(OBJECTIVE_PRESETS) + len(get_args(CorrectionName)) - 1  # grpo with ais is in both


@pytest.mark.parametrize("layout", [*LAYOUTS, "llada, TP2 x PP2", "qwen35, TP2 x PP2"])
def test_checkpoints_come_back(gpus: RankPool, weights: dict[str, Path], layout: str, tmp_path: Path) -> None:
    assert_checkpoints_come_back(gpus, weights, layout, tmp_path)


@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_weights_reach_engines_and_files(gpus: RankPool, ranks: RankPool, weights: dict[str, Path], layout: str, tmp_path: Path) -> None:
    assert_same_weights_everywhere(gpus, ranks, weights, layout, tmp_path)


@pytest.mark.parametrize("layout", ["dense, one rank", "moe, TP2 x EP2"])
def test_a_policy_that_rests_computes_the_same(gpus: RankPool, weights: dict[str, Path], layout: str) -> None:
    assert set(gpus.run(LAYOUTS[layout][0], scenarios.turns, layout=layout, weights=weights[layout.split(",")[0]])) == {0.0}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_whole_run(gpus: RankPool, layout: str, tmp_path: Path) -> None:
    rows = gpus.run(LAYOUTS[layout][0], scenarios.whole_run, layout=layout, folder=tmp_path, ahead="one" in layout)[0]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert row["grad_norm"] > 0.0 and row["skipped_updates"] == 0 and row["num_response_tokens"] > 0
