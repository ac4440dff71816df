"""A Qwen3-8B-shaped, Qwen3-0.6B-shaped or tiny model for the benchmarks: its configuration, random weights on disk, a batch, a `Policy`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from bench import Bench

from ais_megatron.batch import Batch
from ais_megatron.config import Config, ModelConfig, build_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ais_megatron.policy.policy import Policy

QWEN3_8B = dict(
    vocab_size=151_936,
    hidden_size=4096,
    intermediate_size=12_288,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
)
QWEN3_0_6B = dict(
    vocab_size=151_936,
    hidden_size=1024,
    intermediate_size=3072,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=40_960,
    tie_word_embeddings=True,
)
TINY = dict(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
)


def layers_of(bench: Bench) -> dict[str, str]:
    """For the section `model`: Megatron's own layers where Transformer Engine is missing, because run.backend=cuda insists on it."""
    if not bench.on_gpu or find_spec("transformer_engine") is not None:
        return {}
    bench.skip("Transformer Engine's layers", "it is not installed; the policy has Megatron's local layers with torch's attention")
    return {"transformer_impl": "local"} if "transformer_impl" in ModelConfig.model_fields else {}


def make_config(bench: Bench, layers: int, shape: Mapping[str, object] = QWEN3_8B, **sections: Mapping[str, object]) -> Config:
    """One rank, BF16; `shape`, or with --tiny a tiny one, with `layers` layers; `sections` are merged into it."""
    architecture = {**(TINY if bench.tiny else shape), "num_hidden_layers": 2 if bench.tiny else layers}
    data: dict[str, dict[str, object]] = {
        "run": {"backend": bench.device.type},
        "model": {"architecture": architecture, **layers_of(bench)},
        "rollout": {"prompts_per_step": 1, "group_size": 8, "max_response_tokens": 16 if bench.tiny else 2048},
        "train": {"tokens_per_microbatch": 8192, "optimizer": {"lr": 1e-6}},
    }
    for name, section in sections.items():
        data[name] = {**data.get(name, {}), **section}
    return build_config(data)


def save_random_model(config: Config, folder: Path) -> PreTrainedModel:
    """transformers' model with random BF16 weights, on the device, after its Hugging Face folder is written."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from ais_megatron.config.hf_config import hf_config

    content = hf_config(config.architecture, "bf16")
    with torch.device("cuda" if config.run.backend == "cuda" else "cpu"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**content), dtype=torch.bfloat16, attn_implementation="sdpa")
    model.save_pretrained(folder)
    return model.eval()


def make_policy(config: Config, folder: Path | None) -> Policy:
    """Joins (or makes) the job of one rank first."""
    from ais_megatron.distributed import init_process_group
    from ais_megatron.policy.parallel import initialize_parallel
    from ais_megatron.policy.policy import Policy

    init_process_group(config.run.backend)
    initialize_parallel(config)
    return Policy(config, config.train.optimizer, 1000, 1.0, None if folder is None else str(folder))


def batch_of(config: Config, rows: int, length: int) -> Batch:
    """Random tokens, all of a row but its first counted."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, length, dtype=torch.bool)
    mask[:, 0] = False
    return Batch(
        tokens=torch.randint(0, config.architecture.vocab_size, (rows, length), generator=generator),
        loss_mask=mask,
        lengths=torch.full((rows,), length),
        rollout_logprobs=torch.zeros(rows, length),
        advantages=torch.randn(rows, generator=generator),
        rewards=torch.zeros(rows),
    )
