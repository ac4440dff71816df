"""Embedded engines of a few thousand random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from ais_megatron.batch import Prompt
from ais_megatron.config import Architecture, RolloutConfig
from ais_megatron.quantization.fp8 import quantize_bucket
from ais_megatron.rollout.local.engine import LocalEngine

EOS, LAYERS, VOCABULARY = 2, 2, 23
BF16 = {"quantization": "none"}
FP8 = {"quantization": "fp8_e4m3"}
DENSE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 40,
    "rope_theta": 1000.0,
}
# Of Qwen3.5: one layer with a gated delta rule, then one with attention.
RECURRENT = {
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.25,
}


class Engines:
    """Engines of one architecture, or of it with a few changes."""

    def __init__(self, architecture: dict[str, Any]) -> None:
        self._architecture = architecture

    def make(self, rollout: dict[str, Any] = BF16, dtype: torch.dtype = torch.float32, **changes: Any) -> LocalEngine:
        architecture = Architecture(**(self._architecture | changes))
        return LocalEngine(architecture, RolloutConfig(**rollout), eos_ids=(EOS,), pad_id=0, device="cpu", dtype=dtype)

    def weights(self, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> list[tuple[str, Tensor]]:
        """Random, peaked enough for the responses to differ in length, and tokens in their experts."""
        generator = torch.Generator().manual_seed(seed)
        engine = self.make(dtype=dtype, **changes)
        shapes, zero_centered = engine.state_tensors(), engine._architecture.family.zero_centered_norms

        def mean(name: str) -> float:
            return 0.0 if zero_centered and name.endswith("norm.weight") and "linear_attn" not in name else 1.0

        return [
            (name, ((mean(name) + 0.3 * r) if t.dim() == 1 else 0.25 * r).to(dtype))
            for name, t in shapes.items()
            for r in [torch.randn(t.shape, generator=generator)]
        ]

    def fitted(self, rollout: dict[str, Any] = BF16, dtype: torch.dtype = torch.float32, **changes: Any) -> LocalEngine:
        """With `weights` in it, quantised as `rollout` says."""
        engine, weights = self.make(rollout, dtype, **changes), self.weights(dtype, **changes)
        engine.update_weights([weights if rollout["quantization"] == "none" else quantize_bucket(weights)], 0)
        return engine


def make_prompts(lengths: list[int], start: int = 0) -> list[Prompt]:
    generator = torch.Generator().manual_seed(7)
    tokens = [tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()) for n in lengths]
    return [Prompt(start + i, "", ids, {}) for i, ids in enumerate(tokens)]


def reference_model(engine: LocalEngine) -> Qwen3ForCausalLM:
    """transformers' model with its own attention and cache, and the engine's weights."""
    settings = {k: v for k, v in DENSE.items() if k != "rope_theta"}
    rope = {"rope_type": "default", "rope_theta": DENSE["rope_theta"]}
    model = Qwen3ForCausalLM(Qwen3Config(**settings, rope_parameters=rope, attn_implementation="eager")).eval()
    model.load_state_dict(engine.state_tensors())
    return model


@torch.no_grad()
def reference_logprobs(model, rollout, temperature):
    """float32 ``[response]``, from one unpadded forward pass."""
    prompt = rollout.prompt.token_ids
    logits = model(torch.tensor([prompt + rollout.token_ids])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
