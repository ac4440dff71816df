"""The section `policy`: what of the policy is trained, and in which precision it computes."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from ais_megatron.config.architecture import Architecture
from ais_megatron.config.rollout import RolloutConfig
from ais_megatron.config.section import Section
from ais_megatron.config.settings import ModelConfig, ParallelConfig
from ais_megatron.models.family import Weight, table_of

Target = Literal[
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "in_proj_qkv",
    "in_proj_z",
    "out_proj",
    "attn_out",
    "ff_proj",
    "ff_out",
]

SGLANG_LAYERS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


_FLOATS = ("fp8_e4m3", "fp8_e5m2", "fp4_e2m1")
ALIGNED = {"fp8_aligned": _FLOATS, "fp8_weights_aligned": _FLOATS, "int4_aligned": ("int4",)}
"""The values of `policy.forward_precision` that align the trainer with the engine, and what they need of `rollout.quantization`."""


class LoraConfig(Section):
    rank: int = Field(
        0, ge=0, description="rank of the factors; 0: all weights are trained. Otherwise these are frozen, and only the factors are trained"
    )
    alpha: float = Field(32.0, gt=0.0, description="the product of the factors is scaled by alpha / rank")
    targets: list[Target] = Field(
        [],
        description="projections that have factors; empty: all of a dense model, those of the attention in a MoE model. in_proj_qkv, "
        "in_proj_z and out_proj are qwen3_5's. The last three are llada's names of o_proj, gate_proj and down_proj",
    )
    dropout: float = Field(0.0, description="only 0 is possible: with dropout the policy would differ at every call")

    @property
    def scale(self) -> float:
        """The factor of the product. There must be a rank."""
        return self.alpha / self.rank


class PolicyConfig(Section):
    forward_precision: Literal["bf16", "fp8_aligned", "fp8_weights_aligned", "int4_aligned", "fp8_te"] = Field(
        "bf16",
        description="arithmetic of the trainer's linear layers. bf16: that of model.dtype. fp8_aligned: the rollout engine's, with its "
        "quantised weights, inputs, K and V, and gradients straight through; the trained model is then the quantised one. "
        "fp8_weights_aligned: with its quantised weights alone, which serves deep models better. int4_aligned: its weights, K and V, for "
        "rollout.quantization=int4. fp8_te: FP8 tensor cores through Transformer Engine's blockwise recipe, forward and "
        "backward; needs GPUs of compute capability 9.0 or higher",
    )
    lora: LoraConfig = LoraConfig()

    @property
    def is_aligned(self) -> bool:
        """Whether the trainer computes with the engine's quantised weights, in the format of `rollout.quantization`."""
        return self.forward_precision in ALIGNED

    @property
    def aligns_inputs(self) -> bool:
        """Whether it also rounds the inputs of linear layers as the engine does. INT4 engines do not round them."""
        return self.forward_precision == "fp8_aligned"

    @property
    def aligns_cache(self) -> bool:
        """Whether it rounds K and V, if the engine's cache does."""
        return self.is_aligned and self.forward_precision != "fp8_weights_aligned"


def precision_problems(
    policy: PolicyConfig, model: ModelConfig, rollout: RolloutConfig, parallel: ParallelConfig, backend: str
) -> list[str]:
    """A forward pass that cannot be aligned with the engine's, or that Transformer Engine cannot compute in FP8."""
    if policy.forward_precision == "fp8_te":
        return _transformer_engine_problems(model, parallel, backend)
    if not policy.is_aligned:
        return []
    key, formats, problems = f"policy.forward_precision={policy.forward_precision}", ALIGNED[policy.forward_precision], []
    if rollout.quantization == "none":
        problems.append(
            f"{key}: rollout.quantization=none leaves nothing to align with; set it to {formats[0]}, or forward_precision to bf16"
        )
    elif rollout.quantization not in formats:
        fitting = next(name for name, others in ALIGNED.items() if rollout.quantization in others)
        problems.append(
            f"{key}: the engine does not use this format, because rollout.quantization={rollout.quantization}; set forward_precision to "
            f"{fitting}, or rollout.quantization to one of {', '.join(formats)}"
        )
    if model.transformer_impl == "transformer_engine":
        problems.append(f"{key}: needs Megatron's own layers; set model.transformer_impl to local or auto")
    return problems


BLOCK_SCALING = ("2.3", "9.0", "12.9")
"""The oldest Transformer Engine, compute capability and CUDA with `Float8BlockScaling` (its own `check_fp8_block_scaling_support`)."""

FP8_MULTIPLE = 16
"""FP8 tensor cores need matrices whose sizes are multiples of this (`assert_dim_for_fp8_exec` in Transformer Engine)."""


