"""Tiny checkpoints of transformers' models, with weights far from their initial values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZES: dict[str, Any] = dict(
    vocab_size=71,  # a prime: TP has to pad it
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
"""Of a model of any family. Some families also want a head_dim, of 16. `make_batch` of `policies` has tokens for it."""


def write_checkpoint(
    folder: Path, model_class: type[PreTrainedModel], noise: Callable[[str], float] = lambda name: 0.05, **settings: Any
) -> Path:
    """A float32 model of `SIZES`, or of `settings` where they differ. noise: the scale of what is added to a parameter, by its name."""
    import torch

    torch.manual_seed(0)
    model = model_class(model_class.config_class(**SIZES | settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn_like(parameter) * noise(name))
    model.save_pretrained(folder)
    return folder
