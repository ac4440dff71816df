"""The configuration of the algorithm: which objective, which correction, how alpha is found; and the presets behind them.

An experiment changes one word (``correction=mis``, ``objective.name=gspo``): every setting that differs between
corrections or objectives is empty in the file, which means "that method's own", and the tables here say what that is.
Empty values stay empty in a written configuration, so that changing the word later changes all that belongs to it.
"""

from __future__ import annotations

import difflib
from functools import lru_cache
from typing import Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator, model_validator

from ais_megatron.config import doors
from ais_megatron.config.section import Fraction, PositiveInt, Section

CorrectionName = Literal["none", "tis", "mis", "icepop", "geo_rs", "k3_rs", "ais"]
Level = Literal["token", "sequence", "geometric"]
REJECTIONS = ("geo_rs", "k3_rs")


class ObjectivePreset(NamedTuple):
    """What an objective brings along; every field but the last is a key of `objective`, which wins where it is set."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: str = "token"
    advantages: str = "group_std"
    dynamic_sampling: bool = False
    overlong_filter: bool = False
    sequence_level: bool = False
    """All tokens of a response have the same J, so that ais.level=auto gives a response one importance weight."""


# The papers' values: DAPO 2503.14476, Dr.GRPO 2503.20783, GSPO 2507.18071. CISPO (2506.13585) bounds its weights from above
# only, here at 5 as ScaleRL (2510.13786) does. For TBPO (2604.07853) GSPO's order of magnitude would suit many small
# updates; the bounds here are wide, for a ratio that starts at 1 in every batch.
OBJECTIVE_PRESETS = {
    "grpo": ObjectivePreset(0.2, 0.2, "token", "group_std"),
    "dr_grpo": ObjectivePreset(0.2, 0.2, "constant", "group_mean"),
    "dapo": ObjectivePreset(0.2, 0.28, "token", "group_std", dynamic_sampling=True, overlong_filter=True),
    "gspo": ObjectivePreset(3e-4, 4e-4, "sequence", "group_std", sequence_level=True),
    "cispo": ObjectivePreset(1.0, 4.0, "token", "group_std"),
    "tbpo": ObjectivePreset(0.2, 0.2, "sequence", "group_std", sequence_level=True),
}
PRESET_KEYS = tuple(field for field in ObjectivePreset._fields if field != "sequence_level")
# (low, high) of the band in which a correction leaves a token or a response alone.
CORRECTION_BANDS = {"mis": (0.5, 2.0), "icepop": (0.5, 5.0), "geo_rs": (0.99, 1.01)}


class AISConfig(Section):
    """The coefficient alpha; the words are those of docs/algorithm.md."""

    coefficient: Literal["product", "oracle", "constant"] = Field(
        "product", description="product: rho (1 - exp(-D / tau)) / max(1, nu); oracle: least estimated MSE; constant: constant_alpha"
    )
    constant_alpha: Fraction = Field(0.5, description="alpha under coefficient=constant")
    factors: list[Literal["reliability", "severity", "amplification"]] = Field(
        ["reliability", "severity", "amplification"],
        min_length=1,
        description="factors of the product: rho, 1 - exp(-D / tau), 1 / max(1, nu); leave one out to see what it does",
    )
    level: Literal["auto", "token", "sequence"] = Field(
        "auto", description="sequence: one geometric-mean weight per response; auto: sequence for the sequence-level objectives"
    )
    tau: float | Literal["auto"] = Field(
        2e-3, description="divergence (nats per token) at which alpha reaches 63 % of rho / max(1, nu); auto: the first batches' mean"
    )
    auto_batches: PositiveInt = Field(10, description="tau=auto: batches whose mean divergence becomes tau")
    ema: float = Field(0.0, ge=0.0, lt=1.0, description="weight of the past in the moving average of alpha over batches; 0: none")
    lag: Literal[0, 1] = Field(0, description="1: the previous batch's alpha, and no forward pass for old_logprobs")
    alpha_min: Fraction = Field(0.0, description="alpha is never smaller")
    alpha_max: Fraction = Field(1.0, description="alpha is never larger")
    weight_cap: float = Field(
        2.0, gt=1.0, description="C: importance weights are truncated at this value, for ais, tis and the diagnostics"
    )
    reliability: Literal["truncated", "raw"] = Field(
        "truncated", description="rho from the truncated importance weights, or from the raw ones"
    )

    @model_validator(mode="after")
    def _range(self) -> AISConfig:
        if self.alpha_min > self.alpha_max:
            raise ValueError(f"alpha_min={self.alpha_min} must not exceed alpha_max={self.alpha_max}")
        if self.tau != "auto" and not self.tau > 0.0:
            raise ValueError(f"tau={self.tau} must be greater than 0, or auto")
        return self


class CorrectionOptions(Section):
    """What the corrections other than ais can be told; empty: the correction's own (`CORRECTION_BANDS`)."""

    level: Literal["auto", "token", "sequence", "geometric"] = Field(
        "auto",
        description="tis, mis: per token, exp(sum l) or exp(mean l) per response; auto: token, but sequence for gspo, tbpo",
    )
    low: float | None = Field(None, ge=0.0, description="mis, icepop, geo_rs: lower end of the band")
    high: float | None = Field(None, gt=0.0, description="mis, icepop, geo_rs: upper end of the band")
    k3_limit: float = Field(2e-3, gt=0.0, description="k3_rs: largest mean k3 of a response, in nats per token")
    batch_normalise: bool = Field(
        False,
        description="divide the weights by their mean over the global batch, after truncation: the mean over tokens, or over responses "
        "where one weight stands for a response",
    )

    def band(self, correction: str) -> tuple[float, float]:
        """(low, high) for this correction; (0, inf) for one without a band."""
        low, high = CORRECTION_BANDS.get(correction, (0.0, float("inf")))
        return low if self.low is None else self.low, high if self.high is None else self.high


