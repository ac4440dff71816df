"""The section `model.architecture`: a model's sizes, named as in its Hugging Face ``config.json``."""

from __future__ import annotations

import difflib

from pydantic import Field, field_validator, model_validator

from ais_megatron.config.section import PositiveInt, Section
from ais_megatron.models.family import Family
from ais_megatron.models.registry import FAMILIES

LINEAR_KEYS = (
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)


class RopeScaling(Section):
    """How Llama 3.1 and later stretch the low frequencies of the rotary embedding, named as in ``rope_parameters`` of config.json."""

    factor: float = Field(8.0, ge=1.0, description="low frequencies are divided by this factor")
    low_freq_factor: float = Field(
        1.0,
        gt=0.0,
        description="frequencies whose wavelength is above original_max_position_embeddings / low_freq_factor are divided by the whole "
        "factor",
    )
    high_freq_factor: float = Field(
        4.0, gt=0.0, description="frequencies whose wavelength is below original_max_position_embeddings / high_freq_factor do not change"
    )
    original_max_position_embeddings: PositiveInt = Field(8192, description="context length of the model before stretching")

    @model_validator(mode="after")
    def _band(self) -> RopeScaling:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor={self.high_freq_factor:g}: must be greater than low_freq_factor={self.low_freq_factor:g}")
        return self


