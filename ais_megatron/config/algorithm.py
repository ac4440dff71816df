"""The sections `correction_options`, `ais` and `objective`, and the presets of every correction and objective.

One word is enough to change the experiment (``correction=mis``, ``objective.name=gspo``). A setting that differs between
corrections or objectives is empty by default. Empty means the default of the chosen method, which the tables here give. Empty
values stay empty in a written configuration, so changing the word later also changes every setting that depends on it.
"""

from __future__ import annotations

import difflib
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple

from pydantic import Field, ValidationError, field_validator, model_validator

from ais_megatron.config import doors
from ais_megatron.config.section import Fraction, PositiveInt, Section

CorrectionName = Literal["none", "tis", "mis", "icepop", "geo_rs", "k3_rs", "ais"]
Level = Literal["token", "sequence", "geometric"]
REJECTIONS = ("geo_rs", "k3_rs")


class ObjectivePreset(NamedTuple):
    """Defaults of one objective. Every field but the last is also a key of the section `objective`, whose value wins if it is set."""

    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: str = "token"
    advantages: str = "group_std"
    dynamic_sampling: bool = False
    overlong_filter: bool = False
    sequence_level: bool = False
    """All tokens of a response have the same J. With ais.level=auto a response then gets one importance weight."""


# These are the papers' values: DAPO 2503.14476, Dr.GRPO 2503.20783, GSPO 2507.18071. CISPO (2506.13585) bounds its weights only
# from above; the bound here is 5, as in ScaleRL (2510.13786). TBPO (2604.07853) has wide bounds here, because its ratio starts
# at 1 in every batch. For many small updates per batch, bounds of GSPO's order of magnitude would fit better.
OBJECTIVE_PRESETS = {
    "grpo": ObjectivePreset(0.2, 0.2, "token", "group_std"),
    "dr_grpo": ObjectivePreset(0.2, 0.2, "constant", "group_mean"),
    "dapo": ObjectivePreset(0.2, 0.28, "token", "group_std", dynamic_sampling=True, overlong_filter=True),
    "gspo": ObjectivePreset(3e-4, 4e-4, "sequence", "group_std", sequence_level=True),
    "cispo": ObjectivePreset(1.0, 4.0, "token", "group_std"),
    "tbpo": ObjectivePreset(0.2, 0.2, "sequence", "group_std", sequence_level=True),
}
PRESET_KEYS = tuple(field for field in ObjectivePreset._fields if field != "sequence_level")
# (low, high): a correction keeps a token or a response whose weight lies in this band.
CORRECTION_BANDS = {"mis": (0.5, 2.0), "icepop": (0.5, 5.0), "geo_rs": (0.99, 1.01)}


class AISConfig(Section):
    """How alpha is computed. docs/algorithm.md explains the terms."""

    coefficient: Literal["auto", "measured", "product", "oracle", "constant"] = Field(
        "auto",
        description="how alpha is computed. measured: alpha and the limit of the weights with the least estimated error of the gradient. "
        "product: rho (1 - exp(-D / tau)) / max(1, nu). oracle: the alpha with the least estimated error of a scalar surrogate. constant: "
        "constant_alpha. auto: measured where each token has its own weight, and product where a response has one weight or with "
        "correction_options.batch_normalise=true",
    )
    caps: list[float] = Field(
        [1.5, 2.0, 3.0, 5.0, 10.0],
        min_length=1,
        description="with coefficient=measured: the caps to choose from, ascending; the gradient with the largest one counts as unbiased",
    )
    bands: list[list[float]] = Field(
        [],
        description="with coefficient=measured: further limits to choose from, for example [[0.5, 2.0]]; weights outside a band "
        "[low, high] become 0, as with correction=mis",
    )
    horizon: float = Field(
        10.0, gt=0.0, description="with coefficient=measured: number of batches over which training averages the noise of gradients"
    )
    prior: float = Field(
        10.0,
        ge=0.0,
        description="with coefficient=measured: number of batches that the assumption counts, that correcting is needed; 0: only what "
        "was measured counts, and then the first choices are mostly noise",
    )
    memory: float = Field(
        0.98,
        ge=0.0,
        lt=1.0,
        description="with coefficient=measured: a batch counts this much less than the next one; 0: only the latest counts",
    )
    constant_alpha: Fraction = Field(0.5, description="alpha if coefficient=constant")
    factors: list[Literal["reliability", "severity", "amplification"]] = Field(
        ["reliability", "severity", "amplification"],
        min_length=1,
        description="factors of coefficient=product: reliability is rho, severity is 1 - exp(-D / tau), amplification is 1 / max(1, nu); "
        "leave one out to see its effect",
    )
    level: Literal["auto", "token", "sequence"] = Field(
        "auto",
        description="token: one importance weight per token. sequence: one geometric-mean weight per response. auto: sequence for "
        "sequence-level objectives such as gspo and tbpo, else token",
    )
    tau: float | Literal["auto"] = Field(
        5e-4,
        description="divergence D (nats per token) at which alpha reaches 63 % of rho / max(1, nu); auto: the mean D of the first "
        "auto_batches batches",
    )
    auto_batches: PositiveInt = Field(10, description="with tau=auto: number of batches whose mean D becomes tau")
    ema: float = Field(0.0, ge=0.0, lt=1.0, description="weight of earlier batches in the moving average of alpha; 0: no average")
    lag: Literal[0, 1] = Field(0, description="1: use the previous batch's alpha, which saves the forward pass for old_logprobs")
    alpha_min: Fraction = Field(0.0, description="alpha is never smaller than this")
    alpha_max: Fraction = Field(1.0, description="alpha is never larger than this")
    weight_cap: float = Field(
        2.0, gt=1.0, description="C: importance weights above this value are truncated to it, for ais, tis and the diagnostics"
    )
    reliability: Literal["truncated", "raw"] = Field(
        "truncated", description="compute rho from the truncated importance weights or from the raw ones"
    )

    @model_validator(mode="after")
    def _range(self) -> AISConfig:
        if self.alpha_min > self.alpha_max:
            raise ValueError(f"alpha_min={self.alpha_min} must not exceed alpha_max={self.alpha_max}")
        if any(low >= high for low, high in pairwise([1.0, *self.caps])):
            raise ValueError(f"caps={self.caps}: must be ascending, and greater than 1")
        if any(len(band) != 2 or not 0.0 <= band[0] < 1.0 < band[1] for band in self.bands):
            raise ValueError(f"bands={self.bands}: each must be [low, high] with 0 <= low < 1 < high")
        if self.tau != "auto" and not self.tau > 0.0:
            raise ValueError(f"tau={self.tau} must be greater than 0, or auto")
        return self


