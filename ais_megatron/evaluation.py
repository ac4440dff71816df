"""Measures the policy on sets of held-out problems (`eval.sets`): prompts -> rollouts -> rewards -> scores.

`Evaluator` measures the engine's current weights. `Evaluations` decides when a run does so: at its start, every `eval.every` steps and at
its end. With ``eval.blocking=false`` the responses are generated while the next step goes on, and collected before the weights change.
`algorithm.estimates` says what pass@k is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from ais_megatron.algorithm.estimates import Estimate, Moments, estimate, moments, pass_at_k
from ais_megatron.batch import Prompt, Rollout
from ais_megatron.config import EvaluationSet
from ais_megatron.distributed import LOCAL_ERRORS, all_reduce_sum, device, rank, rank_consistent, use_device
from ais_megatron.policy.training_state import TrainingState
from ais_megatron.prompts import held_out_prompts, within_limit
from ais_megatron.rollout.engine import SamplingParams
from ais_megatron.runs.metrics import MetricsRow, PhaseTimer, Sinks, evaluation_metrics
from ais_megatron.session import Session, denoising
from ais_megatron.tasks import Reward, make_task
from ais_megatron.tokenizer import make_tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """What one set of problems says about the policy."""

    name: str
    problems: int
    """Number of problems with at least one response."""
    responses: int
    """Number of responses that are judged, without dropped ones."""
    dropped: int
    """Number of responses without finite log-probabilities, or that the reward could not judge. Nothing else counts them."""
    passes: dict[int, Estimate]
    """pass@k by k. Problems with fewer than k responses do not count."""
    reward: Estimate
    well_formed: float
    """Share of responses with a well-formed answer."""
    truncated: float
    """Share of responses that were cut at the length limit."""
    response_length: float
    """Mean number of tokens of a response."""

    def in_words(self) -> str:
        """The figures to watch, in one line."""
        passes = [f"pass@{k} {value.mean:.1%} ± {value.error:.1%}" for k, value in self.passes.items()]
        dropped = [f"{self.dropped} responses dropped"] if self.dropped else []
        return ", ".join([*passes, f"{self.truncated:.1%} truncated", f"{self.problems} problems", *dropped])

    @property
    def figures(self) -> dict[str, float]:
        """Names and values for metrics and files."""
        passes = {f"pass@{k}{suffix}": v for k, both in self.passes.items() for suffix, v in zip(("", "_se"), both, strict=True)}
        return {
            **passes,
            "reward_mean": self.reward.mean,
            "reward_mean_se": self.reward.error,
            "well_formed": self.well_formed,
            "truncated_fraction": self.truncated,
            "response_length_mean": self.response_length,
            "problems": self.problems,
            "responses": self.responses,
            "dropped": self.dropped,
        }


@dataclass(frozen=True)
class _Part:
    """A set, prepared for every evaluation of the run."""

    chosen: EvaluationSet
    session: Session
    """The run's session, with the task of this set, and its tokenizer if the set has another system prompt or template variables."""
    prompts: list[Prompt]
    """This rank's share."""
    sampling: SamplingParams


