"""The plan of a masked diffusion model: bytes of a real embedded engine, and numbers by hand."""

from __future__ import annotations

import pytest

from ais_megatron.config import Config, build_config, load_config
from ais_megatron.planning.batches import Microbatching, batch_memory, gathered_memory, microbatching
from ais_megatron.planning.cost import Assumptions, forward_flops, servers_of, step_time
from ais_megatron.planning.diffusion import generation_flops, passes, sampler_bytes
from ais_megatron.planning.engine import engine_bytes, kv_bytes_per_token
from ais_megatron.planning.parameters import total_parameters
from ais_megatron.planning.plan import make_plan, suggest, with_gpus
from tests.helpers.allocation import allocated_peak
from tests.helpers.paths import ROOT

LLADA = ROOT / "configs" / "llada_8b_ais.yaml"
QUANTISED = 32 * (4 * 4096 * 4096 + 3 * 4096 * 12288)
LAYERS, VOCABULARY = QUANTISED + 32 * 2 * 4096, 126464

PROMPT = 40
ARCHITECTURE = dict(
    model_type="llada",
    vocab_size=500,
    mask_token_id=499,
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=64,  # hidden_size / num_attention_heads
    max_position_embeddings=512,
)


def make_config(architecture: dict, quantization: str, dtype: str = "bf16", **diffusion: object) -> Config:
    return build_config(
        {
            "run": {"backend": "cpu"},
            "model": {"architecture": ARCHITECTURE | architecture, "dtype": dtype},
            "parallel": {"dp": 1},
            "rollout": {"quantization": quantization, "prompts_per_step": 2, "group_size": 4, "max_response_tokens": 64},
            "diffusion": {"block_length": 16, "steps": 8, **diffusion},
        }
    )


# The worst moment is in a layer, in the sampler, or while responses are scored.
ENGINES = {
    "BF16, layer": ({}, "none", {}),
    "float32, layer": ({}, "none", {"dtype": "fp32"}),
    "FP8, layer": ({}, "fp8_e4m3", {}),
    "FP8, attention": ({"intermediate_size": 128}, "fp8_e4m3", {}),
    "FP8, sampler": ({"vocab_size": 20000}, "fp8_e4m3", {}),
    "FP8, random remasking": ({"vocab_size": 20000}, "fp8_e4m3", {"remasking": "random"}),
    "FP8, scores": ({"vocab_size": 20000}, "fp8_e4m3", {"block_length": 1, "steps": 64}),
    "BF16, sampler": ({"vocab_size": 20000}, "none", {}),
}


@pytest.mark.parametrize("name", ENGINES)
def test_memory_of_a_real_engine(name: str) -> None:
    import torch

    from ais_megatron.batch import Prompt
    from ais_megatron.rollout.engine import SamplingParams
    from ais_megatron.rollout.local.engine import LocalEngine
    from ais_megatron.session import denoising

    architecture, quantization, options = ENGINES[name]
    config = make_config(architecture, quantization, **options)  # type: ignore[arg-type]
    a, rollout = config.architecture, config.rollout
    dtype = torch.bfloat16 if config.model.dtype == "bf16" else torch.float32
    engine = LocalEngine(a, rollout, eos_ids=(1,), pad_id=0, device="cpu", dtype=dtype)
    for tensor in engine.state_tensors().values():
        tensor.fill_(0.01) if tensor.dtype.itemsize > 1 else tensor.copy_(torch.ones(1).to(tensor.dtype))
    for module in engine._model.causal_lm.modules():
        if hasattr(module, "refresh"):
            module.refresh()
    engine._version = 0
    prompts = [Prompt(i, "", (3,) * PROMPT, {}) for i in range(2)]
    sampling = SamplingParams(
        num_samples=rollout.group_size,
        max_tokens=rollout.max_response_tokens,
        temperature=1.0,
        seed=1,
        denoising=denoising(config, config.rows_per_response),
    )
    real = allocated_peak(lambda: engine.generate(prompts, sampling))
    planned = sampler_bytes(config, 8, PROMPT, rollout.max_response_tokens, cuda=False)
    print(f"{name}: {planned:,} planned, {real:,} real, {planned / real - 1:+.1%}")
    assert abs(planned - real) < 0.03 * real


def llada_8b(*overrides: str) -> Config:
    return with_gpus(load_config(LLADA, overrides), 8)


