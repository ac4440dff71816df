"""Groups change places between data-parallel ranks until these have about the same work, and nothing else changes."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from ais_megatron.batch import Batch
from ais_megatron.config import Config
from ais_megatron.planning.cost import forward_flops
from ais_megatron.policy.balance import swapped, work_of
from tests.helpers.batches import config_with
from tests.helpers.ranks import RankPool


def loads(held: list[list[tuple[int, int]]], work: list[list[float]]) -> list[float]:
    return [sum(work[rank][number] for rank, number in its) for its in held]


def test_swaps_by_hand() -> None:
    assert swapped([[9.0, 8.0], [1.0, 2.0]]) == [[(1, 1), (0, 1)], [(1, 0), (0, 0)]], "9 and 2 change places, and both have 10"
    assert swapped([[5.0, 4.0], [4.0, 5.0]]) == [[(0, 0), (0, 1)], [(1, 0), (1, 1)]], "nothing to gain"
    assert swapped([[3.0], [1.0]]) == [[(0, 0)], [(1, 0)]], "a swap would only exchange the busy and the idle rank"
    assert swapped([[0.0], [0.0]]) == [[(0, 0)], [(1, 0)]]


def test_a_long_tail_is_spread() -> None:
    generator = torch.Generator().manual_seed(0)
    work = (torch.randn(8, 16, generator=generator).mul(0.6).exp() * 100).tolist()
    held = swapped(work)
    assert sorted(place for its in held for place in its) == [(rank, number) for rank in range(8) for number in range(16)]
    assert all(len(its) == 16 for its in held)
    before, after = (max(x) * 8 / sum(x) for x in ([sum(its) for its in work], loads(held, work)))
    assert before > 1.3 and after < 1.02, (before, after)


def test_the_work_of_a_row_grows_faster_than_its_length() -> None:
    architecture = config_with().architecture
    short, long = work_of(torch.tensor([10, 1000]), architecture).tolist()
    assert short == forward_flops(architecture, 1, 10) and long > 110 * short


LENGTHS = torch.tensor([[20, 18, 3, 19], [4, 5, 2, 6]])  # of the groups of two ranks


def rows_of(rank: int) -> Batch:
    """Two rows of each group; every field tells rank, group and row."""
    lengths = LENGTHS[rank].repeat_interleave(2)
    columns = torch.arange(int(lengths.max()))
    real = columns < lengths[:, None]
    number = 100 * rank + torch.arange(8)
    values = number[:, None] * real
    routes = (values[:, :, None, None] % 50).to(torch.int8).masked_fill(~real[:, :, None, None], -1)
    return Batch(values, real & (columns > 0), lengths, -values.float(), number.float(), number.float(), routes)


def balanced(rank: int, config: Config):  # noqa: ANN201
    from ais_megatron.policy.balance import balance
    from ais_megatron.policy.parallel import initialize_parallel

    initialize_parallel(config)
    return balance(rows_of(rank), [4 * rank + number for number in range(4)], config)


@pytest.mark.parametrize("updates", [1, 2])
def test_ranks_exchange_whole_groups_of_an_update(ranks: RankPool, updates: int) -> None:
    config = config_with(rollout={"prompts_per_step": 8, "group_size": 2}, train={"updates_per_batch": updates, "balance": True})
    results = ranks.run(2, balanced, config=config)
    # One update: 20 and 19 are with 5, 4, 2 or 6 in exchange. Two: 20 or 18 for 5 or 4, and 19 for 6 or 2.
    assert sorted(group for _, groups in results for group in groups) == list(range(8))
    work = [float(work_of(batch.lengths, config.architecture).sum()) for batch, _ in results]
    original = [float(work_of(rows_of(rank).lengths, config.architecture).sum()) for rank in range(2)]
    assert max(original) / sum(original) > 0.7 and max(work) / sum(work) < 0.6
    for rank, (batch, groups) in enumerate(results):
        half = 4 // updates
        for update in range(updates):
            part = groups[half * update : half * (update + 1)]
            assert part == sorted(part) and {group % 4 // half for group in part} == {update}, "a group stays in its update"
        assert [*groups] != [4 * rank + number for number in range(4)]
        assert batch.tokens.shape[1] == int(batch.lengths.max())
        for place, group in enumerate(groups):
            source = rows_of(group // 4).rows(torch.arange(2) + group % 4 * 2, batch.tokens.shape[1]).pad_columns(batch.tokens.shape[1])
            for name in (field.name for field in fields(Batch) if getattr(source, field.name) is not None):
                assert torch.equal(getattr(batch, name)[2 * place : 2 * place + 2], getattr(source, name)), name


def test_ranks_may_keep_what_they_generated(ranks: RankPool) -> None:
    rollout = {"prompts_per_step": 8, "group_size": 2}
    for config in (
        config_with(rollout=rollout),
        config_with(rollout=rollout, train={"updates_per_batch": 8, "balance": True}),  # an update has a single row of each rank
    ):
        for rank, (batch, groups) in enumerate(ranks.run(2, balanced, config=config)):
            assert groups == [4 * rank + number for number in range(4)] and torch.equal(batch.tokens, rows_of(rank).tokens)


def test_rows_without_routes_join_rows_with_routes() -> None:
    first, second = rows_of(0), replace(rows_of(1), routed_experts=None)
    for joined, own in ((first.joined(second), slice(8)), (second.joined(first), slice(8, 16))):
        assert len(joined) == 16 and joined.tokens.shape[1] == 20
        assert torch.equal(joined.routed_experts[own], first.routed_experts)
        assert int((joined.routed_experts != -1).sum()) == int((first.routed_experts != -1).sum())
