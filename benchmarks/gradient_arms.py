"""The corrections that `gradient_error.py` compares, as combinations of a few basic gradients.

A correction's gradient is linear in its tokens' weights, and alpha only mixes: g = g_none + alpha (g_full - g_none). So every rule that
chooses alpha and C by batch is a row of coefficients for each batch, on basic gradients that do not depend on the rule.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ais_megatron.algorithm import ais
from ais_megatron.algorithm.ais import AISState
from ais_megatron.algorithm.correction import METHODS, Correction, zero_outside_band
from ais_megatron.algorithm.diagnostics import Diagnostics, diagnose
from ais_megatron.algorithm.gradients import GradientSums
from ais_megatron.algorithm.measured import limits
from ais_megatron.algorithm.scaler import LossScaler
from ais_megatron.config import AISConfig, Config, ConfigError, build_config

TARGET = "bf16 rollouts"
"""The arm whose gradient the others should have."""

_DEFAULTS = {key: AISConfig().model_dump()[key] for key in ("bands", "horizon", "prior")}
MEASURED: dict[str, Any] = {"coefficient": "measured", **_DEFAULTS}  # also of a record that other defaults wrote
PRODUCT: dict[str, Any] = {"coefficient": "product", "tau": 5e-4}  # also of a record that another default of tau wrote

ARMS: dict[str, dict[str, Any]] = {
    TARGET: {"correction": "none", "rollout": {"quantization": "none", "kv_cache": "auto"}},
    "none": {"correction": "none"},
    "tis": {"correction": "tis"},
    "tis, C = 1.5": {"correction": "tis", "ais": {"weight_cap": 1.5}},
    "tis, C = 5": {"correction": "tis", "ais": {"weight_cap": 5.0}},
    "tis, geometric": {"correction": "tis", "correction_options": {"level": "geometric"}},
    "tis, sequence": {"correction": "tis", "correction_options": {"level": "sequence"}},
    "mis": {"correction": "mis"},
    "icepop": {"correction": "icepop"},
    "ais": {"correction": "ais", "ais": MEASURED},
    "ais, H = 100": {"correction": "ais", "ais": MEASURED | {"horizon": 100.0}},
    "ais without prior": {"correction": "ais", "ais": MEASURED | {"prior": 0.0}},
    "ais, H = 100 without prior": {"correction": "ais", "ais": MEASURED | {"horizon": 100.0, "prior": 0.0}},
    "ais, product": {"correction": "ais", "ais": PRODUCT},
    "ais, product, tau = 2e-3": {"correction": "ais", "ais": PRODUCT | {"tau": 2e-3}},
    "ais, product, tau = 1e-2": {"correction": "ais", "ais": PRODUCT | {"tau": 1e-2}},
    "ais, product, tau = auto": {"correction": "ais", "ais": PRODUCT | {"tau": "auto"}},
    "ais, product without rho": {"correction": "ais", "ais": PRODUCT | {"factors": ["severity", "amplification"]}},
    "ais, product without nu": {"correction": "ais", "ais": PRODUCT | {"factors": ["reliability", "severity"]}},
    "ais, product, C = 1.5": {"correction": "ais", "ais": PRODUCT | {"weight_cap": 1.5}},
    "ais, product, C = 5": {"correction": "ais", "ais": PRODUCT | {"weight_cap": 5.0}},
    "ais, product, sequence": {"correction": "ais", "ais": PRODUCT | {"level": "sequence"}},
    "ais, oracle": {"correction": "ais", "ais": {"coefficient": "oracle"}},
}

ALIGNED_ARMS: dict[str, dict[str, Any]] = {
    "aligned": {"correction": "none", "policy": {"forward_precision": "fp8_aligned"}},
    "aligned, tis": {"correction": "tis", "policy": {"forward_precision": "fp8_aligned"}},
}
"""Of an aligned trainer, with `--trainer aligned`."""

BASELINES = ("none", "tis, C = 1.5", "tis", "tis, C = 5", "mis", "icepop", "ais, product")
"""A new rule should be no worse than the best of these."""


@dataclass(frozen=True)
class BasicGradient:
    """One gradient per batch that needs a backward pass."""

    correction: Correction
    """At full strength."""
    quantised: bool = True
    """Whether the rollouts come from the quantised engine."""
    aligned: bool = False
    """Whether the trainer's forward pass is aligned with it."""

    @property
    def uncorrected(self) -> BasicGradient:
        """The same rollouts and trainer without weights."""
        return replace(self, correction=Correction("none"))


class Seen(NamedTuple):
    """What a rule for alpha and C gets of one batch."""

    old_logprobs: Tensor
    rollout_logprobs: Tensor
    advantages: Tensor
    loss_mask: Tensor
    gradients: Tensor | None
    """`GradientSums.flat`; None if no arm measures gradients."""


