"""Qwen3.5's forward pass aligned with the engine. (tests/policy/test_aligned.py has what all families share.)"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ais_megatron.models.registry import is_quantized_weight
from ais_megatron.quantization.formats import FP8_E4M3
from ais_megatron.quantization.fp8 import dequantize_block, quantize_block
from tests.helpers.policies import make_batch
from tests.helpers.ranks import RankPool
from tests.policy import test_aligned as aligned


@pytest.mark.parametrize(("world", "parallel"), [(1, {}), (2, {"tp": 2}), (2, {"pp": 2})], ids=["one", "TP2", "PP2"])
def test_sections_are_quantised_in_the_blocks_of_whole_tensors(ranks: RankPool, qwen35: Path, world: int, parallel: dict) -> None:
    """Q, K and V of the gated delta rule are sections of one matrix. A rank has rows of each, and a block may have rows of two."""
    fmt = FP8_E4M3.with_block(aligned.BLOCK)
    for weights in ranks.run(world, aligned.quantized_weights, path=qwen35, quantization="fp8_e4m3", parallel=parallel):
        for name, weight in load_file(qwen35 / "model.safetensors").items():
            expected = dequantize_block(*quantize_block(weight, fmt), fmt=fmt) if is_quantized_weight(name) else weight
            assert torch.equal(weights[name], expected), name


def test_gradients_of_an_aligned_pass_are_straight_through(ranks: RankPool, qwen35: Path) -> None:
    """With the weights alone: an input that differs in its last bit can be rounded to another value."""
    chosen, theirs = aligned.straight_through_reference(qwen35, replace(FP8_E4M3.with_block(aligned.BLOCK), group=0))
    logprobs, seen, _ = ranks.run(1, aligned.gradients, path=qwen35, precision="fp8_weights_aligned")[0]
    mask = make_batch().loss_mask[:, 1:]
    assert ((logprobs[:, 1:] - chosen) * mask).abs().max() < 2e-4
    for ours, name in (
        ("decoder.layers.0.self_attention.out_proj.weight", "model.layers.0.linear_attn.out_proj.weight"),
        ("decoder.layers.0.self_attention.conv1d.weight", "model.layers.0.linear_attn.conv1d.weight"),
        ("decoder.layers.3.self_attention.linear_proj.weight", "model.layers.3.self_attn.o_proj.weight"),
        ("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    ):
        assert (seen[ours] - theirs[name]).norm() < 1e-3 * theirs[name].norm(), name
    both = torch.cat([theirs[f"model.layers.2.linear_attn.in_proj_{part}.weight"] for part in ("qkv", "z")])
    assert (seen["decoder.layers.2.self_attention.in_proj.weight"] - both).norm() < 1e-3 * both.norm()


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({"precision": "fp8_aligned", "parallel": {"tp": 2}}, 5.0),  # measured: 11, and 2,700 in float32
        ({"precision": "fp8_aligned", "lora": 4}, 5.0),
        ({"precision": "fp8_weights_aligned"}, 1.5),  # inputs, K and V are still rounded by the engine alone
        ({"quantization": "int4"}, 100.0),
    ],
    ids=["TP2", "LoRA", "weights alone", "INT4"],
)
def test_the_mismatch_with_the_engine_falls(ranks: RankPool, qwen35: Path, options: dict[str, Any], times: float) -> None:
    options = {"parallel": {}, "kv": "fp8_e4m3"} | options
    plain, ours = ranks.run(options["parallel"].get("tp", 1), aligned.divergence, path=qwen35, **options)[0]
    assert plain > times * ours, (plain, ours)
