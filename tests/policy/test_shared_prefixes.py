"""Rows that begin alike, packed: what lies where, and the same log-probabilities, gradients and ranges as with whole rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ais_megatron.algorithm.scaler import LossScaler
from ais_megatron.batch import Batch
from tests.helpers.policies import LAYOUTS, make_batch, make_config, make_policy, weights_of
from tests.helpers.ranks import RankPool


def batch_of(*texts: str, scored_from: int = 1) -> Batch:
    """A letter per token."""
    lengths = torch.tensor([len(text) for text in texts])
    columns = torch.arange(int(lengths.max()))
    tokens = torch.tensor([[ord(letter) - 96 for letter in text.ljust(len(columns), "`")] for text in texts])
    mask = (columns < lengths[:, None]) & (columns >= scored_from)
    return Batch(tokens, mask, lengths, torch.zeros(mask.shape), torch.zeros(len(texts)), torch.zeros(len(texts)))


def letters(tokens: Tensor) -> str:
    return "".join(chr(token + 96) for token in tokens.tolist())


def test_tokens_with_which_rows_begin_alike_are_packed_once() -> None:
    from ais_megatron.policy.packing import pack

    batch = batch_of("abcde", "abh", "abcfg")
    packed = pack(batch, share=True)
    assert letters(packed.tokens[0]) == "abcde" + "fg" + "h"
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 3, 4, 2]
    assert int(packed.is_real.sum()) == 8
    for row, text in enumerate(["abcde", "abh", "abcfg"]):
        assert letters(packed.tokens[0, packed.places[row]])[: len(text)] == text


@pytest.mark.parametrize(
    "texts",
    [("abc",), ("abc", "abc"), ("ab", "abc", "abcd"), ("abcd", "abc"), ("a", "b"), ("abc", "abd", "xbc", "abc", "xbcdefgh")],
    ids=lambda texts: "-".join(texts),
)
@pytest.mark.parametrize("multiple", [1, 4])
def test_any_rows_are_found_again(texts: tuple[str, ...], multiple: int) -> None:
    from ais_megatron.policy.packing import pack

    packed = pack(batch_of(*texts), multiple, share=True)
    assert int(packed.is_real.sum()) == len({text[:end] for text in texts for end in range(1, len(text) + 1)}), "one token per beginning"
    assert packed.tokens.shape[1] % multiple == 0
    assert packed.tokens.shape[1] - int(packed.is_real.sum()) < multiple
    for row, text in enumerate(texts):
        places = packed.places[row, : len(text)]
        assert letters(packed.tokens[0, places]) == text
        assert packed.positions[places].tolist() == list(range(len(text)))


def test_attention_is_that_of_whole_rows() -> None:
    """Also for keys and values with fewer heads, and its gradient."""
    import torch.nn.functional as F

    from ais_megatron.policy.packing import pack

    texts = ("abcdefgh", "abcdxy", "abcdx", "q", "abcdefgz", "abcdxy")
    packed = pack(batch_of(*texts), 3, share=True)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(packed.tokens.shape[1], heads, 5, generator=generator, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2)
    )

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        mask = None if mask is None else mask.double()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)

    context = packed.packed.attend(attention, query, key, value)
    own, whole = [], []
    for row, text in enumerate(texts):
        places = packed.places[row, : len(text)]
        own.append(context[places])
        whole.append(attention(*(x[places].transpose(0, 1)[None] for x in (query, key, value)), None)[0].transpose(0, 1).flatten(1))
    own_rows, whole_rows = torch.cat(own), torch.cat(whole)
    torch.testing.assert_close(own_rows, whole_rows)
    for packed_gradient, gradient in zip(
        *(torch.autograd.grad(x.sin().sum(), (query, key, value), retain_graph=True) for x in (own_rows, whole_rows)), strict=True
    ):
        torch.testing.assert_close(packed_gradient, gradient)


def test_blocks_have_the_fewest_padded_queries() -> None:
    """Prompts of 4 tokens and responses of 6: the first row of each group has 10 tokens of its own, and the others have 6."""
    from ais_megatron.policy.packing import pack

    packed = pack(batch_of("aaaahhhhhh", "aaaaiiiiii", "aaaajjjjjj", "bbbbhhhhhh", "bbbbiiiiii"), share=True)
    assert [tuple(block.queries.shape) for block in packed.packed.blocks] == [(2, 10), (3, 6)]


def test_microbatches_keep_rows_that_begin_alike_together() -> None:
    from ais_megatron.policy.shared_prefixes import split_sharing

    batch = batch_of("aaab", "xxxc", "aaac", "xxxb", "aaad", "xxxd")
    assert [group.tolist() for group in split_sharing(batch, 6)] == [[0, 2, 4], [3, 1, 5]]
    assert [group.tolist() for group in split_sharing(batch, 5)] == [[0, 2], [4], [3, 1], [5]]
    assert [len(group) for group in split_sharing(batch, 1)] == [1] * 6, "a row that is too long gets its own microbatch"
    assert split_sharing(batch.rows(torch.zeros(0, dtype=torch.int64)), 5) == []
    same = batch_of(*["abcdefgh"] * 10)
    assert [len(group) for group in split_sharing(same, 8)] == [4, 4, 2], "not more than four times the budget in whole rows"


def grouped_batch() -> Batch:
    """Three prompts of different lengths with two responses each, of which one is rejected."""
    batch = make_batch()
    tokens = batch.tokens.clone()
    for first, length in ((0, 4), (2, 3), (4, 5)):
        tokens[first + 1, :length] = tokens[first, :length]
    mask = batch.loss_mask & (torch.arange(6) != 3)[:, None]
    return replace(batch, tokens=tokens, loss_mask=mask)


def passes(rank: int, path: Path, share: bool, recompute: str = "none", **layout: object):  # noqa: ANN201
    """Log-probabilities and calibration, and after a training step its metrics and all weights."""
    config = make_config(path, model={"recompute": recompute}, train={"share_prefixes": share}, ais={"coefficient": "product"}, **layout)
    policy = make_policy(config, path)
    assert policy.microbatches.shares == share
    batch = grouped_batch()  # on every data-parallel rank, so that ranks pack the same rows
    logprobs, calibration = policy.logprobs_and_calibration(batch)
    rows = replace(batch, rollout_logprobs=(logprobs - 0.2) * batch.loss_mask)
    metrics, *_, lagged, kept = policy.lagged_train_step(rows, LossScaler(alpha=0.5, aggregation="token"), keep_logprobs=True)
    scales = calibration.scales
    return logprobs, torch.stack([scales.q_amax, scales.k_amax, scales.v_amax]), kept, lagged.scales.k_amax, metrics, weights_of(policy)


@pytest.mark.parametrize("budget", [20, 10_000])
@pytest.mark.parametrize(("layout", "recompute"), [*((name, "none") for name in LAYOUTS), ("TP1", "full"), ("PP2", "full")])
def test_the_policy_computes_the_same_as_with_whole_rows(
    ranks: RankPool, checkpoint: Path, layout: str, recompute: str, budget: int
) -> None:
    world, tp, pp, sp = LAYOUTS[layout]
    expected = ranks.run(1, passes, path=checkpoint, share=False)[0]
    for found in ranks.run(world, passes, path=checkpoint, share=True, recompute=recompute, tp=tp, pp=pp, sp=sp, budget=budget):
        for ours, whole in zip(found[:4], expected[:4], strict=True):
            torch.testing.assert_close(ours, whole, rtol=1e-4, atol=2e-5)
        for name in ("loss", "entropy", "grad_norm"):
            assert found[4][name] == pytest.approx(expected[4][name], rel=1e-4, abs=1e-6), name
        for name, weight in expected[5].items():
            difference = (found[5][name] - weight).abs()
            assert difference.max() < 2e-4 and difference.mean() < 1e-6, name