def test_each_mask_of_a_response_makes_a_row() -> None:
    """96 responses with twelve masks in twelve updates: 48 rows for each of two ranks in an update, four of 512 tokens at a time."""
    config = llada_8b()
    assert microbatching(config, 512, cuda=True) == Microbatching(count=12, rows=4, width=512, computed=48)
    assert microbatching(llada_8b("diffusion.masks=1"), 512, cuda=True).computed == 4
    trajectory = llada_8b("diffusion.masks=1", "diffusion.likelihood=trajectory", "diffusion.states=6")
    assert microbatching(trajectory, 512, cuda=True).computed == 24
    # Tokens and what is read take 8 bytes each on the device. While ranks exchange responses, they take 4.
    assert batch_memory(config, 100) == 100 * (8 + 8 + 1 + 4 + 8)
    own = 12 * 12 * 512  # tokens of a rank's 12 responses
    assert gathered_memory(config, 512) == (4 * own + own) * (4 + 4 + 4 + 1)


def test_llada_8b_by_hand() -> None:
    config = llada_8b()
    assert total_parameters(config.architecture) == LAYERS + 2 * VOCABULARY * 4096 + 4096
    blocks = QUANTISED // 128**2
    assert engine_bytes(config) == 5 * QUANTISED + 4 * blocks + 2 * (total_parameters(config.architecture) - QUANTISED)
    assert kv_bytes_per_token(config) == 0
    plan = make_plan(config, Assumptions())
    (memory,) = plan.ranks
    # In a layer of 12 canvases of 512 tokens: embeddings, input, normed input in BF16 and FP32, residual, tables of the rotary embedding,
    # and an input of 12288 columns that is quantised. The logits of 32 tokens of the
    # last step still exist, and those of the 2 tokens that it revealed once more.
    inputs = 6144 * (4096 * (4 * 2 + 4) + 2 * 2 * 128 + 12288 * (2 + 16))
    assert memory.sampler == inputs + 8 * 12 * VOCABULARY * (32 + 2)
    assert memory.kv_cache == 0 and memory.allocated["generate"] == memory.lasting + memory.sampler
    assert plan.problems == []
    wide = make_plan(llada_8b("rollout.max_batch=256", "rollout.prompts_per_step=64", "rollout.group_size=36"), Assumptions()).problems
    assert "phase generate" in wide[0] and wide[0].endswith(
        "Lower rollout.max_batch, rollout.max_response_tokens or diffusion.block_length"
    )


def test_flops_of_whole_canvases_by_hand() -> None:
    """128 passes sample and twelve score. The head reads blocks of 32 tokens, and then all 256. Attention computes whole squares."""
    config = llada_8b()
    assert passes(config) == 140
    flops = generation_flops(config, 256, LAYERS)
    assert flops.layers == 140 * 512 * 2 * LAYERS
    assert flops.rest == 140 * 32 * 4 * 4096 * 512**2 + 2 * VOCABULARY * 4096 * (128 * 32 + 12 * 256)
    assert forward_flops(config.architecture, 3, 100) == 3 * 100 * (2 * (LAYERS + VOCABULARY * 4096) + 4 * 32 * 4096 * 100)


def test_seconds_of_sampling_and_of_all_rows() -> None:
    assumed = Assumptions(response_tokens=100)
    config, bf16 = llada_8b(), llada_8b("rollout.quantization=none")
    servers = servers_of(config, assumed)
    assert (servers.engines, servers.concurrency) == (8, 12)
    flops, speed = generation_flops(config, 256, LAYERS), 989e12 * 0.4
    latency = 140 * 32 * 20e-6
    # Quantised weights are multiplied in FP32, without tensor cores.
    assert step_time(config, assumed).generate == pytest.approx(latency + 12 * (flops.layers * 989 / 67 + flops.rest) / speed)
    time = step_time(bf16, assumed)
    assert time.generate == pytest.approx(latency + 12 * sum(flops) / speed)
    assert time.tokens_per_second == pytest.approx(96 * 100 / time.total), "a canvas is read whole, but only the response counts"
    assert time.train == pytest.approx(12 * step_time(llada_8b("train.updates_per_batch=1", "diffusion.masks=1"), assumed).train, rel=0.05)
    alone = llada_8b("rollout.max_batch=1", "rollout.quantization=none")
    small = Assumptions(prompt_tokens=1, latency_us=0.0, peak_tflops=1e6)
    assert step_time(alone, small).generate == pytest.approx(12 * 140 * 2 * total_parameters(alone.architecture) / (3350e9 * 0.6))


def test_shipped_layout_fits_also_with_lora() -> None:
    lora = llada_8b("policy.lora.rank=128", "sft.steps=1")  # stands for the pretrained weights that LoRA needs
    whole, small = (make_plan(config, Assumptions()) for config in (llada_8b(), lora))
    assert whole.problems == small.problems == []
    a, tp = 4096, 4
    factors = 32 * 128 * (3 * (a + a // tp) + (a // tp + a) + 2 * (a + 12288 // tp) + (12288 // tp + a))
    assert small.ranks[0].gradients == 4 * factors and small.ranks[0].engine_weights == whole.ranks[0].engine_weights
    assert small.sync == whole.sync, "factors are merged before a sync"
    assert suggest(whole.config, Assumptions(), 8)