class Architecture(Section):
    """A model's sizes, named as in its Hugging Face ``config.json``. `models.registry` lists the supported families."""

    model_type: str = Field("qwen3", description=f"model family: {', '.join(FAMILIES)}")
    vocab_size: PositiveInt = Field(description="number of rows of the embedding; the tokenizer may have fewer tokens")
    hidden_size: PositiveInt = Field(description="width of the residual stream")
    intermediate_size: PositiveInt = Field(description="width of a dense layer's MLP")
    num_hidden_layers: PositiveInt = Field(description="number of transformer layers")
    num_attention_heads: PositiveInt = Field(description="number of query heads in a layer")
    num_key_value_heads: PositiveInt = Field(description="number of key and value heads in a layer; must divide num_attention_heads")
    head_dim: PositiveInt = Field(description="width of one head")
    max_position_embeddings: PositiveInt = Field(32768, description="most tokens that a prompt and its response may have together")
    rms_norm_eps: float = Field(1e-6, description="added to the mean square in every RMS norm")
    rope_theta: float = Field(1_000_000.0, description="base of the rotary embedding's frequencies")
    rope_scaling: RopeScaling | None = Field(
        None, description="llama: how the frequencies are stretched, from Llama 3.1 on; empty: not at all"
    )
    tie_word_embeddings: bool = Field(False, description="the output layer shares the embedding's weights")
    initializer_range: float = Field(0.02, description="standard deviation of random initial weights")
    num_experts: int = Field(0, ge=0, description="qwen3_moe: number of experts in a layer; 0 for a dense model")
    num_experts_per_tok: int = Field(0, ge=0, description="qwen3_moe: number of experts that each token is sent to")
    moe_intermediate_size: int = Field(0, ge=0, description="qwen3_moe: width of one expert's MLP")
    norm_topk_prob: bool = Field(True, description="qwen3_moe: scale the probabilities of the chosen experts so that their sum is 1")
    mask_token_id: int | None = Field(
        None, ge=0, description="llada: the token that the model reads at positions whose token it shall predict; empty for other families"
    )
    partial_rotary_factor: float = Field(1.0, gt=0.0, le=1.0, description="share of a head that is rotated; below 1 only with qwen3_5")
    full_attention_interval: int = Field(
        0, ge=0, description="qwen3_5: every so manyth layer has attention, and all others have a gated delta rule with a recurrent state"
    )
    linear_num_key_heads: int = Field(0, ge=0, description="qwen3_5: number of query and key heads in a layer with a gated delta rule")
    linear_num_value_heads: int = Field(0, ge=0, description="qwen3_5: number of value heads there; a multiple of linear_num_key_heads")
    linear_key_head_dim: int = Field(0, ge=0, description="qwen3_5: width of one query or key head there")
    linear_value_head_dim: int = Field(0, ge=0, description="qwen3_5: width of one value head there")
    linear_conv_kernel_dim: int = Field(0, ge=0, description="qwen3_5: number of tokens that the convolution there sees")

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def is_moe(self) -> bool:
        return self.family.is_moe

    @property
    def query_size(self) -> int:
        """Width of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, and of all value heads."""
        return self.num_key_value_heads * self.head_dim

    @property
    def gated_query_size(self) -> int:
        """Width of all query heads together, each with its gate."""
        return 2 * self.query_size

    @property
    def linear_key_size(self) -> int:
        """Width of all key heads of a gated delta rule together, and of all query heads."""
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def linear_value_size(self) -> int:
        """Width of all value heads of a gated delta rule together."""
        return self.linear_num_value_heads * self.linear_value_head_dim

    @property
    def linear_qkv_size(self) -> int:
        """Width of Q, K and V of a gated delta rule together."""
        return 2 * self.linear_key_size + self.linear_value_size

    def is_recurrent(self, layer: int) -> bool:
        """Whether a layer, numbered from 0, has a gated delta rule instead of attention."""
        return self.family.is_recurrent and (layer + 1) % self.full_attention_interval != 0

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The numbers of the layers with attention, which have keys and values."""
        return tuple(layer for layer in range(self.num_hidden_layers) if not self.is_recurrent(layer))

    @field_validator("model_type")
    @classmethod
    def _known_family(cls, model_type: str) -> str:
        if model_type not in FAMILIES:
            nearest = difflib.get_close_matches(model_type, FAMILIES, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"model_type={model_type!r}: unknown model family; allowed: {', '.join(FAMILIES)}{hint}")
        return model_type

    @model_validator(mode="after")
    def _rope(self) -> Architecture:
        if self.rope_scaling is not None and "llama3" not in self.family.rope_types:
            raise ValueError(f"rope_scaling: model_type={self.model_type} has no scaled rotary embedding; leave it out")
        return self

    @model_validator(mode="after")
    def _mask(self) -> Architecture:
        mask, needed = self.mask_token_id, self.family.is_diffusion
        if needed != (mask is not None) or not 0 <= (mask or 0) < self.vocab_size:
            allowed = f"a token below vocab_size={self.vocab_size}" if needed else "left out"
            raise ValueError(f"mask_token_id={mask}: must be {allowed} with model_type={self.model_type}")
        if needed and self.query_size != self.hidden_size:
            raise ValueError(
                f"head_dim={self.head_dim}: must be hidden_size / num_attention_heads with model_type={self.model_type}, whose "
                "config.json has no key for it"
            )
        if needed and self.tie_word_embeddings:
            raise ValueError(
                f"tie_word_embeddings=true: the output layer of model_type={self.model_type} has its own weights; set it to false"
            )
        return self

    @model_validator(mode="after")
    def _experts(self) -> Architecture:
        sizes = dict(
            num_experts=self.num_experts, num_experts_per_tok=self.num_experts_per_tok, moe_intermediate_size=self.moe_intermediate_size
        )
        for name, size in sizes.items():
            if self.is_moe != (size > 0):
                raise ValueError(f"{name}={size}: must be {'1 or more' if self.is_moe else '0'} with model_type={self.model_type}")
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} exceeds num_experts={self.num_experts}")
        return self

    @model_validator(mode="after")
    def _recurrent(self) -> Architecture:
        recurrent = self.family.is_recurrent
        for name in (*LINEAR_KEYS, "full_attention_interval"):
            size = getattr(self, name)
            if recurrent != (size > 0):
                raise ValueError(f"{name}={size}: must be {'1 or more' if recurrent else '0'} with model_type={self.model_type}")
        if recurrent and self.linear_num_value_heads % self.linear_num_key_heads:
            raise ValueError(
                f"linear_num_value_heads={self.linear_num_value_heads} must be a multiple of "
                f"linear_num_key_heads={self.linear_num_key_heads}"
            )
        if self.partial_rotary_factor != 1.0 and self.family.partial_rotary_factor == 1.0:
            raise ValueError(f"partial_rotary_factor={self.partial_rotary_factor:g}: must be 1 with model_type={self.model_type}")
        if int(self.head_dim * self.partial_rotary_factor) % 2:
            raise ValueError(
                f"partial_rotary_factor={self.partial_rotary_factor:g}: rotates {int(self.head_dim * self.partial_rotary_factor)} of "
                f"head_dim={self.head_dim} numbers, but they are rotated in pairs; choose an even number"
            )
        return self

    @model_validator(mode="after")
    def _heads(self) -> Architecture:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of num_key_value_heads={self.num_key_value_heads}"
            )
        return self
