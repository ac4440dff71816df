"""Configurations for SGLang servers on the CPU, and what a running one is known by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ais_megatron.config import Architecture, Config, build_config
from ais_megatron.rollout.sglang.server import SGLangServer
from tests.helpers.paths import ROOT

SGLANG_PYTHON = ROOT / ".venv-sglang" / "bin" / "python"
STARTUP_S = 300.0
AFRESH = {"SGLANG_CPU_SHIM_START_AFRESH": "1"}  # `env` of a server that starts its processes as on GPUs (shim/sglang_cpu_shim/start.py)

# The smallest sizes whose merged weights (Q, K, V; gate, up) hold whole 128-blocks.
DENSE = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=512,
)
MOE = DENSE | dict(model_type="qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128)
LLAMA = DENSE | dict(model_type="llama", rope_scaling=dict(original_max_position_embeddings=64), tie_word_embeddings=True)
QWEN35 = DENSE | dict(
    model_type="qwen3_5",
    partial_rotary_factor=0.25,
    full_attention_interval=2,  # the second layer has attention
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=64,
    linear_value_head_dim=32,
    linear_conv_kernel_dim=4,
)
ARCHITECTURES = {"dense": DENSE, "moe": MOE, "llama": LLAMA, "qwen2": DENSE | dict(model_type="qwen2"), "qwen3_5": QWEN35}


def sglang_config(kind: str = "dense", quantization: str = "fp8", rollout: dict[str, Any] | None = None, **sglang: Any) -> Config:
    """A config for one server on the CPU. kind: of `ARCHITECTURES`; quantization: "fp8" or "bf16", of weights and KV cache."""
    settings = dict(python=str(SGLANG_PYTHON), device="cpu", startup_timeout_s=STARTUP_S) | sglang
    section = dict(engine="sglang", quantization=quantization, return_routed_experts=kind == "moe", sglang=settings) | (rollout or {})
    return build_config(dict(model=dict(architecture=ARCHITECTURES[kind]), rollout=section))


@dataclass(frozen=True)
class RunningServer:
    """A real server with dummy weights, or with what an earlier test pushed. It wants `key` with every request."""

    url: str
    key: str
    config: Config
    architecture: Architecture
    server: SGLangServer
