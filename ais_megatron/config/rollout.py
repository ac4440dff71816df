"""The section `rollout`: which engine generates, in which precision, how many responses, and how they are sampled."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from ais_megatron.config import doors
from ais_megatron.config.engines import ENGINES, EngineTraits, own_traits
from ais_megatron.config.section import PositiveInt, Section
from ais_megatron.config.sglang import SGLangConfig


class RolloutConfig(Section):
    engine: str = Field(
        "local",
        description="local: embedded in each rank; sglang: servers, see rollout.sglang; replay: none, responses from replay_dir; "
        "or a class of your own as module:Class (docs/extending.md)",
    )
    save_dir: str | None = Field(None, description="folder that every response is recorded in, for a later replay; empty: none")
    replay_dir: str | None = Field(None, description="engine=replay: the save_dir of an earlier run")
    quantization: Annotated[
        Literal["none", "fp8_e4m3", "fp8_e5m2", "fp4_e2m1"],
        BeforeValidator(lambda v: {"fp8": "fp8_e4m3", "bf16": "none", None: "none"}.get(v, v)),
    ] = Field(
        "fp8_e4m3",
        description="none: BF16 weights; fp8_e4m3 (or fp8), fp8_e5m2: block-128x128 weights, 1x128 activations; fp4_e2m1: blocks of "
        "1x32 for both. Local engine only: fp8_e5m2, fp4_e2m1",
    )
    kv_cache: Literal["auto", "bf16", "fp8_e4m3"] = Field("auto", description="auto: FP8 exactly when the weights are quantised")
    prompts_per_step: PositiveInt = Field(32, description="prompts of one step, over all ranks")
    group_size: PositiveInt = Field(8, description="responses sampled for each prompt")
    max_response_tokens: PositiveInt = Field(48, description="a response is cut at this length")
    temperature: float = Field(1.0, gt=0.0, description="of sampling; log-probabilities are those at this temperature")
    top_p: float = Field(1.0, gt=0.0, le=1.0, description="sample only from the likeliest tokens that hold this probability; 1: from all")
    top_k: int = Field(0, ge=0, description="sample only from so many of the likeliest tokens; 0: no limit")
    max_batch: PositiveInt = Field(256, description="responses that one engine decodes side by side")
    return_routed_experts: bool = Field(False, description="MoE models: every response carries the experts the engine chose for it")
    sync_bucket_mb: float = Field(64.0, gt=0.0, description="bytes of weights in flight during a weight sync, in MiB")
    ahead: int = Field(0, ge=0, le=1, description="1: the next batch is generated while this one trains, with weights one step older")
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
    def kv_cache_is_fp8(self) -> bool:
        return self.kv_cache == "fp8_e4m3" or (self.kv_cache == "auto" and self.quantization != "none")