class ObjectiveConfig(Section):
    """What is maximised; empty: the objective's own (`OBJECTIVE_PRESETS`)."""

    name: str = Field(
        "grpo", description="grpo, dr_grpo, dapo, gspo, cispo or tbpo; or a function of your own as module:function (docs/extending.md)"
    )
    clip_low: Fraction | None = Field(None, description="policy ratios are clipped below 1 - clip_low")
    clip_high: float | None = Field(None, ge=0.0, description="policy ratios are clipped above 1 + clip_high")
    aggregation: Literal["token", "sequence", "constant"] | None = Field(
        None, description="mean over tokens; mean of the responses' means; or sum over responses * rollout.max_response_tokens"
    )
    advantages: Literal["group_std", "group_mean", "reward"] | None = Field(
        None, description="group_std: (R - mean) / std of the group; group_mean: R - mean; reward: R itself, no baseline"
    )
    std_floor: float = Field(1e-6, gt=0.0, description="added to a group's reward deviation before dividing by it")
    dynamic_sampling: bool | None = Field(None, description="replace groups whose rewards are all equal by the stream's next prompts")
    max_refills: PositiveInt = Field(3, description="dynamic_sampling: rounds of generation after the first")
    overlong_filter: bool | None = Field(None, description="responses cut at the length limit leave the loss")
    kl_coefficient: float = Field(0.0, ge=0.0, description="penalty on the KL divergence from the starting policy; 0: none")
    kl_estimator: Literal["k1", "k3"] = Field(
        "k3", description="estimate of that divergence: k3 is exp(-d) - 1 + d and k1 is d, where d = log pi - log pi_ref"
    )
    entropy_bonus: float = Field(0.0, ge=0.0, description="coefficient of the mean entropy in the objective")

    @field_validator("name")
    @classmethod
    def _known_objective(cls, name: str) -> str:
        if doors.is_own(name):
            doors.check("objective.name", name, "function")
            _check_preset(name, own_preset(name))
        elif name not in OBJECTIVE_PRESETS:
            nearest = difflib.get_close_matches(name, OBJECTIVE_PRESETS, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise ValueError(
                f"objective.name={name!r}: unknown objective; allowed: {', '.join(OBJECTIVE_PRESETS)}, or module:function{hint}"
            )
        return name

    @property
    def preset(self) -> ObjectivePreset:
        """What `name` brings along, before the file's own settings."""
        return own_preset(self.name) if doors.is_own(self.name) else OBJECTIVE_PRESETS[self.name]

    @property
    def resolved(self) -> ObjectivePreset:
        """The preset of `name` with what the file sets in place."""
        return self.preset._replace(**{key: value for key in PRESET_KEYS if (value := getattr(self, key)) is not None})

    @property
    def is_sequence_level(self) -> bool:
        return self.preset.sequence_level


@lru_cache
def own_preset(name: str) -> ObjectivePreset:
    """The `ObjectivePreset(...)` that the user's module assigns to ``function.preset``, read without importing the module;
    GRPO's where there is none.

    Raises:
        ValueError: unknown or too many arguments, or values that are not written out.
    """
    arguments = doors.literal_call("objective.name", name, "preset")
    if arguments is None:
        return ObjectivePreset()
    try:
        return ObjectivePreset(*arguments[0], **arguments[1])
    except TypeError as error:
        raise ValueError(f"objective.name={name!r}: its preset: {error}; allowed: {', '.join(ObjectivePreset._fields)}") from error


def _check_preset(name: str, preset: ObjectivePreset) -> None:
    """A user's preset is held to the rules of the keys that it stands for."""
    try:
        ObjectiveConfig(**{key: getattr(preset, key) for key in PRESET_KEYS})
    except ValidationError as error:
        wrong = "; ".join(f"{item['loc'][0]}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}" for item in error.errors())
        raise ValueError(f"objective.name={name!r}: its preset: {wrong}") from error


def weight_level(correction: str, ais: AISConfig, options: CorrectionOptions, objective: ObjectiveConfig) -> Level:
    """The level of the importance weights in use, `auto` resolved."""
    if correction == "ais":
        level = "sequence" if objective.is_sequence_level and ais.level == "auto" else ais.level
        return "geometric" if level == "sequence" else "token"
    if correction in ("tis", "mis"):
        if options.level != "auto":
            return options.level
        return "sequence" if objective.is_sequence_level else "token"
    return "token"


def algorithm_problems(
    correction: str, ais: AISConfig, options: CorrectionOptions, objective: ObjectiveConfig, updates_per_batch: int, group_size: int
) -> list[str]:
    """Combinations that contradict each other, each naming both keys."""
    resolved, problems = objective.resolved, []
    low, high = options.band(correction)
    if low >= high:
        problems.append(f"correction_options.low={low}: must be below correction_options.high={high} (correction={correction})")
    if correction == "icepop" and options.level in ("sequence", "geometric"):
        problems.append(
            f"correction_options.level={options.level}: correction=icepop weighs tokens only; use correction=mis, or level=token"
        )
    if correction in REJECTIONS and options.level == "token":
        problems.append(f"correction_options.level=token: correction={correction} rejects whole responses; leave the level out")
    if correction == "ais" and options.level != "auto":
        problems.append(f"correction_options.level={options.level}: correction=ais has its own key; set ais.level")
    if ais.lag:
        problems += _lag_problems(correction, options, resolved, updates_per_batch)
    if resolved.advantages == "reward" and resolved.dynamic_sampling:
        problems.append(
            "objective.dynamic_sampling=true: with objective.advantages=reward a group of equal rewards still carries a signal; "
            "set one of group_std, group_mean, or dynamic_sampling=false"
        )
    if group_size == 1 and resolved.advantages != "reward":
        problems.append(
            f"rollout.group_size=1: group-relative advantages (objective.advantages={resolved.advantages}) of one response are "
            "always zero; use 2 or more, or objective.advantages=reward"
        )
    return problems


def _lag_problems(correction: str, options: CorrectionOptions, resolved: ObjectivePreset, updates_per_batch: int) -> list[str]:
    problems = []
    if updates_per_batch > 1:
        problems.append(
            f"ais.lag=1: with train.updates_per_batch={updates_per_batch} old_logprobs are not the training forward's own; "
            "set ais.lag=0 or train.updates_per_batch=1"
        )
    if options.batch_normalise:
        problems.append(
            "ais.lag=1: correction_options.batch_normalise=true needs this batch's mean weight before the loss; set one of them off"
        )
    if correction in REJECTIONS and resolved.aggregation != "token":
        problems.append(
            f"ais.lag=1: correction={correction} with objective.aggregation={resolved.aggregation} needs the number of responses kept "
            "before the loss; set ais.lag=0 or objective.aggregation=token"
        )
    return problems
