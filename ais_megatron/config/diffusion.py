"""The section `diffusion`: how a masked diffusion model samples, and how its likelihood is estimated. Also what it cannot do."""

from __future__ import annotations

from typing import Literal, Protocol

from pydantic import Field

from ais_megatron.config.algorithm import Level, ObjectiveConfig
from ais_megatron.config.evaluation import EvalConfig
from ais_megatron.config.policy import PolicyConfig
from ais_megatron.config.rollout import RolloutConfig
from ais_megatron.config.section import Fraction, PositiveInt, Section
from ais_megatron.config.settings import ModelConfig, ParallelConfig, TrainConfig

Likelihood = Literal["one_step", "trajectory"]


class DiffusionConfig(Section):
    likelihood: Likelihood = Field(
        "one_step",
        description="estimator of log-probabilities, of engine, trainer and reference alike. one_step: all response tokens are masked, as "
        "in d1. trajectory: the tokens of some of the sampler's steps, each given the canvas before its step",
    )
    rollout_likelihood: Likelihood | None = Field(
        None, description="the engine's estimator; empty: that of likelihood, and no other is possible, because weights would measure it"
    )
    prompt_mask: Fraction = Field(0.15, description="one_step: probability with which each token of the prompt is masked too")
    masks: PositiveInt = Field(
        1,
        description="one_step: number of masks of a response, each of which is a row of the batch. The rows of the first mask come first, "
        "so with the same train.updates_per_batch every update has all responses under a mask of its own",
    )
    states: PositiveInt = Field(4, description="trajectory: number of the sampler's steps that are drawn from those of a response")
    steps: PositiveInt | None = Field(
        None, description="number of forward passes that sample a response; empty: half of rollout.max_response_tokens"
    )
    block_length: PositiveInt = Field(32, description="tokens are sampled in blocks of this many, from left to right")
    remasking: Literal["low_confidence", "random"] = Field(
        "low_confidence", description="which masked tokens of a block a step reveals: those with the largest probability, or random ones"
    )
    guidance: float = Field(0.0, description="only 0 is possible: classifier-free guidance would sample from another distribution")

    def steps_per_block(self, response: int) -> int:
        """Forward passes for each block, where `response` is rollout.max_response_tokens."""
        return max((self.steps or response // 2) // (response // self.block_length), 1)


class Sections(Protocol):
    """What `diffusion_problems` reads of a whole configuration (which imports this module)."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def rollout(self) -> RolloutConfig: ...
    @property
    def diffusion(self) -> DiffusionConfig: ...
    @property
    def parallel(self) -> ParallelConfig: ...
    @property
    def policy(self) -> PolicyConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def eval(self) -> EvalConfig: ...
    @property
    def objective(self) -> ObjectiveConfig: ...
    @property
    def correction(self) -> str: ...
    @property
    def weight_level(self) -> Level: ...


def diffusion_problems(config: Sections) -> list[str]:
    """Settings that make no sense for a masked diffusion model or do not work with it, and settings that only such a model reads."""
    arch, rollout, diffusion = config.model.architecture, config.rollout, config.diffusion
    if arch is None:
        return []
    family = f"model_type={arch.model_type}"
    if not arch.family.is_diffusion:
        problems = [
            f"diffusion.{key}: only masked diffusion models read it, and {family} is none; leave it out" for key in _changed(diffusion)
        ]
        if rollout.kv_cache == "none":
            problems.append(f"rollout.kv_cache=none: {family} needs a KV cache; use auto, bf16 or fp8_e4m3")
        return problems
    problems = [*_length_problems(config), *_likelihood_problems(config)]
    if not rollout.engine_traits.diffuses:
        problems.append(
            f"rollout.engine={rollout.engine}: cannot sample from {family}, or gives no log-probabilities for it; set rollout.engine=local"
        )
    for key, value, default, why in (
        ("rollout.kv_cache", rollout.kv_cache, "none", "every pass reads the whole canvas, so there is no KV cache; leave it out"),
        ("rollout.save_dir", rollout.save_dir, None, "recordings cannot hold a canvas; leave it out"),
        ("rollout.top_p", rollout.top_p, 1.0, "the sampler has no such limit; leave it out"),
        ("rollout.top_k", rollout.top_k, 0, "the sampler has no such limit; leave it out"),
        ("train.balance", config.train.balance, False, "all its rows have about the same work; set it to false"),
        ("train.packing", config.train.packing, False, "attention sees both directions; set it to false"),
        ("parallel.cp", config.parallel.cp, 1, "attention sees both directions; raise parallel.tp or parallel.pp instead"),
        ("policy.forward_precision", config.policy.forward_precision, "bf16", "only bf16 was checked with its attention; set it to bf16"),
        ("diffusion.guidance", diffusion.guidance, 0.0, "log-probabilities would not be those of the sampler; set it to 0"),
    ):
        if value != default:
            problems.append(f"{key}={value}: not supported for {family}: {why}")
    problems += [
        f"eval.sets.{name}.top_p={chosen.top_p}: not supported for {family}: the sampler has no such limit; leave it out"
        for name, chosen in config.eval.sets.items()
        if chosen.top_p != 1.0
    ]
    return problems


def _changed(diffusion: DiffusionConfig) -> list[str]:
    return [f"{key}={value}" for key, value in diffusion.model_dump().items() if value != DiffusionConfig.model_fields[key].default]


def _length_problems(config: Sections) -> list[str]:
    """Responses that do not consist of whole blocks, and blocks that do not consist of whole steps."""
    diffusion, response = config.diffusion, config.rollout.max_response_tokens
    block, lengths = diffusion.block_length, {"rollout.max_response_tokens": response}
    for name, chosen in config.eval.sets.items():
        if chosen.max_response_tokens is not None:
            lengths[f"eval.sets.{name}.max_response_tokens"] = chosen.max_response_tokens
    problems = [
        f"{key}={length}: not a multiple of diffusion.block_length={block}; use {max(length // block, 1) * block}, or another block_length"
        for key, length in lengths.items()
        if length % block
    ]
    if diffusion.steps is not None and not problems:
        blocks = response // block
        if diffusion.steps % blocks or not blocks <= diffusion.steps <= response:
            problems.append(
                f"diffusion.steps={diffusion.steps}: must be a multiple of the {blocks} blocks of a response (rollout.max_response_tokens="
                f"{response}, diffusion.block_length={block}), and at most {response}, because each step reveals at least one token"
            )
    return problems


def _likelihood_problems(config: Sections) -> list[str]:
    diffusion, problems = config.diffusion, []
    if diffusion.rollout_likelihood not in (None, diffusion.likelihood):
        problems.append(
            f"diffusion.rollout_likelihood={diffusion.rollout_likelihood}: differs from diffusion.likelihood={diffusion.likelihood}; an "
            "importance weight between two estimators measures their difference (above 1 nat per token) and not the rounding; leave it out"
        )
    if diffusion.likelihood == "one_step":
        return problems
    if diffusion.masks != 1:
        problems.append(f"diffusion.masks={diffusion.masks}: only diffusion.likelihood=one_step has masks; set diffusion.states instead")
    objective = config.objective.resolved
    if config.weight_level != "token" or objective.aggregation != "token" or config.objective.is_sequence_level:
        problems.append(
            f"diffusion.likelihood=trajectory: scores only some tokens of a response, but objective.name={config.objective.name}, "
            f"objective.aggregation={objective.aggregation} or the level of the weights ({config.weight_level}) needs all of them; use "
            "grpo with aggregation=token and weights per token, or diffusion.likelihood=one_step"
        )
    if config.correction in ("geo_rs", "k3_rs"):
        problems.append(
            f"correction={config.correction}: rejects whole responses, but diffusion.likelihood=trajectory scores only some of their "
            "tokens; choose another correction, or diffusion.likelihood=one_step"
        )
    return problems
