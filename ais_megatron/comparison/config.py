"""Reads a comparison's file. A base experiment, named arms, seeds and tasks become one checked list of runs.

```
base: tiny_countdown.yaml             # relative to this file, or absolute
dir: runs/compare                     # every run has its own folder TASK/ARM/seed_N in it
seeds: [0, 1, 2]
overrides: {train.steps: 100}         # for every run; keys with dots, or nested as in the base
tasks:                                # empty: only the task of the base
  easy: {task.max_number: 20}
arms:                                 # the others are compared with the first one, unless `reference` names another
  bf16: {rollout.quantization: none, correction: none}
  ais: {correction: ais}
threshold: 0.5
```
A run's configuration starts with the base. Then `overrides`, its task, its arm and its seed are applied in this order. All runs are
checked before the first one starts.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, model_validator

from ais_megatron.config import Config, ConfigError, explain, load_config, read_yaml
from ais_megatron.config.section import Fraction, Section

OWN_KEYS = ("run.dir", "run.seed", "run.resume")  # the comparison sets these
_PLAIN = re.compile(r"[\w./+-]+")


def _is_name(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+", name):
        raise ValueError(f"{name!r} is used as the name of a folder; use only letters, digits and _ . -")
    return name


Name = Annotated[str, AfterValidator(_is_name)]
Overrides = dict[str, Any]


class Comparison(Section):
    base: str = Field(description="configuration file that the arms change; relative to the comparison's file")
    dir: str = Field(description="folder of all runs, the table and the figure")
    seeds: list[int] = Field(
        [0, 1, 2], min_length=1, description="values of run.seed: it decides weights, warm start, prompts and sampling"
    )
    overrides: Overrides = Field({}, description="changes to the base for every run")
    tasks: dict[Name, Overrides] = Field({}, description="changes to the base for each task; empty: only the task of the base")
    arms: dict[Name, Overrides] = Field(min_length=1, description="changes to the base for each arm")
    reference: str | None = Field(None, description="arm with which the others are compared, seed by seed; empty: the first one")
    threshold: Fraction = Field(0.5, description="held-out accuracy; the table says when a run reached it")
    collapse: Fraction = Field(0.5, description="a run whose last held-out accuracy is below this share of its best has collapsed")
    contrasts: list[tuple[str, str]] = Field(
        [],
        description="pairs of arms, [ARM, AGAINST], that are tested against each other, with p values corrected for their number; choose "
        "them before the runs; empty: each arm against the reference",
    )
    final_eval: Overrides | None = Field(
        None, description="changes to a finished run under which its last policy is evaluated again, e.g. rollout.quantization: none"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Comparison:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={self.seeds}: a seed occurs twice; name each seed once")
        if self.reference is not None and self.reference not in self.arms:
            raise ValueError(f"reference={self.reference}: unknown arm; allowed: {', '.join(self.arms)}")
        for pair in self.contrasts:
            for arm in pair:
                if arm not in self.arms:
                    raise ValueError(f"contrasts={list(pair)}: {arm} is not an arm; allowed: {', '.join(self.arms)}")
            if pair[0] == pair[1]:
                raise ValueError(f"contrasts={list(pair)}: compares an arm with itself; name two arms")
        return self

    @property
    def reference_arm(self) -> str:
        return self.reference or next(iter(self.arms))

    @property
    def tested_pairs(self) -> list[tuple[str, str]]:
        """(arm, the arm it is tested against)."""
        return self.contrasts or [(arm, self.reference_arm) for arm in self.arms if arm != self.reference_arm]


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    task: str
    arm: str
    seed: int
    base: Path
    folder: Path
    overrides: tuple[str, ...]
    """Everything that is changed in the base, as ``key=value``."""
    config: Config

    @property
    def name(self) -> str:
        return f"{self.task}/{self.arm}/{self.seed}"


def load_comparison(path: str | Path, overrides: Sequence[str] = ()) -> tuple[Comparison, list[Cell]]:
    """Read a comparison's file and check every run in it.

    The runs are in the order of the seeds. If a comparison is interrupted, the finished runs can then be compared.

    Raises:
        ConfigError: a mistake in the file, or in the configuration of a run. The message names the run's task and arm.
    """
    path = Path(path)
    try:
        comparison = Comparison(**read_yaml(path, list(overrides)))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, Comparison)}") from error
    base = path.parent / comparison.base
    tasks = comparison.tasks or {load_config(base, as_dotlist(comparison.overrides, path, "overrides")).task.name: {}}
    cells = [
        _cell(comparison, path, base, (task, task_changes), (arm, arm_changes), seed)
        for seed in comparison.seeds
        for task, task_changes in tasks.items()
        for arm, arm_changes in comparison.arms.items()
    ]
    return comparison, cells


def _cell(comparison: Comparison, path: Path, base: Path, task: tuple[str, Overrides], arm: tuple[str, Overrides], seed: int) -> Cell:
    changes = [
        *as_dotlist(comparison.overrides, path, "overrides"),
        *as_dotlist(task[1], path, f"tasks.{task[0]}"),
        *as_dotlist(arm[1], path, f"arms.{arm[0]}"),
    ]
    folder = Path(comparison.dir) / task[0] / arm[0] / f"seed_{seed}"
    changes += [f"run.seed={seed}", f"run.dir={folder}"]
    changes = [
        f"{key}={value}" for key, value in dict(change.split("=", 1) for change in changes).items()
    ]  # keeps the last value of each key
    try:
        config = load_config(base, changes)
    except ConfigError as error:
        raise ConfigError(f"{path}: task {task[0]}, arm {arm[0]}: {error}") from error
    return Cell(task[0], arm[0], seed, base, folder, tuple(changes), config)


def as_dotlist(changes: Mapping[str, Any], path: Path, where: str) -> list[str]:
    """Nested or dotted changes as ``key=value``.

    Raises:
        ConfigError: one of `OWN_KEYS` is among them.
    """
    flat = _flatten(changes)
    for key in OWN_KEYS:
        if key in flat:
            raise ConfigError(f"{path}: {where}.{key}={flat[key]}: the comparison sets this key itself for every run; leave it out")
    return [f"{key}={value if isinstance(value, str) and _PLAIN.fullmatch(value) else json.dumps(value)}" for key, value in flat.items()]


def _flatten(changes: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in changes.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def select(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells that a selection names (ARM, ARM/SEED or TASK/ARM/SEED), in the order of `cells`. Without a selection, all cells.

    Raises:
        ConfigError: a selection names no cell.
    """
    names = [{cell.name, f"{cell.arm}/{cell.seed}", cell.arm} for cell in cells]
    for selection in only:
        if not any(selection in known for known in names):
            near = difflib.get_close_matches(selection, sorted(set().union(*names)), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"--only {selection}: there is no such run{hint} Write ARM, ARM/SEED or TASK/ARM/SEED")
    return [cell for cell, known in zip(cells, names, strict=True) if not only or known & set(only)]