class CorrectionOptions(Section):
    """Options of the corrections other than ais. An empty value means the correction's default in `CORRECTION_BANDS`."""

    level: Literal["auto", "token", "sequence", "geometric"] = Field(
        "auto",
        description="for tis and mis, with l = log pi_old - log mu. token: one weight exp(l) per token. sequence: exp(sum l) per "
        "response. geometric: exp(mean l) per response. auto: sequence for sequence-level objectives, else token",
    )
    low: float | None = Field(
        None,
        ge=0.0,
        description="mis, icepop, geo_rs: tokens or responses with a weight below this are dropped; empty: mis 0.5, icepop 0.5, geo_rs "
        "0.99",
    )
    high: float | None = Field(
        None,
        gt=0.0,
        description="mis, icepop, geo_rs: tokens or responses with a weight above this are dropped; empty: mis 2, icepop 5, geo_rs 1.01",
    )
    k3_limit: float = Field(2e-3, gt=0.0, description="k3_rs: a response with a larger mean k3 (nats per token) is dropped")
    two_sided: bool | None = Field(
        None,
        description="for ais and tis: also raise weights below 1 / ais.weight_cap to this value, so that log weights have the same limit "
        "on both sides; empty: true with objective.name=tbpo, else false",
    )
    batch_normalise: bool = Field(
        False,
        description="divide the weights by their mean over the global batch, after truncation. The mean is over tokens, or over "
        "responses if each response has one weight",
    )

    def band(self, correction: str) -> tuple[float, float]:
        """(low, high) of this correction, or (0, inf) if it has no band."""
        low, high = CORRECTION_BANDS.get(correction, (0.0, float("inf")))
        return low if self.low is None else self.low, high if self.high is None else self.high


class ObjectiveConfig(Section):
    """What is maximised. An empty value means the objective's default in `OBJECTIVE_PRESETS`."""

    name: str = Field(
        "grpo", description="grpo, dr_grpo, dapo, gspo, cispo, tbpo, or a function of your own as module:function (docs/extending.md)"
    )
    clip_low: Fraction | None = Field(
        None,
        description="policy ratios below 1 - clip_low are clipped; empty: the objective's default, as for all empty keys of this section",
    )
    clip_high: float | None = Field(None, ge=0.0, description="policy ratios above 1 + clip_high are clipped")
    aggregation: Literal["token", "sequence", "constant"] | None = Field(
        None,
        description="token: mean over all tokens. sequence: mean of each response, then mean over responses. constant: sum over tokens, "
        "divided by the number of responses times rollout.max_response_tokens",
    )
    advantages: Literal["group_std", "group_mean", "reward"] | None = Field(
        None,
        description="advantage of a response with reward R. group_std: (R - mean) / std of its group. group_mean: R - mean. reward: R, "
        "without a baseline",
    )
    std_floor: float = Field(1e-6, gt=0.0, description="added to a group's standard deviation of rewards before dividing by it")
    dynamic_sampling: bool | None = Field(None, description="replace groups whose rewards are all equal by groups of further prompts")
    max_refills: PositiveInt = Field(3, description="dynamic_sampling: most rounds of generation after the first one")
    overlong_filter: bool | None = Field(None, description="leave responses that were cut at rollout.max_response_tokens out of the loss")
    kl_coefficient: float = Field(
        0.0, ge=0.0, description="coefficient of a penalty on the KL divergence from the starting policy; 0: no penalty"
    )
    kl_estimator: Literal["k1", "k3"] = Field(
        "k3", description="estimator of that divergence, with d = log pi - log pi_ref: k3 is exp(-d) - 1 + d, k1 is d"
    )
    entropy_bonus: float = Field(0.0, ge=0.0, description="coefficient of the mean entropy, which is added to the objective; 0: no bonus")

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
        """The defaults of the objective `name`, without the settings in the file."""
        return own_preset(self.name) if doors.is_own(self.name) else OBJECTIVE_PRESETS[self.name]

    @property
    def resolved(self) -> ObjectivePreset:
        """The preset of `name`, with the settings in the file in place of its defaults."""
        return self.preset._replace(**{key: value for key in PRESET_KEYS if (value := getattr(self, key)) is not None})

    @property
    def is_sequence_level(self) -> bool:
        return self.preset.sequence_level


