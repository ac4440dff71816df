"""What one table says about a model family: every weight of a layer, and the few things in which families differ.

Nothing here imports torch or Megatron. A shape is written in the names of an architecture's sizes ("query_size",
"hidden_size"), so a table holds for every size of model. Planner, manifest, embedded engine, SGLang plugin, import and export
all read the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple, Protocol


class Weight(NamedTuple):
    """One Hugging Face tensor, and where its values live in Megatron."""

    name: str
    """Hugging Face name. In a layer's table it is what follows ``model.layers.N.``; ``{expert}`` stands for an expert's number."""
    shape: tuple[str, ...]
    """Names of sizes, such as ``("query_size", "hidden_size")``."""
    tp_dim: int | None
    """The dimension that tensor parallelism cuts; None: every rank holds all of it."""
    megatron: str
    """Megatron's parameter, as its name continues after ``decoder.layers.N.``. Rows of one table that name the same parameter are its
    parts, in order: three are Q, K and V, interleaved by KV group; two are stacked. ``{slot}`` numbers a rank's own experts."""
    transformer_engine: str | None = None
    """Its name where layers are Transformer Engine's; None: the same."""
    quantized: bool = False
    """Whether FP8 and FP4 rollouts quantise it."""


class Sizes(Protocol):
    """What a table needs to know of an architecture; `config.Architecture` is one."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def family(self) -> Family: ...


class Tensor(NamedTuple):
    """One tensor of one model."""

    name: str
    shape: tuple[int, ...]
    quantized: bool


@dataclass(frozen=True)
class Family:
    """A model family. The one table that a new family is made of."""

    model_type: str
    """As in config.json."""
    hf_class: str
    """transformers' causal language model, as ``architectures`` in config.json names it. Its configuration's class is the same name
    with ``Config`` in place of ``ForCausalLM``."""
    layer: tuple[Weight, ...]
    """Everything in one layer but its experts, in the order in which it is exported."""
    sglang_attention: str
    """SGLang's class that owns a layer's attention; the plugin gives it KV scales."""
    experts: tuple[Weight, ...] = ()
    """Of one expert; empty in a dense family."""
    qk_norm: bool = False
    """Q and K go through a norm of their own, per head, before they are rotated."""
    qkv_bias: bool = False
    rope_theta: float = 10_000.0
    """What transformers assumes where config.json says nothing."""
    rope_types: tuple[str, ...] = ("default",)
    """Kinds of rotary embedding that the family's checkpoints may ask for: default, llama3."""
    fixed: Mapping[str, object] = field(default_factory=lambda: {"hidden_act": "silu"})
    """Keys of config.json that must have this value where they stand in a checkpoint, and that an export writes."""
    takes_mask_by_kind: bool = False
    """transformers' model takes attention masks in a mapping by the kind of layer."""
    sglang_keeps_tied_head: bool = False
    """SGLang gives the model a head of its own even where it is tied to the embedding."""

    @property
    def is_moe(self) -> bool:
        return bool(self.experts)


EMBEDDING, FINAL_NORM, HEAD = (
    Weight("model.embed_tokens.weight", ("vocab_size", "hidden_size"), 0, "embedding.word_embeddings.weight"),
    Weight("model.norm.weight", ("hidden_size",), None, "decoder.final_layernorm.weight"),
    Weight("lm_head.weight", ("vocab_size", "hidden_size"), 0, "output_layer.weight"),
)


def shape_of(weight: Weight, sizes: Sizes) -> tuple[int, ...]:
    return tuple(getattr(sizes, size) for size in weight.shape)


def tensors_of(sizes: Sizes) -> Iterator[Tensor]:
    """Every tensor of a model under its Hugging Face name, the head also where it is tied to the embedding."""
    family = sizes.family
    yield Tensor(EMBEDDING.name, shape_of(EMBEDDING, sizes), False)
    for number in range(sizes.num_hidden_layers):
        for weight in family.layer:
            yield Tensor(f"model.layers.{number}.{weight.name}", shape_of(weight, sizes), weight.quantized)
        for expert in range(sizes.num_experts if family.is_moe else 0):
            for weight in family.experts:
                name = f"model.layers.{number}.{weight.name.format(expert=expert)}"
                yield Tensor(name, shape_of(weight, sizes), weight.quantized)
    for weight in (FINAL_NORM, HEAD):
        yield Tensor(weight.name, shape_of(weight, sizes), False)


def parameters_of(table: tuple[Weight, ...]) -> list[tuple[Weight, ...]]:
    """The rows of a table, those of one Megatron parameter together."""
    return [tuple(rows) for _, rows in groupby(table, key=lambda weight: weight.megatron)]
