"""Packed rows: what lies where, also on context-parallel ranks, and the same figures as with padded rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ais_megatron.policy.microbatches import split_evenly
from ais_megatron.shapes import Shapes
from tests.helpers.ranks import RankPool
from tests.helpers.updates import assert_same, one_update
from tests.policy.test_shared_prefixes import batch_of, letters

TEXTS = ("abcdefghijk", "lmn", "opqrstu", "v", "wxyzab")


def test_rows_lie_one_after_the_other() -> None:
    from ais_megatron.policy.packing import pack

    packed = pack(batch_of("abcde", "fgh", "ijk"), 4)
    assert letters(packed.tokens[0]) == "abcdefghijk`"
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 0]
    assert packed.is_real.tolist() == [True] * 11 + [False]
    assert [packed.places[row, : len(text)].tolist() for row, text in enumerate(["abcde", "fgh", "ijk"])] == [
        [0, 1, 2, 3, 4],
        [5, 6, 7],
        [8, 9, 10],
    ]


def test_context_parallel_ranks_have_the_outer_and_the_inner_chunks() -> None:
    """Rows are padded to a multiple of 4, and the whole to 2 x 4. The last row, with its padding, is cut into chunks of 2."""
    from ais_megatron.policy.packing import pack
    from ais_megatron.policy.parallel import Context

    parts = [pack(batch_of("abcdefgh", "ijk", "lmno"), 4, Context(rank, 2)) for rank in range(2)]
    assert [letters(part.tokens[0]) for part in parts] == ["abgh" + "i`" + "lo", "cdef" + "jk" + "mn"]
    assert [part.positions[:4].tolist() for part in parts] == [[0, 1, 6, 7], [2, 3, 4, 5]]


@pytest.mark.parametrize("multiple", [1, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_every_token_is_on_one_rank_and_found_there(ranks: int, multiple: int) -> None:
    from ais_megatron.policy.arranged import padded
    from ais_megatron.policy.packing import pack
    from ais_megatron.policy.parallel import Context

    batch = batch_of(*TEXTS)
    width = Shapes(columns=2 * ranks)
    for parts in (
        [pack(batch, multiple, Context(rank, ranks)) for rank in range(ranks)],
        [padded(batch, width, Context(rank, ranks)) for rank in range(ranks)],
    ):
        assert len({part.tokens.shape for part in parts}) == 1 and len(parts[0].sources) % multiple * (parts[0].packed is not None) == 0
        everywhere = torch.cat([part.tokens.t().flatten() for part in parts])
        for row, text in enumerate(TEXTS):
            assert letters(everywhere[parts[0].places[row, : len(text)]]) == text
        real = torch.cat([part.sources[part.is_real] for part in parts])
        assert sorted(real.tolist()) == [row * 11 + column for row, text in enumerate(TEXTS) for column in range(len(text))]
        rows, columns = (torch.arange(11) < batch.lengths[:, None]).nonzero().unbind(1)
        found = [part.on_this_rank(rows, columns) for part in parts]
        assert sorted(torch.cat([here for here, _ in found]).tolist()) == list(range(len(rows)))
        for part, (here, places) in zip(parts, found, strict=True):
            assert torch.equal(part.sources[places], rows[here] * 11 + columns[here])
            assert torch.equal(part.of_places(batch.tokens)[places], batch.tokens[rows[here], columns[here]])


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_attention_is_that_of_whole_rows(monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    """Every rank has the attention of its own tokens, from the keys and values of all."""
    from ais_megatron.policy import packing
    from ais_megatron.policy.parallel import Context

    batch = batch_of(*TEXTS)
    parts = [packing.pack(batch, 3, Context(rank, ranks)) for rank in range(ranks)]
    local, generator = len(parts[0].sources), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(ranks * local, heads, 5, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    monkeypatch.setattr(packing, "gather_from_sequence_parallel_region", lambda own, **_: torch.cat([key, value], -1))

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        mask = None if mask is None else mask.double()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)

    own = [slice(rank * local, (rank + 1) * local) for rank in range(ranks)]
    context = torch.cat([part.packed.attend(attention, query[s], key[s], value[s]) for part, s in zip(parts, own, strict=True)])
    for row, text in enumerate(TEXTS):
        places = parts[0].places[row, : len(text)]
        whole = attention(*(x[places].transpose(0, 1)[None] for x in (query, key, value)), None)[0].transpose(0, 1).flatten(1)
        torch.testing.assert_close(context[places], whole)


def test_a_microbatch_without_rows_is_padding() -> None:
    from ais_megatron.policy.packing import pack

    packed = pack(batch_of("abc").rows(torch.zeros(0, dtype=torch.int64)), 4)
    assert packed.tokens.shape == (1, 4) and not packed.is_real.any()
    query = torch.randn(4, 2, 3)
    assert torch.equal(packed.packed.attend(lambda *_: query[:0], query, query, query), query.flatten(1))


def test_transformer_engine_gets_the_limits_of_rows() -> None:
    from ais_megatron.policy.packing import pack
    from ais_megatron.policy.parallel import Context

    limits = pack(batch_of("abcde", "fgh", "ijk"), 4, thd=True).packed
    assert limits.qkv_format == "thd" and limits.cu_seqlens_q.tolist() == limits.cu_seqlens_kv.tolist() == [0, 5, 8, 12]
    assert limits.cu_seqlens_q.dtype == torch.int32 and limits.max_seqlen_q == limits.max_seqlen_kv == 128
    # Whole rows of all ranks, each a multiple of 2 x 2 tokens.
    assert pack(batch_of("abcde", "fgh"), 1, Context(1, 2), thd=True).packed.cu_seqlens_q.tolist() == [0, 8, 12]
    many = pack(batch_of("a" * 100, "b" * 28), 1, thd=True)
    assert many.tokens.shape[1] == 128 and many.packed.max_seqlen_q == 256, "not the number of all tokens"


def test_microbatches_are_full_and_even() -> None:
    lengths = torch.tensor([7, 1, 5, 3, 6, 2])

    def split(lengths: Tensor, budget: int, at_least: int = 1, power: int = 1) -> list[list[int]]:
        return [group.tolist() for group in split_evenly(lengths, lengths.double() ** power, budget, at_least)]

    assert split(lengths, 12) == [[0, 3, 5], [1, 2, 4]]
    assert [int(lengths[group].sum()) for group in split(lengths, 8)] == [8, 8, 8]
    assert split(torch.tensor([9, 2, 2]), 5) == [[0], [1, 2]], "a row that is too long is alone"
    assert len(split(lengths, 100, at_least=4)) == 4 and len(split(lengths, 100, at_least=9)) == 6
    assert split(lengths[:0], 5) == []
    # Squares: 36 and 9 + 9 + 4 + 4, then there is room only beside the 6.
    assert split(torch.tensor([6, 3, 3, 2, 2, 2]), 10, power=2) == [[0, 5], [1, 2, 3, 4]]


DENSE = {
    "one": (1, {}, {}),
    "TP2+SP": (2, {"tp": 2, "sequence_parallel": True}, {}),
    "PP2": (2, {"pp": 2}, {}),
    "DP2": (2, {}, {}),
    "recomputed": (1, {}, {"recompute": "full"}),
    "LoRA": (2, {"tp": 2, "sequence_parallel": True}, {"policy": {"lora": {"rank": 4}}}),
    "aligned": (2, {"tp": 2}, {"policy": {"forward_precision": "fp8_aligned"}}),
}
EXPERTS = {
    "one": (1, {}, {}),
    "DP2+EP2": (2, {"ep": 2}, {}),
    "TP2+EP2": (2, {"tp": 2, "sequence_parallel": True, "ep": 2}, {}),
    "recomputed": (1, {}, {"recompute": "full"}),
}


@pytest.mark.parametrize(("kind", "layout"), [("dense", name) for name in DENSE] + [("moe", name) for name in EXPERTS])
def test_packing_changes_no_figure(ranks: RankPool, untied_checkpoint: Path, moe_checkpoint: Path, kind: str, layout: str) -> None:
    """Log-probabilities, gradients, metrics, ranges of Q, K and V, the experts' balance and the replayed routes."""
    world, parallel, options = (DENSE if kind == "dense" else EXPERTS)[layout]
    arguments = dict(path=untied_checkpoint if kind == "dense" else moe_checkpoint, parallel=parallel, is_moe=kind == "moe", **options)
    padded, packed = (ranks.run(world, one_update, packing=packing, **arguments) for packing in (False, True))
    for one, other in zip(padded, packed, strict=True):
        assert all(rows == 1 for rows, _ in other["met"]) and max(rows for rows, _ in one["met"]) > 1
    for one, other in zip(padded, packed, strict=True):
        assert one["work"]["computed_over_real_tokens"] > 1.03 * other["work"]["computed_over_real_tokens"] >= 1.03
        assert 1.0 <= other["work"]["microbatch_work_max_over_mean"] < 1.4
        assert 1.0 <= one["work"]["rank_work_max_over_mean"] == other["work"]["rank_work_max_over_mean"] < 1.4
    # A difference in the last bit moves some inputs of an aligned layer to another value of FP8.
    assert_same(padded, packed, tolerance=1e-4 if layout == "aligned" else 1e-6)