class Evaluator:
    """Measures the engine's current weights on all sets. All methods are collective.

    Raises:
        ValueError: a file of problems cannot be read, a prompt is too long, or the engine cannot do what ``eval.blocking=false`` asks for.
            All ranks raise it together.
    """

    def __init__(self, session: Session) -> None:
        config, self._engine = session.config, session.engine
        self._thread = ThreadPoolExecutor(1, "evaluation", initializer=use_device, initargs=(device(),))
        self._running: tuple[int, Future[list[list[Rollout] | Exception]]] | None = None
        with rank_consistent():
            self._parts = [_prepare(session, chosen) for chosen in config.evaluation_sets]
            if not config.eval.blocking and not session.engine.takes_updates_while_generating:
                engine = config.rollout.engine
                raise ValueError(f"eval.blocking=false: rollout.engine={engine} answers one call at a time; set eval.blocking=true")

    @property
    def names(self) -> list[str]:
        """The sets, in the order of the configuration. The first one gives ``held_out_accuracy``."""
        return [part.chosen.name for part in self._parts]

    @property
    def is_running(self) -> bool:
        """Whether an evaluation was started and not collected."""
        return self._running is not None

    def evaluate(self) -> list[Scores]:
        """The scores of the engine's current weights. Raises as `Generator.rollouts`."""
        return [_scores(part, part.session.generator.rollouts(part.prompts, part.sampling)) for part in self._parts]

    def start(self, step: int) -> None:
        """Start to generate with the engine's current weights, those after `step`. `collect` must be called before they change."""
        assert self._running is None, "one evaluation at a time"
        self._running = (step, self._thread.submit(self._generate))

    def collect(self) -> tuple[int, list[Scores]]:
        """Wait for the evaluation that was started. Returns its step and scores.

        A set is missing if the engine failed or lost its weights meanwhile. The policy has gone on, so nothing can be asked again. A
        warning says so, and the next evaluation measures all sets again.

        Raises:
            ValueError: a prompt is wrong. All ranks raise it together.
        """
        assert self._running is not None, "no evaluation was started"
        (step, future), self._running = self._running, None
        results = future.result()
        with rank_consistent():
            for result in results:
                if isinstance(result, ValueError):
                    raise result
        scores = []
        for part, result in zip(self._parts, results, strict=True):
            rollouts = [] if isinstance(result, Exception) else result
            if isinstance(result, Exception):
                logger.warning("the weights after step %d are not measured on %s: %s", step, part.chosen.name, result)
            if not _any_rank(isinstance(result, Exception)):
                scores.append(_scores(part, rollouts))
        return step, scores

    def _generate(self) -> list[list[Rollout] | Exception]:
        """This rank's responses to every set, or the error in their place. Runs in the thread."""
        results: list[list[Rollout] | Exception] = []
        for part in self._parts:
            try:
                results.append(self._engine.generate(part.prompts, part.sampling) if part.prompts else [])
            except LOCAL_ERRORS as error:
                results.append(error)
        return results


class Evaluations:
    """The evaluations of a run: when they happen, and where they are recorded. All methods are collective."""

    def __init__(self, session: Session, sinks: Sinks) -> None:
        self._config, self._sinks, self._evaluator = session.config, sinks, Evaluator(session)

    def begin(self, state: TrainingState) -> TrainingState:
        """Measure the weights of `state` at the start of a run, and if the run was stopped before the evaluation after its last step had
        ended. Records of later steps are removed, because a resumed run will repeat them."""
        missing = state.start_accuracy is None or (state.step > 0 and self._is_due(state.step) and not self._is_recorded(state.step))
        self._sinks.truncate_evaluations_after(state.step - 1 if missing else state.step)
        if not missing:
            return state
        scores = self._evaluator.evaluate()
        self._record(state.step, scores)
        return state if state.start_accuracy is not None else replace(state, start_accuracy=scores[0].passes[1].mean)

    def after(self, step: int, timer: PhaseTimer) -> MetricsRow:
        """Measure the weights after `step` if it is time. Returns what belongs into the row of the step: nothing if the evaluation goes
        on during the next step."""
        if not self._is_due(step):
            return {}
        if not self._config.eval.blocking and step < self._config.train.steps:
            self._evaluator.start(step)
            return {}
        with timer.phase("evaluate"):
            scores = self._evaluator.evaluate()
        return self._record(step, scores, in_a_row=True)

    def settle(self, timer: PhaseTimer) -> None:
        """Before an update of the engine's weights, finish an evaluation that is going on."""
        if self._evaluator.is_running:
            with timer.phase("evaluate"):
                step, scores = self._evaluator.collect()
            self._record(step, scores)

    def _is_due(self, step: int) -> bool:
        every = self._config.eval.every
        return step == self._config.train.steps or (every > 0 and step % every == 0)

    def _is_recorded(self, step: int) -> bool:
        """Whether all sets were measured after `step`. The main rank looks, and all ranks agree."""
        missing = False
        with rank_consistent():
            if rank() == 0:
                missing = not self._sinks.has_evaluation(step, self._evaluator.names)
        return not _any_rank(missing)

    def _record(self, step: int, scores: Sequence[Scores], in_a_row: bool = False) -> MetricsRow:
        """Write the scores of the weights after `step`, and return them as metrics.

        in_a_row: they will also be in the row of the step.
        """
        first = self._evaluator.names[0]
        rows = [{"set": s.name, **s.figures} | ({"held_out_accuracy": s.passes[1].mean} if s.name == first else {}) for s in scores]
        self._sinks.log_evaluation(step, rows, in_a_row)
        if self._config.eval.sets or (step and not in_a_row):
            for s in scores:
                self._sinks.say(f"evaluation after step {step}  {s.name}: {s.in_words()}")
        return evaluation_metrics(rows)


