"""The section `rollout`: which engine generates, in which precision, how many responses, and how it samples."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from ais_megatron.config import doors
from ais_megatron.config.engines import ENGINES, EngineTraits, own_traits
from ais_megatron.config.section import PositiveInt, Section
from ais_megatron.config.sglang import SGLangConfig

MOST_AHEAD = 16  # a response that is this many updates old is of little use, and each batch ahead is kept in memory and in checkpoints


class RolloutConfig(Section):
    engine: str = Field(
        "local",
        description="what generates. local: an engine embedded in each rank. sglang: servers, see rollout.sglang. replay: nothing, "
        "responses are read from replay_dir. Or a class of your own as module:Class (docs/extending.md)",
    )
    save_dir: str | None = Field(None, description="folder in which every response is recorded for a later replay; empty: no recording")
    replay_dir: str | None = Field(None, description="engine=replay: the rollout.save_dir of an earlier run")
    quantization: Annotated[
        Literal["none", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1", "int4"],
        BeforeValidator(lambda v: {"fp8": "fp8_e4m3", "bf16": "none", None: "none"}.get(v, v)),
    ] = Field(
        "fp8_e4m3",
        description="precision of the engine's weights and activations. none: BF16. fp8_e4m3 (or fp8) and fp8_e5m2: one scale per "
        "block of weights and of activations, see weight_block. fp4_e2m1: one scale per 1x32 block of both. int4: one scale per 1x128 "
        "block of weights, and activations in BF16. SGLang does not have fp8_e5m2, fp4_e2m1 and int4 here",
    )
    weight_block: Literal[32, 64, 128] = Field(
        128,
        description="FP8: a weight has one scale per block of this many rows and columns, and activations one per row and this many "
        "columns. SGLang needs layers whose sizes are multiples of it, so small models need 64. On GPUs, SGLang's fastest kernels exist "
        "only for 128",
    )
    kv_cache: Literal["auto", "none", "bf16", "fp8_e4m3"] = Field(
        "auto",
        description="precision of the KV cache; auto: fp8_e4m3 if the activations are quantised, else bf16; none: a diffusion model has no "
        "cache, and this becomes its default",
    )
    prompts_per_step: PositiveInt = Field(32, description="number of prompts per step, over all ranks")
    group_size: PositiveInt = Field(8, description="number of responses sampled for each prompt")
    max_response_tokens: PositiveInt = Field(48, description="a response is cut at this length")
    temperature: float = Field(1.0, gt=0.0, description="sampling temperature; all log-probabilities are computed at this temperature")
    top_p: float = Field(
        1.0, gt=0.0, le=1.0, description="sample only from the likeliest tokens that together have this probability; 1: from all tokens"
    )
    top_k: int = Field(0, ge=0, description="sample only from this many of the likeliest tokens; 0: no limit")
    max_batch: PositiveInt = Field(256, description="most responses that one embedded engine decodes at the same time")
    return_routed_experts: bool = Field(False, description="MoE models: record which experts the engine chose for every token")
    sync_bucket_mb: float = Field(
        64.0, gt=0.0, description="size of one bucket of weights in a weight sync, in MiB; a sync holds two of them"
    )
    lora_sync: Literal["merged", "adapter"] = Field(
        "merged",
        description="how LoRA reaches the engine. merged: every sync sends all weights, with the product of the factors added. adapter: "
        "SGLang servers keep the frozen weights, and a sync sends only the factors",
    )
    ahead: int = Field(
        0,
        ge=0,
        le=MOST_AHEAD,
        description="how many batches are generated ahead, while earlier ones train. With 1 the weights are one step older, and a step "
        "takes as long as the slower of both; more batches keep servers busy when few responses are long",
    )
    max_staleness: int | None = Field(
        None,
        ge=0,
        description="responses with tokens that are more versions older than this are dropped, and counted in stale_fraction; empty: none "
        "are, and no token is more than `ahead` versions old",
    )
    colocated: bool = Field(
        False,
        description="SGLang servers and trainer share GPUs and take turns: servers release weights and KV cache while the trainer works, "
        "and it puts gradients and optimizer state away while they generate",
    )
    sglang: SGLangConfig = SGLangConfig()

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, name: str) -> str:
        if doors.is_own(name):
            doors.check("rollout.engine", name, "class")
            own_traits(name)
        elif name not in ENGINES:
            nearest = difflib.get_close_matches(name, ENGINES, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(f"rollout.engine={name!r}: unknown engine; allowed: {', '.join(ENGINES)}, or module:Class{hint}")
        return name

    @property
    def engine_traits(self) -> EngineTraits:
        return own_traits(self.engine) if doors.is_own(self.engine) else ENGINES[self.engine]

    @property
    def shares_gpu_memory(self) -> bool:
        """Whether servers open memory of the trainer's GPUs."""
        return self.engine_traits.has_servers and self.sglang.resolved_transport == "cuda_ipc"

    @property
    def kv_cache_is_fp8(self) -> bool:
        return self.kv_cache == "fp8_e4m3" or (self.kv_cache == "auto" and self.quantization not in ("none", "int4"))
