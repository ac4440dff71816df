"""The table of a model family: every weight of a layer, and the few properties in which families differ.

A shape consists of names of sizes ("query_size", "hidden_size"), so one table is right for models of every size. Planner, manifest,
embedded engine, SGLang plugin, import and export all use the same rows. Nothing here imports torch or Megatron.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import NamedTuple, Protocol


class Weight(NamedTuple):
    """One row of a table: a Hugging Face tensor, and the Megatron parameter that holds its values."""

    name: str
    """Hugging Face name. In a layer's table it is the part after ``model.layers.N.`` (`Family.layers`). ``{expert}`` stands for the number
    of an expert."""
    shape: tuple[str | int, ...]
    """Names of sizes, such as ``("query_size", "hidden_size")``. A number stands for itself."""
    tp_dim: int | None
    """The dimension that tensor parallelism splits; None: every rank holds the whole tensor."""
    megatron: str
    """The part of Megatron's parameter name after ``decoder.layers.N.``. Rows of one table with the same name are parts of one parameter,
    in their order. Three parts are Q, K and V, interleaved by KV group. Two are stacked. ``{slot}`` numbers the experts of a rank."""
    transformer_engine: str | None = None
    """The name in Transformer Engine's layers; None: the same."""
    quantized: bool = False
    """Whether FP8 and FP4 rollouts quantise it."""
    sections: tuple[str, ...] = ()
    """Names of the heights of its sections, one above the other, each of which tensor parallelism splits; empty: it is one section."""


EMBEDDING, FINAL_NORM, HEAD = (
    Weight("model.embed_tokens.weight", ("vocab_size", "hidden_size"), 0, "embedding.word_embeddings.weight"),
    Weight("model.norm.weight", ("hidden_size",), None, "decoder.final_layernorm.weight"),
    Weight("lm_head.weight", ("vocab_size", "hidden_size"), 0, "output_layer.weight"),
)


class Sizes(Protocol):
    """What a table needs to know about an architecture. `config.Architecture` satisfies it."""

    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def family(self) -> Family: ...
    def is_recurrent(self, layer: int) -> bool: ...


class Tensor(NamedTuple):
    """One tensor of one model."""

    name: str
    shape: tuple[int, ...]
    quantized: bool


