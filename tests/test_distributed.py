"""Errors that reach every rank, and batches that are joined across a model-parallel group."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from ais_megatron.batch import Batch, Prompt, Rollout, assemble, routes_dtype
from ais_megatron.cluster.gloo import THREADS_PER_DEVICE
from ais_megatron.distributed import all_reduce_sum, gather_batch, rank_consistent, reduce_metrics
from ais_megatron.prompts import Share
from tests.helpers.ranks import RankError, RankPool


def rollout(index: int, prompt: int, response: int) -> Rollout:
    tokens = tuple(range(1, response + 1))
    return Rollout(Prompt(index, "", tuple(range(10, 10 + prompt)), {}), tokens, tuple(-0.1 * t for t in tokens), "stop", 3)


def test_assemble_aligns_tokens_and_logprobs() -> None:
    batch = assemble([rollout(0, 2, 3), rollout(1, 1, 1)], torch.tensor([1.0, 0.0]), torch.tensor([0.5, -0.5]))
    assert batch.tokens.tolist() == [[10, 11, 1, 2, 3], [10, 1, 0, 0, 0]]
    assert batch.loss_mask.tolist() == [[False, False, True, True, True], [False, True, False, False, False]]
    assert batch.lengths.tolist() == [5, 2]
    torch.testing.assert_close(batch.rollout_logprobs, torch.tensor([[0, 0, -0.1, -0.2, -0.3], [0, -0.1, 0, 0, 0]]))


@pytest.mark.parametrize(
    ("tokens", "logprobs", "message"),
    [
        ((), (), r"prompt 7 .*version 3.*response is empty"),
        ((1, 2), (-0.5,), r"1 logprobs for 2 tokens"),
        ((1, 2), (-0.5, float("nan")), r"logprob nan at response token 1"),
        ((1,), (-float("inf"),), r"logprob -inf at response token 0"),
        ((1,), (0.5,), r"logprob 0.5 at response token 0"),
    ],
)
def test_corrupt_rollouts_are_refused(tokens: tuple[int, ...], logprobs: tuple[float, ...], message: str) -> None:
    bad = Rollout(Prompt(7, "", (1,), {}), tokens, logprobs, "stop", 3)
    with pytest.raises(ValueError, match=message):
        assemble([rollout(0, 2, 2), bad], torch.zeros(2), torch.zeros(2))


def one_rank_fails(rank: int, bad_rank: int) -> str:
    try:
        with rank_consistent():
            if rank == bad_rank:
                raise ValueError(f"line 7 of rank {rank}'s file is not JSON")
    except ValueError as error:
        return str(error)
    return "no error"


def test_one_ranks_error_is_raised_on_all(ranks: RankPool) -> None:
    assert ranks.run(3, one_rank_fails, bad_rank=1) == ["[rank 1] line 7 of rank 1's file is not JSON"] * 3
    assert ranks.run(2, one_rank_fails, bad_rank=-1) == ["no error"] * 2


def sums_and_threads(rank: int, num_groups: int) -> tuple[list[float], int]:
    groups = [dist.new_group([0, 1]) for _ in range(2)]
    before = len(os.listdir("/proc/self/task"))
    groups += [dist.new_group([0, 1]) for _ in range(num_groups)]
    threads = len(os.listdir("/proc/self/task")) - before
    return [float(all_reduce_sum(torch.tensor([1.0 + rank + number]), group)) for number, group in enumerate(groups)], threads


def test_gloo_groups_share_one_device(ranks: RankPool) -> None:
    for _ in range(2):  # the device outlives the first set of groups
        for sums, threads in ranks.run(2, sums_and_threads, num_groups=4):
            assert sums == [3.0 + 2 * number for number in range(6)]
            assert threads == 4 * THREADS_PER_DEVICE  # and no thread of a device


def gathered(rank: int, rows: list[list[tuple[int, int]]]) -> Batch:
    import torch.distributed as dist

    mine = [rollout(rank, prompt, response) for prompt, response in rows[rank]]
    values = torch.arange(len(mine), dtype=torch.float32) + 10 * rank
    return gather_batch(assemble(mine, values, -values), dist.group.WORLD)


def test_batches_of_different_shapes_join_in_rank_order(ranks: RankPool) -> None:
    rows = [[(2, 3), (1, 1)], [], [(4, 5)]]
    everyone = [rollout(0, *shape) for part in rows for shape in part]
    values = torch.tensor([0.0, 1.0, 20.0])
    expected = assemble(everyone, values, -values)
    for batch in ranks.run(3, gathered, rows=rows):
        assert batch.routed_experts is None
        for name, tensor in vars(expected).items():
            if tensor is None:
                continue
            assert torch.equal(getattr(batch, name), tensor), name
            assert getattr(batch, name).dtype == tensor.dtype


def gathered_experts(rank: int, dtypes: list[torch.dtype]) -> tuple[Batch, int]:
    """And the bytes of the largest tensor that was sent."""
    import torch.distributed as dist

    mine = (
        [replace(rollout(rank, 2, rank + 1), routed_experts=torch.full((rank + 2, 3, 2), 120 + rank, dtype=dtypes[rank]))] if rank else []
    )
    local = assemble(mine, torch.zeros(len(mine)), torch.zeros(len(mine)))
    all_gather, sent = dist.all_gather, []
    dist.all_gather = lambda parts, tensor, group: (sent.append(tensor.nbytes), all_gather(parts, tensor, group=group))
    try:
        return gather_batch(local, dist.group.WORLD), max(sent)
    finally:
        dist.all_gather = all_gather


@pytest.mark.parametrize(
    ("second", "third", "joined"),
    [(torch.int8, torch.int8, torch.int8), (torch.int8, torch.int16, torch.int16), (torch.int32, torch.int8, torch.int32)],
)
def test_routed_experts_travel_with_their_tokens(ranks: RankPool, second: torch.dtype, third: torch.dtype, joined: torch.dtype) -> None:
    """As wide as the widest rank's, and no wider on the way: 5 columns of 4 + 4 + 1 bytes and of 6 routes, and 12 bytes a row."""
    for batch, sent in ranks.run(3, gathered_experts, dtypes=[torch.int8, second, third]):
        assert batch.routed_experts.shape == (2, 5, 3, 2) and batch.routed_experts.dtype == joined
        assert batch.routed_experts[:, :, 0, 0].tolist() == [[121, 121, 121, -1, -1], [122, 122, 122, 122, -1]]
        assert sent == 5 * (9 + 6 * joined.itemsize) + 12