@dataclass(frozen=True)
class Mixture:
    """An arm's gradients as combinations of basic gradients."""

    coefficients: Tensor
    """float64 ``[batches, basic gradients]``."""
    alphas: list[float]
    limits: list[str]
    """C, or a band."""
    diagnostics: list[Diagnostics]
    """All by batch."""


def changed(config: Config, changes: dict[str, Any]) -> Config:
    """The configuration of an arm. Changes of a section leave its other keys as they are."""
    data = config.model_dump()
    return build_config(data | {key: data[key] | value if isinstance(value, dict) else value for key, value in changes.items()})


def possible_arms(config: Config, with_aligned: bool) -> tuple[dict[str, Config], dict[str, str]]:
    """The configuration of every arm, and why the others cannot be had.

    Raises:
        ConfigError: the target, or all arms of the aligned trainer that was asked for.
    """
    arms, refused = {TARGET: changed(config, ARMS[TARGET])}, {}
    for name, changes in (ARMS | (ALIGNED_ARMS if with_aligned else {})).items():
        try:
            arms[name] = changed(config, changes)
        except ConfigError as error:
            refused[name] = " ".join(str(error).split("\n"))
    if with_aligned and not arms.keys() & ALIGNED_ARMS.keys():
        raise ConfigError(f"--trainer aligned: {refused[next(iter(ALIGNED_ARMS))]}")
    return arms, refused


def at_full_strength(correction: Correction) -> Correction:
    """What alpha scales, with one form for all corrections that give tokens the same weights."""
    if correction.name == "none":
        return Correction("none")
    if METHODS[correction.name].limit is zero_outside_band:
        return Correction("mis", correction.level, low=correction.low, high=correction.high)
    return replace(correction, name="tis" if correction.name == "ais" else correction.name, batch_normalise=False)


def basic_gradient(config: Config, correction: Correction | None = None) -> BasicGradient:
    """What the correction mixes with the uncorrected gradient. correction: that of one batch, if it depends on the batch."""
    full = at_full_strength(correction or Correction.of(config))
    return BasicGradient(full, config.rollout.quantization != "none", config.policy.forward_precision == "fp8_aligned")


def limit_text(correction: Correction) -> str:
    """C, or the ends of a band, as a table shows it."""
    is_band = METHODS[correction.name].limit is zero_outside_band
    return f"{correction.low:g}-{correction.high:g}" if is_band else f"{correction.weight_cap:g}"


def basis(config: Config, arms: Iterable[Config]) -> list[BasicGradient]:
    """All basic gradients that the arms need, and those of every limit of the weights among which the measured coefficient chooses."""
    full = [basic_gradient(arm) for arm in arms]
    full += [basic_gradient(config, limit) for limit in limits(changed(config, {"correction": "ais"}))]
    return list(dict.fromkeys(vector for wanted in full for vector in (wanted.uncorrected, wanted)))


def choose(config: Config, seen: Seen, state: AISState) -> tuple[LossScaler, Diagnostics, AISState]:
    """What the configuration's rule does with one batch: its scaler, what it was told, and its state after the batch."""
    diagnostics = diagnose(*seen[:4], Correction.of(config))
    gradients = _of_limits(seen.gradients, config) if config.measures_gradients and seen.gradients is not None else None
    scaler, state = ais.loss_scaler(diagnostics, config, state, gradients)
    return scaler, diagnostics, state


def _of_limits(gradients: Tensor, config: Config) -> GradientSums:
    """The sums of this arm's limits. The record may have bands behind them, which the arm does without."""
    sums, kept = GradientSums.of(gradients), 1 + len(limits(config))
    return sums._replace(sums=sums.sums[:kept], products=sums.products[:kept, :kept])


def mixture(config: Config, vectors: list[BasicGradient], batches: list[Seen]) -> Mixture:
    """What the rule of this configuration does with these batches, one after the other.

    Raises:
        KeyError: it needs a gradient that is not among `vectors`.
    """
    place = {vector: number for number, vector in enumerate(vectors)}
    result = Mixture(torch.zeros(len(batches), len(vectors), dtype=torch.float64), [], [], [])
    state = AISState()
    for row, seen in zip(result.coefficients, batches, strict=True):
        scaler, diagnostics, state = choose(config, seen, state)
        full = basic_gradient(config, scaler.correction)
        row[place[full.uncorrected]] += (1.0 - scaler.alpha) / scaler.mean_weight
        if scaler.alpha:
            if full not in place:
                raise KeyError(f"no gradient of {full.correction} was taken; ais.caps are {config.ais.caps}")
            row[place[full]] += scaler.alpha / scaler.mean_weight
        result.alphas.append(scaler.alpha)
        result.limits.append(limit_text(scaler.correction))
        result.diagnostics.append(diagnostics)
    return result
