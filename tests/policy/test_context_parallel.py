"""Context parallelism: ranks that share the tokens of rows compute what one rank computes. With real processes over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.ranks import RankPool
from tests.helpers.updates import assert_same, one_update

SP = {"tp": 2, "sequence_parallel": True}
# (ranks and `parallel` without context parallelism, the same with it, other options)
DENSE = {
    "CP2": ((1, {}), (2, {"cp": 2}), {}),
    "CP4": ((1, {}), (4, {"cp": 4}), {}),
    "TP2": ((2, {"tp": 2}), (4, {"tp": 2, "cp": 2}), {}),
    "TP2+SP": ((2, SP), (4, {**SP, "cp": 2}), {}),
    "PP2": ((2, {"pp": 2}), (4, {"pp": 2, "cp": 2}), {}),
    "recomputed": ((1, {}), (2, {"cp": 2}), {"recompute": "full"}),
    "LoRA": ((2, SP), (4, {**SP, "cp": 2}), {"policy": {"lora": {"rank": 4}}}),
    "by token": ((1, {}), (2, {"cp": 2}), {"aggregation": "token"}),
}
EXPERTS = {
    "CP2": ((1, {}), (2, {"cp": 2}), {}),
    "EP2": ((1, {}), (2, {"cp": 2, "ep": 2}), {}),
    "TP2+EP2": ((2, {**SP, "ep": 2}), (4, {**SP, "ep": 2, "cp": 2}), {}),
    "PP2": ((2, {"pp": 2}), (4, {"pp": 2, "cp": 2}), {}),
}


@pytest.mark.parametrize(("kind", "layout"), [("dense", name) for name in DENSE] + [("moe", name) for name in EXPERTS])
def test_context_parallelism_changes_no_figure(
    ranks: RankPool, untied_checkpoint: Path, moe_checkpoint: Path, kind: str, layout: str
) -> None:
    """Log-probabilities, gradients, metrics, ranges of Q, K and V, the experts' balance and the replayed routes."""
    (world, parallel), (more, split), options = (DENSE if kind == "dense" else EXPERTS)[layout]
    arguments = dict(path=untied_checkpoint if kind == "dense" else moe_checkpoint, is_moe=kind == "moe", **options)
    whole = ranks.run(world, one_update, parallel=parallel, **arguments)
    parts = ranks.run(more, one_update, parallel=split, **arguments)
    assert_same(whole, parts)
    assert all(sequences == 1 for sequences, _ in parts[0]["met"])


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_data_parallel_ranks_beside(ranks: RankPool, untied_checkpoint: Path, moe_checkpoint: Path, kind: str) -> None:
    """CP2 x DP2: every token counts once, though two ranks have each row."""
    arguments = dict(path=untied_checkpoint if kind == "dense" else moe_checkpoint, is_moe=kind == "moe")
    whole = ranks.run(2, one_update, parallel={}, **arguments)
    parts = ranks.run(4, one_update, parallel={"cp": 2}, **arguments)
    by_rows = [next(one for one in whole if torch.equal(one["logprobs"] == 0.0, other["logprobs"] == 0.0)) for other in parts]
    assert {id(one) for one in by_rows} == {id(one) for one in whole}
    assert_same(by_rows, parts)
