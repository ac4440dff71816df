"""Microbatches: every row once, within the budget, cut to their longest row; in few shapes, which change no figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ais_megatron.policy.microbatches import make_microbatch, pad_columns, split_by_tokens
from ais_megatron.shapes import Shapes
from tests.helpers.policies import make_batch, make_policy, moe_config, my_rows
from tests.helpers.ranks import RankPool
from tests.helpers.updates import assert_same, one_update

CUDA = Shapes.on("cuda", 4)


def test_rows_are_sorted_and_fill_the_budget() -> None:
    groups = split_by_tokens(torch.tensor([3, 9, 4, 9, 1]), budget=18)
    assert [g.tolist() for g in groups] == [[1, 3], [2, 0, 4]]  # 2 x 9, then 3 x 4


def test_a_row_longer_than_the_budget_stands_alone() -> None:
    assert [g.tolist() for g in split_by_tokens(torch.tensor([2, 50, 2]), budget=10)] == [[1], [0, 2]]


def test_as_many_as_asked_for_but_never_more_than_rows() -> None:
    lengths = torch.tensor([5, 4, 3])
    assert len(split_by_tokens(lengths, budget=100, at_least=2)) == 2
    groups = split_by_tokens(lengths, budget=100, at_least=7)
    assert sorted(int(row) for g in groups for row in g) == [0, 1, 2] and len(groups) == 3


def test_cutting_and_padding_keep_every_real_token() -> None:
    batch = pad_columns(make_batch(), 4)
    assert batch.tokens.shape == (6, 20)
    for index in split_by_tokens(batch.lengths, budget=40):
        rows = make_microbatch(batch, index, multiple=4)
        width = rows.tokens.shape[1]
        assert width % 4 == 0 and width - int(rows.lengths.max()) < 4
        assert torch.equal(rows.tokens, batch.tokens[index, :width])
        assert int(rows.loss_mask.sum()) == int(batch.loss_mask[index].sum())


def test_without_a_row_there_is_an_idle_one() -> None:
    batch = replace(pad_columns(make_batch(), 2), routed_experts=torch.zeros(6, 18, 1, 2, dtype=torch.int8))
    rows = make_microbatch(batch, torch.zeros(0, dtype=torch.int64), 2)
    assert rows.tokens.shape == (0, 2)
    given = Shapes().fill(rows)
    assert given.tokens.shape == (1, 2) and not given.loss_mask.any() and given.lengths.tolist() == [0]
    assert given.routed_experts.dtype == torch.int8 and (given.routed_experts == -1).all()
    assert CUDA.fill(rows).tokens.shape == (1, 128)


def test_a_cpu_is_given_what_there_is() -> None:
    assert Shapes.on("cpu", 4) == Shapes()
    batch = make_batch()
    assert Shapes().fill(batch) is batch
    assert [(Shapes().width(n), Shapes().rows(n), Shapes().most_rows(n)) for n in (1, 5, 7)] == [(n, n, n) for n in (1, 5, 7)]


def test_row_counts_by_hand() -> None:
    assert [CUDA.rows(n) for n in (0, 1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 17, 25)] == [1, 1, 2, 3, 4, 6, 6, 8, 12, 12, 16, 24, 32]
    assert [CUDA.most_rows(n) for n in (0, 1, 2, 3, 5, 7, 8, 11, 13, 23, 25)] == [1, 1, 2, 3, 4, 6, 8, 8, 12, 16, 24]
    assert (CUDA.width(1), CUDA.width(128), CUDA.width(129)) == (128, 128, 256)
    assert Shapes.on("cuda", 3).width(1) == 384, "sequence parallelism's multiple too"


def test_a_long_tail_meets_few_shapes_within_the_budget() -> None:
    """Fifty steps of 256 responses, most of a few hundred tokens and some of 4352, the longest."""
    generator, budget = torch.Generator().manual_seed(0), 16384
    plain, rounded = set(), set()
    computed = {"plain": 0, "rounded": 0}
    for _ in range(50):
        lengths = (500 * torch.randn(256, generator=generator).mul(0.9).exp()).long().clamp(20, 4352)
        for name, shapes, seen in (("plain", Shapes(), plain), ("rounded", CUDA, rounded)):
            groups = split_by_tokens(lengths, budget, shapes=shapes)
            assert torch.cat(groups).sort().values.tolist() == list(range(256))
            for index in groups:
                shape = (shapes.rows(len(index)), shapes.width(int(lengths[index].max())))
                assert shape[0] * shape[1] <= budget
                computed[name] += shape[0] * shape[1]
                seen.add(shape)
    assert len(plain) > 400 and len(rounded) <= 4352 // 128 + 16, (len(plain), len(rounded))
    assert computed["rounded"] < 1.25 * computed["plain"], computed


def test_a_single_long_row_stands_alone_in_its_rounded_width() -> None:
    groups = split_by_tokens(torch.tensor([900, 100, 100]), budget=256, shapes=CUDA)
    assert [g.tolist() for g in groups] == [[0], [1, 2]]


# ---- the same training with and without ------------------------------------------------------------------------------------

PARALLEL = {"one": (1, {}), "TP2+SP": (2, {"tp": 2, "sequence_parallel": True}), "PP2": (2, {"pp": 2}), "DP2": (2, {})}
EXPERTS = {"one": (1, {}), "EP2": (2, {"ep": 2}), "TP2+EP2": (2, {"tp": 2, "sequence_parallel": True, "ep": 2})}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), [("dense", name) for name in PARALLEL] + [("moe", name) for name in EXPERTS])
def test_rounded_shapes_change_no_figure(ranks: RankPool, untied_checkpoint: Path, moe_checkpoint: Path, kind: str, layout: str) -> None:
    """Log-probabilities, gradients, metrics, ranges of Q, K and V, balance of the experts: float32, to 1e-6."""
    world, parallel = (PARALLEL if kind == "dense" else EXPERTS)[layout]
    arguments = dict(path=untied_checkpoint if kind == "dense" else moe_checkpoint, parallel=parallel, is_moe=kind == "moe")
    shapes = Shapes(columns=8, few_row_counts=True)
    plain, rounded = (ranks.run(world, one_update, shapes=s, **arguments) for s in (None, shapes))
    for one, other in zip(plain, rounded, strict=True):
        assert all(rows in (1, 2, 3, 4, 6) and columns % 8 == 0 for rows, columns in other["met"]) and other["met"] != one["met"]
    assert_same(plain, rounded)


@pytest.mark.slow
def test_experts_replayed_in_recomputed_layers(ranks: RankPool, moe_checkpoint: Path) -> None:
    """A layer that runs a second time in the backward pass sends its tokens where they went the first time."""
    world, parallel = EXPERTS["TP2+EP2"]
    arguments = dict(path=moe_checkpoint, parallel=parallel, is_moe=True, shapes=Shapes(columns=8, few_row_counts=True))
    assert_same(*(ranks.run(world, one_update, recompute=recompute, **arguments) for recompute in ("none", "full")))


def order_of_events(rank: int, path: Path, parallel: dict) -> list[str]:
    """When microbatches go to the device, and when the model sees one; in forward passes and in an update."""
    from ais_megatron.algorithm.scaler import LossScaler
    from ais_megatron.batch import Batch

    policy = make_policy(moe_config(path, parallel, budget=17), path)
    rows, _ = my_rows(make_batch())
    events, to = [], Batch.to
    policy.model.register_forward_pre_hook(lambda *_: events.append("forward"))
    Batch.to = lambda batch, device: (events.append("to"), to(batch, device))[1]
    try:
        old = policy.logprobs(rows)
        policy.train_step(rows, old, LossScaler(0.5, "token"))
    finally:
        Batch.to = to
    return events


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["one", "PP2"])
def test_one_microbatch_goes_to_the_device_at_a_time(ranks: RankPool, untied_checkpoint: Path, layout: str) -> None:
    world, parallel = PARALLEL[layout]
    for events in ranks.run(world, order_of_events, path=untied_checkpoint, parallel=parallel):
        assert len(events) > 16 and events == ["to", "forward"] * (len(events) // 2)
