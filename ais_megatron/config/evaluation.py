"""The section `eval`: on which sets of held-out problems the policy is measured, how, and how often."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError, field_validator

from ais_megatron.config.errors import explain
from ais_megatron.config.section import PositiveInt, Section
from ais_megatron.config.task import TaskConfig

HELD_OUT = "held_out"
"""The name of the only set of a run without `eval.sets`."""
PROMPTS_PER_SET = 2**24


class EvalSet(Section):
    """One set of held-out problems. What it leaves empty comes from the run's own settings."""

    task: dict[str, Any] = Field(
        {},
        description="keys of the section task that differ in this set, such as test_path. If name is one of them, the set starts from the "
        "defaults of that section, except for the run's system_prompt and template_kwargs, else from the run's own task",
    )
    num_prompts: PositiveInt | None = Field(None, description="number of problems; all of them if there are fewer; empty: eval.num_prompts")
    samples: PositiveInt | None = Field(None, description="number of responses per problem; empty: eval.samples")
    max_response_tokens: PositiveInt | None = Field(
        None, description="a response is cut at this length, which may be above rollout.max_response_tokens; empty: that one"
    )
    temperature: float | None = Field(None, ge=0.0, description="sampling temperature; 0: greedy; empty: eval.temperature")
    top_p: float = Field(
        1.0, gt=0.0, le=1.0, description="sample only from the likeliest tokens that together have this probability; 1: from all tokens"
    )
    ks: list[PositiveInt] = Field([], description="which pass@k to report, each k at most samples; empty: 1 and samples")


class EvalConfig(Section):
    every: int = Field(0, ge=0, description="number of steps between held-out evaluations; 0: only at the start and at the end")
    num_prompts: PositiveInt = Field(256, description="number of held-out problems in an evaluation; all of them if there are fewer")
    samples: PositiveInt = Field(1, description="number of responses per held-out prompt; pass@1 is their mean")
    temperature: float = Field(1.0, ge=0.0, description="sampling temperature in evaluations; 0: greedy")
    blocking: bool = Field(
        True,
        description="false: an evaluation during the run shares the engine with the next step, which need not wait for it; needs an engine "
        "that takes requests meanwhile (sglang). At the start and at the end the run always waits",
    )
    sets: dict[str, EvalSet] = Field(
        {},
        description="sets of problems by name, all measured in every evaluation. The first one gives held_out_accuracy and the accuracies "
        "of summary.json. Empty: one set called held_out, with the settings above and the run's own task",
    )

    @field_validator("sets")
    @classmethod
    def _names_fit_into_keys(cls, sets: dict[str, EvalSet]) -> dict[str, EvalSet]:
        for name in sets:
            if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
                raise ValueError(f"the name {name!r} may only have letters, digits, _ and -; rename this set")
        return sets


@dataclass(frozen=True)
class EvaluationSet:
    """An `EvalSet` in which nothing is left empty. The fields are those of `EvalSet`, except for those that are described here."""

    name: str
    task: TaskConfig
    """The whole section `task` of this set."""
    num_prompts: int
    samples: int
    max_response_tokens: int
    temperature: float
    top_p: float
    ks: tuple[int, ...]
    """Each k of pass@k, in ascending order. 1 is always one of them."""

    @property
    def first_index(self) -> int:
        """The index of the set's first prompt; the others count down from it. It is negative, unlike a training prompt's.

        It depends only on the set's name. So a set draws the same random numbers whatever other sets there are, and no two sets draw
        the same.
        """
        if self.name == HELD_OUT:
            return -1
        digest = hashlib.blake2b(self.name.encode(), digest_size=4).digest()
        return -1 - PROMPTS_PER_SET * (1 + int.from_bytes(digest))


def evaluation_sets(config: EvalConfig, task: TaskConfig, max_response_tokens: int) -> list[EvaluationSet]:
    """The sets of a run, in the order of the configuration.

    Args:
        task: of the run. max_response_tokens: of its rollouts.
    Raises:
        ValueError: a set's `task` is wrong, or a k is larger than the number of samples. One line for each problem.
    """
    found, problems = [], []
    for name, chosen in (config.sets or {HELD_OUT: EvalSet()}).items():
        samples = chosen.samples or config.samples
        if too_large := [k for k in chosen.ks if k > samples]:
            problems.append(
                f"eval.sets.{name}.ks={chosen.ks}: pass@{too_large[0]} needs {too_large[0]} responses per problem, but samples={samples}; "
                f"raise eval.sets.{name}.samples, or leave out this k"
            )
        prompting = {"system_prompt": task.system_prompt, "template_kwargs": task.template_kwargs}  # these belong to the model
        start = prompting if "name" in chosen.task else task.model_dump()
        try:
            own_task = TaskConfig(**(start | chosen.task))
        except ValidationError as error:
            problems += _explained(error, f"eval.sets.{name}.task.")
            continue
        found.append(
            EvaluationSet(
                name=name,
                task=own_task,
                num_prompts=chosen.num_prompts or config.num_prompts,
                samples=samples,
                max_response_tokens=chosen.max_response_tokens or max_response_tokens,
                temperature=config.temperature if chosen.temperature is None else chosen.temperature,
                top_p=chosen.top_p,
                ks=tuple(sorted({1, *(chosen.ks or (samples,))})),
            )
        )
    if problems:
        raise ValueError("\n".join(problems))
    return found


def _explained(error: ValidationError, prefix: str) -> list[str]:
    """What is wrong with a set's `task`, with the keys as the user wrote them. The section calls its own keys ``task.KEY``."""
    own_key = re.compile(rf"\btask\.(?={'|'.join(TaskConfig.model_fields)}\b)")
    lines = []
    for line in explain(error, TaskConfig).splitlines():
        found = own_key.search(line)
        lines.append(own_key.sub(prefix, line[found.start() :]) if found else prefix + line)
    return lines
