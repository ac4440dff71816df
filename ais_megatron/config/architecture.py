"""A model's architecture under the names of its Hugging Face ``config.json``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ais_megatron.config.section import PositiveInt, Section


class Architecture(Section):
    """A Qwen3 model under the names of its Hugging Face ``config.json``."""

    model_type: Literal["qwen3", "qwen3_moe"] = Field("qwen3", description="qwen3: dense; qwen3_moe: experts in every layer")
    vocab_size: PositiveInt = Field(description="rows of the embedding; the tokenizer may have fewer tokens")
    hidden_size: PositiveInt = Field(description="width of the residual stream")
    intermediate_size: PositiveInt = Field(description="width of a dense layer's MLP")
    num_hidden_layers: PositiveInt = Field(description="number of transformer layers")
    num_attention_heads: PositiveInt = Field(description="query heads of a layer")
    num_key_value_heads: PositiveInt = Field(description="key and value heads of a layer; divides num_attention_heads")
    head_dim: PositiveInt = Field(description="width of one head")
    max_position_embeddings: PositiveInt = Field(32768, description="longest prompt with its response, in tokens")
    rms_norm_eps: float = Field(1e-6, description="added to the mean square in every RMS norm")
    rope_theta: float = Field(1_000_000.0, description="base of the rotary embedding's frequencies")
    tie_word_embeddings: bool = Field(False, description="the output layer uses the embedding's weights")
    initializer_range: float = Field(0.02, description="standard deviation of random starting weights")
    num_experts: int = Field(0, ge=0, description="qwen3_moe: experts in every layer; 0 in a dense model")
    num_experts_per_tok: int = Field(0, ge=0, description="qwen3_moe: experts that each token is sent to")
    moe_intermediate_size: int = Field(0, ge=0, description="qwen3_moe: width of one expert's MLP")
    norm_topk_prob: bool = Field(True, description="the chosen experts' probabilities are scaled to sum 1")

    @property
    def is_moe(self) -> bool:
        return self.model_type == "qwen3_moe"

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
    def _heads(self) -> Architecture:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of num_key_value_heads={self.num_key_value_heads}"
            )
        return self