@pytest.mark.parametrize(
    ("num_experts", "dtype"), [(8, torch.int8), (128, torch.int8), (129, torch.int16), (32768, torch.int16), (32769, torch.int32)]
)
def test_routes_are_as_narrow_as_the_last_expert_allows(num_experts: int, dtype: torch.dtype) -> None:
    assert routes_dtype(num_experts) == dtype
    ends = torch.tensor([-1, num_experts - 1])
    assert torch.equal(ends.to(dtype).long(), ends)


def test_padding_keeps_no_choice_apart_from_expert_zero() -> None:
    mine = [replace(rollout(0, 2, 1), routed_experts=torch.zeros(2, 1, 1, dtype=torch.int8))]
    batch = assemble(mine, torch.zeros(1), torch.zeros(1)).pad_columns(4).pad_rows(1)
    assert batch.routed_experts.dtype == torch.int8
    assert batch.routed_experts[:, :, 0, 0].tolist() == [[0, 0, -1, -1], [-1, -1, -1, -1]]
    assert batch.lengths.tolist() == [3, 0] and not batch.loss_mask[1].any()


def mean_of_unequal_counts(rank: int) -> dict[str, float]:
    return reduce_metrics({"x": (6.0, 1) if rank == 0 else (0.0, 3), "nothing": (0.0, 0)})


def test_means_are_of_global_sums(ranks: RankPool) -> None:
    assert ranks.run(2, mean_of_unequal_counts) == [{"x": 1.5, "nothing": 0.0}] * 2


@pytest.mark.parametrize(("dp", "mp", "count"), [(1, 1, 5), (2, 2, 8), (2, 4, 6), (4, 1, 4), (1, 4, 3)])
def test_shares_cover_every_prompt_once_in_rank_order(dp: int, mp: int, count: int) -> None:
    order = [i for d in range(dp) for m in range(mp) for i in Share(d, dp, m, mp).of(count)]
    assert order == list(range(count))


def crash(rank: int) -> None:
    if rank == 1:
        raise KeyError("ours")


@pytest.mark.slow
def test_the_pool_reports_a_crashed_rank_and_recovers(ranks: RankPool) -> None:
    with pytest.raises(RankError, match="KeyError: 'ours'"):
        ranks.run(2, crash)
    assert ranks.run(2, one_rank_fails, bad_rank=-1) == ["no error"] * 2