@dataclass(frozen=True)
class Family:
    """A model family. Adding a family means writing one of these."""

    model_type: str
    """The value of ``model_type`` in config.json."""
    hf_class: str
    """transformers' causal language model, as in ``architectures`` of config.json. Its configuration class has ``Config`` in place of
    ``ForCausalLM``."""
    layer: tuple[Weight, ...]
    """All weights of one layer with attention except its experts, in the order of the export."""
    sglang_attention: str | None
    """SGLang's class for the attention of a layer, to which the plugin adds KV scales: the one in sglang/srt/models that creates
    ``RadixAttention``, with its whole path. None: SGLang does not have this family."""
    experts: tuple[Weight, ...] = ()
    """The weights of one expert; empty in a dense family."""
    recurrent_layer: tuple[Weight, ...] = ()
    """All weights of one layer with a gated delta rule instead of attention; empty if all layers have attention. The architecture says
    which layers those are."""
    qk_norm: bool = False
    """Q and K have a norm per head before the rotary embedding."""
    qkv_bias: bool = False
    """The projections to Q, K and V have biases."""
    gated_attention: bool = False
    """The projection to Q also gives a gate for each head, ``[q, gate]`` one head after the other, by which attention's output is
    multiplied."""
    zero_centered_norms: bool = False
    """Norms multiply by 1 + weight. (The norm within a recurrent layer does not.)"""
    partial_rotary_factor: float = 1.0
    """The value that transformers assumes if config.json has none: the share of a head that is rotated."""
    text_model_type: str | None = None
    """The value of ``model_type`` if config.json describes the language model alone. `model_type` then belongs to a model that also sees
    images, whose config.json has a ``text_config``. Exports are of the language model. None: there is no such difference."""
    rope_theta: float = 10_000.0
    """The value that transformers assumes if config.json has none."""
    rope_types: tuple[str, ...] = ("default",)
    """The kinds of rotary embedding that checkpoints of this family may have: default, llama3."""
    fixed: Mapping[str, object] = field(default_factory=lambda: {"hidden_act": "silu"})
    """Keys of config.json with which the model computes something that this table does not say, such as ``attention_bias`` or a sliding
    window, each with the one value that is supported. A checkpoint with another value is refused, and an export writes these. Look for
    them in transformers' configuration_X.py. Dropout does not belong here, because nothing here trains with it."""
    takes_mask_by_kind: bool = False
    """transformers' model accepts a mapping from kinds of layers to attention masks. It does if the forward method of its model in
    modeling_X.py builds ``causal_mask_mapping``. Models that build one ``causal_mask`` do not."""
    layers: str = "model.layers."
    """What stands before the number of a layer in the name of a tensor."""
    embedding: Weight = EMBEDDING
    final_norm: Weight = FINAL_NORM
    head: Weight = HEAD
    config_names: Mapping[str, str] = field(default_factory=dict)
    """Names in config.json of fields of `config.Architecture` that transformers calls otherwise."""
    twin: Family | None = None
    """The family in transformers that computes this one, if transformers does not have it. The twin's tables have the same rows in the same
    order, under other names."""
    is_diffusion: bool = False
    """A masked diffusion model: every token attends to all others, and the logits at a position predict the token at this position."""
    sglang_keeps_tied_head: bool = False
    """In SGLang the model has its own head even if it is tied to the embedding. It does not if ``__init__`` in its file in
    sglang/srt/models sets ``lm_head`` to the embedding for ``tie_word_embeddings``."""

    @property
    def is_moe(self) -> bool:
        return bool(self.experts)

    @property
    def is_recurrent(self) -> bool:
        """Whether some layers have a recurrent state instead of keys and values."""
        return bool(self.recurrent_layer)

    @cached_property
    def quantized(self) -> frozenset[str]:
        """The names of the rows that FP8 and FP4 rollouts quantise."""
        return frozenset(weight.name for weight in (*self.layer, *self.recurrent_layer, *self.experts) if weight.quantized)

    @property
    def factor_layers(self) -> str:
        """What stands before the number of a layer in our name of a LoRA factor."""
        return self.layers.removeprefix("model.")

    @property
    def transformers_class(self) -> str:
        """The class of transformers that computes this family."""
        return self.hf_class if self.twin is None else self.twin.hf_class


def shape_of(weight: Weight, sizes: Sizes) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else getattr(sizes, size) for size in weight.shape)


def sections_of(weight: Weight, sizes: Sizes) -> tuple[int, ...]:
    """The heights of the sections that tensor parallelism splits one by one."""
    return tuple(getattr(sizes, section) for section in weight.sections) or shape_of(weight, sizes)[:1]


def table_of(sizes: Sizes, layer: int) -> tuple[Weight, ...]:
    """The weights of a layer except its experts. Layers are numbered from 0 over the whole model."""
    return sizes.family.recurrent_layer if sizes.is_recurrent(layer) else sizes.family.layer


def tensors_of(sizes: Sizes) -> Iterator[Tensor]:
    """Every tensor of a model under its Hugging Face name. The head is included even if it is tied to the embedding."""
    yield from _tensors(sizes, sizes.family)


def names_of_twin(sizes: Sizes) -> dict[str, str]:
    """The name of every tensor by the name that transformers' model has for it. Both are the same if transformers has the family."""
    family = sizes.family
    theirs = _tensors(sizes, family.twin or family)
    return {twin.name: tensor.name for twin, tensor in zip(theirs, tensors_of(sizes), strict=True)}


def _tensors(sizes: Sizes, family: Family) -> Iterator[Tensor]:
    yield Tensor(family.embedding.name, shape_of(family.embedding, sizes), False)
    for number in range(sizes.num_hidden_layers):
        for weight in table_of(sizes, number) if family is sizes.family else family.layer:
            yield Tensor(f"{family.layers}{number}.{weight.name}", shape_of(weight, sizes), weight.quantized)
        for expert in range(sizes.num_experts):
            for weight in family.experts:
                name = f"{family.layers}{number}.{weight.name.format(expert=expert)}"
                yield Tensor(name, shape_of(weight, sizes), weight.quantized)
    for weight in (family.final_norm, family.head):
        yield Tensor(weight.name, shape_of(weight, sizes), False)


def parameters_of(table: tuple[Weight, ...]) -> list[tuple[Weight, ...]]:
    """The rows of a table, grouped by Megatron parameter."""
    return [tuple(rows) for _, rows in groupby(table, key=lambda weight: weight.megatron)]
