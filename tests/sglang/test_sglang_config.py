"""Combinations that SGLang would refuse at start, or accept and get wrong."""

import pytest

from ais_megatron.config import ConfigError, build_config
from ais_megatron.sglang_config import shard_problems
from tests.sglang.conftest import DENSE, MOE, sglang_config


def test_shards_hold_whole_blocks():
    assert shard_problems(2, {"a": 768}) == []
    assert "use one of [1, 2, 3, 6]" in shard_problems(4, {"a": 768})[0]
    assert shard_problems(1, {"a": 192})[0].startswith("a=192: SGLang merges such weights and then needs a multiple of the FP8 block 128")


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        (DENSE | dict(intermediate_size=192), "intermediate_size=192"),
        (DENSE | dict(num_key_value_heads=2), "num_key_value_heads * head_dim=64"),
        (MOE | dict(moe_intermediate_size=64), "moe_intermediate_size=64"),
    ],
)
def test_merged_weights_need_whole_blocks_even_unsharded(architecture, key):
    settings = dict(model=dict(architecture=architecture), rollout=dict(engine="sglang", quantization="fp8"))
    with pytest.raises(ConfigError) as caught:
        build_config(settings)
    assert key in str(caught.value)
    build_config(settings | dict(rollout=dict(engine="sglang", quantization="none")))


def test_kv_heads_that_are_copied_are_not_cut():
    heads = DENSE | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=128, intermediate_size=512)
    build_config(dict(model=dict(architecture=heads), rollout=dict(engine="sglang", quantization="fp8", sglang=dict(tp=4))))


def test_backends_that_would_keep_the_first_kv_scales():
    with pytest.raises(ConfigError, match="attention_backend=triton: its CUDA graphs"):
        sglang_config(device="cuda", attention_backend="triton")
    sglang_config(device="cuda", attention_backend="triton", extra_args=["--disable-cuda-graph"])
    sglang_config(device="cuda", attention_backend="triton", rollout=dict(kv_cache="bf16"))
    sglang_config(device="cuda", attention_backend="fa3")
