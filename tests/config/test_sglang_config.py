"""Combinations that SGLang would refuse at start, or accept and get wrong."""

import pytest

from ais_megatron.config import ConfigError, build_config
from ais_megatron.config.sglang import SGLangConfig
from tests.helpers.sglang import DENSE, MOE, sglang_config


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        (DENSE | dict(intermediate_size=192), "intermediate_size / tp = 192 / 1"),
        (DENSE | dict(num_key_value_heads=2), "KV heads of a shard * head_dim = 2 * 32 = 64"),
        (MOE | dict(moe_intermediate_size=64), "moe_intermediate_size / (tp / ep) = 64 / 1"),
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


def test_the_other_ranks_wait_as_long_as_the_servers_may_take():
    with pytest.raises(ConfigError, match=r"startup_timeout_s=4000: must be shorter than run.timeout_minutes=60"):
        sglang_config(startup_timeout_s=4000.0)
    default = sglang_config(startup_timeout_s=SGLangConfig().startup_timeout_s)
    assert default.rollout.sglang.startup_timeout_s == 3000 > 20 * 60, "DeepGEMM kernels take 10-20 minutes on a cold cache"


@pytest.mark.parametrize(
    ("settings", "transport"),
    [
        ({}, "tensor"),
        (dict(host="0.0.0.0", key_file="k"), "distributed"),
        (dict(servers=["http://localhost:1", "http://[::1]:2"]), "tensor"),
        (dict(servers=["http://localhost:1", "http://node2:2"]), "distributed"),
        (dict(servers=["http://node2:2"], transport="disk"), "disk"),
        (dict(device="cuda", transport="cuda_ipc"), "cuda_ipc"),
    ],
)
def test_what_the_automatic_transport_stands_for(settings, transport):
    assert sglang_config(**settings).rollout.sglang.resolved_transport == transport


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({}, "device=cpu"),
        (dict(device="cuda", servers=["http://127.0.0.1:1"]), r"servers=\['http://127.0.0.1:1'\]"),
        (dict(device="cuda", host="0.0.0.0", key_file="k"), "host=0.0.0.0"),
    ],
)
def test_memory_of_gpus_is_opened_only_by_own_servers_on_this_host(settings, wrong):
    with pytest.raises(ConfigError, match=f"transport=cuda_ipc: not possible with {wrong}; .* Set transport=auto"):
        sglang_config(transport="cuda_ipc", **settings)