@lru_cache
def own_preset(name: str) -> ObjectivePreset:
    """The `ObjectivePreset(...)` that the user's module assigns to ``function.preset``, or GRPO's; see `doors.declared`."""
    return doors.declared("objective.name", name, "preset", ObjectivePreset())


def _check_preset(name: str, preset: ObjectivePreset) -> None:
    """Check a user's preset with the same rules as the keys of the section `objective`."""
    try:
        ObjectiveConfig(**{key: getattr(preset, key) for key in PRESET_KEYS})
    except ValidationError as error:
        wrong = "; ".join(f"{item['loc'][0]}={item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}" for item in error.errors())
        raise ValueError(f"objective.name={name!r}: its preset: {wrong}") from error


def measures_gradients(correction: str, ais: AISConfig, options: CorrectionOptions, objective: ObjectiveConfig) -> bool:
    """Whether alpha needs sketches of gradients."""
    if correction != "ais" or ais.coefficient not in ("auto", "measured"):
        return False
    return ais.coefficient == "measured" or not _measured_problems(ais, options, objective)


def weight_level(correction: str, ais: AISConfig, options: CorrectionOptions, objective: ObjectiveConfig) -> Level:
    """The level of the importance weights, with `auto` resolved."""
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
    """Settings of the algorithm that contradict each other, one line each, with both keys."""
    resolved, problems = objective.resolved, []
    low, high = options.band(correction)
    if low >= high:
        problems.append(f"correction_options.low={low}: must be below correction_options.high={high} (correction={correction})")
    if correction == "icepop" and options.level in ("sequence", "geometric"):
        problems.append(
            f"correction_options.level={options.level}: correction=icepop weights single tokens only; use correction=mis, or level=token"
        )
    if correction in REJECTIONS and options.level == "token":
        problems.append(
            f"correction_options.level=token: correction={correction} rejects whole responses; leave out correction_options.level"
        )
    if correction == "ais" and options.level != "auto":
        problems.append(f"correction_options.level={options.level}: correction=ais has its own key; set ais.level")
    if correction == "ais" and ais.coefficient == "measured":
        problems += _measured_problems(ais, options, objective)
    if ais.lag:
        problems += _lag_problems(correction, options, resolved, updates_per_batch)
    if resolved.advantages == "reward" and resolved.dynamic_sampling:
        problems.append(
            "objective.dynamic_sampling=true: with objective.advantages=reward even a group of equal rewards has a gradient, so nothing "
            "should be replaced; set objective.advantages to group_std or group_mean, or objective.dynamic_sampling=false"
        )
    if group_size == 1 and resolved.advantages != "reward":
        problems.append(
            f"rollout.group_size=1: the group-relative advantage (objective.advantages={resolved.advantages}) of a single response is "
            "always zero; use 2 or more, or objective.advantages=reward"
        )
    return problems


def _measured_problems(ais: AISConfig, options: CorrectionOptions, objective: ObjectiveConfig) -> list[str]:
    problems = []
    if weight_level("ais", ais, options, objective) != "token":
        problems.append(
            f"ais.coefficient=measured: weights single tokens, but with objective.name={objective.name} and ais.level={ais.level} "
            "a response has one weight; set ais.level=token, or ais.coefficient to product, oracle or constant"
        )
    if options.batch_normalise:
        problems.append(
            "ais.coefficient=measured: correction_options.batch_normalise=true needs the mean weight before C is chosen; set it to false"
        )
    return problems


def _lag_problems(correction: str, options: CorrectionOptions, resolved: ObjectivePreset, updates_per_batch: int) -> list[str]:
    problems = []
    if updates_per_batch > 1:
        problems.append(
            f"ais.lag=1: with train.updates_per_batch={updates_per_batch} the training forward pass does not give old_logprobs "
            "after the first update; set ais.lag=0 or train.updates_per_batch=1"
        )
    if options.batch_normalise:
        problems.append(
            "ais.lag=1: correction_options.batch_normalise=true needs this batch's mean weight before the loss; turn one of them off"
        )
    if correction in REJECTIONS and resolved.aggregation != "token":
        problems.append(
            f"ais.lag=1: correction={correction} with objective.aggregation={resolved.aggregation} needs the number of "
            "kept responses before the loss; set ais.lag=0 or objective.aggregation=token"
        )
    return problems
