"""Microbatches: every row once, within the budget, cut to their longest row."""

from __future__ import annotations

import torch

from ais_megatron.policy.microbatches import idle_microbatch, make_microbatches, pad_columns, split_by_tokens
from tests.test_policy import make_batch


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
    for rows, index in make_microbatches(batch, budget=40, multiple=4):
        width = rows.tokens.shape[1]
        assert width % 4 == 0 and width - int(rows.lengths.max()) < 4
        assert torch.equal(rows.tokens, batch.tokens[index, :width])
        assert int(rows.loss_mask.sum()) == int(batch.loss_mask[index].sum())


def test_an_idle_microbatch_counts_for_nothing() -> None:
    rows, _ = idle_microbatch(make_batch(), 2)
    assert rows.tokens.shape == (1, 2) and not rows.loss_mask.any() and rows.lengths.tolist() == [0]