def _transformer_engine_problems(model: ModelConfig, parallel: ParallelConfig, backend: str) -> list[str]:
    key, problems = "policy.forward_precision=fp8_te", []
    if model.transformer_impl == "local":
        problems.append(f"{key}: needs Transformer Engine's layers; set model.transformer_impl to auto or transformer_engine")
    if backend == "cpu":
        problems.append(
            f"{key}: run.backend=cpu has no FP8 tensor cores; use GPUs of compute capability 9.0 or higher with run.backend=cuda, or set "
            "forward_precision to bf16 or fp8_aligned"
        )
    a = model.architecture
    if a is None:
        return problems
    sizes = {"hidden_size": (a.hidden_size, 1), "num_key_value_heads * head_dim": (a.kv_size, parallel.tp)}
    if a.is_moe:
        sizes["moe_intermediate_size"] = (a.moe_intermediate_size, parallel.etp)
    else:
        sizes["intermediate_size"] = (a.intermediate_size, parallel.tp)
    for name, (size, ranks) in sizes.items():
        if size % (FP8_MULTIPLE * ranks):
            shared = f" on each of {ranks} ranks" if ranks > 1 else ""
            problems.append(
                f"{key}: FP8 products need sizes that are multiples of {FP8_MULTIPLE}{shared}, but model.architecture.{name}={size}; set "
                f"forward_precision to bf16{', or use fewer ranks' if ranks > 1 else ''}"
            )
    return problems


def lora_targets(lora: LoraConfig, architecture: Architecture, layer: int | None = None) -> dict[str, Weight]:
    """The rows of a layer's table that have factors, by their short names such as ``q_proj``; empty without LoRA.

    layer: its number; None: the rows of layers of any kind.
    """
    family = architecture.family
    table = (*family.layer, *family.recurrent_layer) if layer is None else table_of(architecture, layer)
    projections = {name: row for row in table if (name := projection(row)) in get_args(Target)}
    return {name: row for name, row in projections.items() if lora.rank and (not lora.targets or name in lora.targets)}


def adapter_targets(lora: LoraConfig, architecture: Architecture) -> list[str]:
    """The projections whose factors an SGLang server needs: those of `lora_targets`, and the others of the same merged layer.

    SGLang keeps Q, K and V in one layer, and gate and up in another. It cannot load factors of K alone, for example."""
    targets = lora_targets(lora, architecture)
    return [name for layer in SGLANG_LAYERS if not targets.keys().isdisjoint(layer) for name in layer]


def adapter_problems(policy: PolicyConfig, rollout: RolloutConfig) -> list[str]:
    """Why LoRA's factors cannot be sent by themselves."""
    if rollout.lora_sync == "merged":
        return []
    key, problems = "rollout.lora_sync=adapter", []
    if not policy.lora.rank:
        problems.append(f"{key}: there are no factors to send, because policy.lora.rank=0; set a rank, or set rollout.lora_sync=merged")
    if not rollout.engine_traits.holds_adapters:
        problems.append(
            f"{key}: rollout.engine={rollout.engine} cannot hold adapters; set rollout.engine=sglang, or rollout.lora_sync=merged"
        )
    if rollout.sglang.router is not None:
        problems.append(
            f"{key}: does not work with rollout.sglang.router={rollout.sglang.router}, because a request names the adapter of its server; "
            "leave the router out, or set rollout.lora_sync=merged"
        )
    if policy.is_aligned:
        problems.append(
            f"{key}: policy.forward_precision={policy.forward_precision} trains quantised merged weights, but the servers quantise the "
            "frozen weights; set policy.forward_precision=bf16, or rollout.lora_sync=merged"
        )
    return problems


def projection(weight: Weight) -> str:
    """``q_proj`` for ``self_attn.q_proj.weight``; empty for a bias or a norm."""
    *_, name, kind = weight.name.split(".")
    return name if kind == "weight" and len(weight.shape) == 2 else ""


def lora_problems(lora: LoraConfig, model: ModelConfig, architecture: Architecture | None, sft_steps: int) -> list[str]:
    """Settings of LoRA that cannot work."""
    problems = []
    if lora.dropout:
        problems.append(
            f"policy.lora.dropout={lora.dropout:g}: must be 0, because with dropout the log-probabilities of the trainer would differ at "
            "every call, and importance weights would measure the dropout"
        )
    if not lora.rank:
        if model.adapter is not None:
            problems.append(f"model.adapter={model.adapter}: needs LoRA; set policy.lora.rank to the rank of this adapter")
        return problems
    if model.path is None and not sft_steps:
        problems.append(
            f"policy.lora.rank={lora.rank}: there are no weights to freeze; set model.path to a Hugging Face checkpoint, or sft.steps for "
            "a warm start"
        )
    if model.adapter is not None and sft_steps:
        problems.append(
            f"model.adapter={model.adapter}: belongs to the weights in model.path, but sft.steps={sft_steps} trains these first; set "
            "sft.steps=0"
        )
    if architecture is not None and (unknown := sorted(set(lora.targets) - set(lora_targets(lora, architecture)))):
        why = "belong to the experts of this model, and factors of experts are not supported, because SGLang and PEFT name them differently"
        if not architecture.is_moe:
            why = f"are no projections of model_type={architecture.model_type}, so they would be left out"
        use = ", ".join(lora_targets(LoraConfig(rank=1), architecture))
        problems.append(f"policy.lora.targets: {', '.join(unknown)} {why}; use {use}")
    return problems
