"""A tiny LLaDA checkpoint, and what transformers' Llama model without its causal mask computes with it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ais_megatron.batch import Batch
from ais_megatron.config import Architecture
from ais_megatron.config.hf_config import hf_config
from ais_megatron.models.family import names_of_twin, tensors_of
from tests.helpers import checkpoints
from tests.helpers.policies import make_batch

MASK = 70
SIZES = checkpoints.SIZES | dict(model_type="llada", num_key_value_heads=4, head_dim=16, rope_theta=500.0, mask_token_id=MASK)


def make_llada(folder: Path, scale: float = 0.15) -> Path:
    """A float32 checkpoint under LLaDA's names, with random weights."""
    architecture, generator = Architecture(**SIZES), torch.Generator().manual_seed(0)
    weights = {
        name: (1.0 if len(shape) == 1 else 0.0) + scale * torch.randn(shape, generator=generator)
        for name, shape, _ in tensors_of(architecture)
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(hf_config(architecture, "fp32")))
    return folder


def reference_model(folder: Path) -> LlamaForCausalLM:
    """Llama with the weights of a LLaDA checkpoint."""
    a = Architecture(**SIZES)
    sizes = {key: SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    rope = {"rope_type": "default", "rope_theta": a.rope_theta}
    config = LlamaConfig(**sizes, num_key_value_heads=4, rms_norm_eps=a.rms_norm_eps, rope_parameters=rope, attn_implementation="eager")
    model = LlamaForCausalLM(config).eval()
    stored, names = load_file(folder / "model.safetensors"), names_of_twin(a)
    model.load_state_dict({twin: stored[name] for twin, name in names.items()})
    return model


@torch.no_grad()
def reference_logits(folder: Path, tokens: Tensor, lengths: Tensor) -> Tensor:
    """float32 ``[batch, seq, vocab]``, each row by itself and without padding. An additive mask of zeros lets all tokens see all."""
    model, logits = reference_model(folder), torch.zeros(*tokens.shape, SIZES["vocab_size"])
    for row, length in enumerate(lengths.tolist()):
        everything = torch.zeros(1, 1, length, length)
        logits[row, :length] = model(tokens[row : row + 1, :length], attention_mask=everything).logits[0]
    return logits


def masked_batch() -> Batch:
    """`make_batch`, in which the model reads a mask in place of two thirds of the scored tokens, and of some of the others."""
    batch = make_batch()
    hidden = torch.rand(batch.tokens.shape, generator=torch.Generator().manual_seed(2)) < torch.where(batch.loss_mask, 0.7, 0.2)
    hidden &= torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
    return replace(batch, inputs=batch.tokens.masked_fill(hidden, MASK), loss_mask=batch.loss_mask & hidden)