def _any_rank(flag: bool) -> bool:
    return bool(all_reduce_sum(torch.tensor([flag], dtype=torch.float64)).item())


def _prepare(session: Session, chosen: EvaluationSet) -> _Part:
    config, task, tokenizer = session.config, session.task, session.tokenizer
    if chosen.task != config.task:
        rollout = config.rollout.model_copy(update={"max_response_tokens": chosen.max_response_tokens})
        own = config.model_copy(update={"task": chosen.task, "rollout": rollout})
        task = make_task(chosen.task, config.run.seed)
        if (chosen.task.system_prompt, chosen.task.template_kwargs) != (config.task.system_prompt, config.task.template_kwargs):
            tokenizer = make_tokenizer(own, task)
        task, notes = within_limit(task, tokenizer, own, splits=("test",))
        for note in notes if rank() == 0 else ():
            print(f"eval.sets.{chosen.name}: {note}", flush=True)
    prompts = held_out_prompts(task, tokenizer, chosen.num_prompts, session.share, chosen.first_index)
    longest, limit = max((len(prompt.token_ids) for prompt in prompts), default=0), config.architecture.max_position_embeddings
    if config.eval.sets and longest + chosen.max_response_tokens > limit:
        raise ValueError(
            f"eval.sets.{chosen.name}.max_response_tokens={chosen.max_response_tokens}: too large for a prompt of {longest} tokens with "
            f"max_position_embeddings={limit}; lower it to at most {max(limit - longest, 0)}, or leave out this problem"
        )
    sampling = SamplingParams(
        num_samples=chosen.samples,
        max_tokens=chosen.max_response_tokens,
        temperature=chosen.temperature,
        top_p=chosen.top_p,
        seed=config.run.seed,
        denoising=denoising(config, 0),
    )
    return _Part(chosen, replace(session, task=task, tokenizer=tokenizer), prompts, sampling)


def _scores(part: _Part, rollouts: Sequence[Rollout]) -> Scores:
    """Judge this rank's responses, and add up those of all ranks with one all-reduce. One rank has all responses to a problem."""
    with rank_consistent():
        judged = [pair for pair in zip(rollouts, part.session.score(list(rollouts)), strict=True) if not pair[1].is_missing]
    present, rewards = [rollout for rollout, _ in judged], [reward for _, reward in judged]
    by_problem: dict[int, list[Reward]] = {}
    for rollout, reward in judged:
        by_problem.setdefault(rollout.prompt.index, []).append(reward)
    correct = [(sum(r.correct for r in answers), len(answers)) for answers in by_problem.values()]
    sums = [moments([(sum(r.value for r in answers), len(answers)) for answers in by_problem.values()])]
    for k in part.chosen.ks:
        sums.append(moments(correct if k == 1 else [(pass_at_k(n, c, k), 1) for c, n in correct if n >= k]))
    counts = [
        *(len(by_problem), len(present), len(rollouts) - len(present), sum(r.well_formed for r in rewards)),
        *(sum(r.finish_reason == "length" for r in present), sum(len(r.token_ids) for r in present)),
    ]
    totals = all_reduce_sum(torch.tensor([*counts, *(value for of in sums for value in of)], dtype=torch.float64)).tolist()
    problems, responses, dropped, well_formed, truncated, tokens = (round(total) for total in totals[: len(counts)])
    size = len(Moments._fields)
    value, *passes = (estimate(Moments(*totals[i : i + size])) for i in range(len(counts), len(totals), size))
    return Scores(
        name=part.chosen.name,
        problems=problems,
        responses=responses,
        dropped=dropped,
        passes=dict(zip(part.chosen.ks, passes, strict=True)),
        reward=value,
        well_formed=_share(well_formed, responses),
        truncated=_share(truncated, responses),
        response_length=_share(tokens, responses),
    )


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")
