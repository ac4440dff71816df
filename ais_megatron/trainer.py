"""The training loop: prompts -> rollouts -> rewards -> logprobs -> diagnostics -> loss -> step -> sync.

SPMD: every rank runs these lines. Work of a single rank is inside the called functions. If it fails, all ranks raise together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ais_megatron.algorithm.advantages import num_zero_signal_groups
from ais_megatron.algorithm.correction import Correction
from ais_megatron.batch import STALE, Batch, Rollout, assemble
from ais_megatron.cluster.watchdog import Watchdog
from ais_megatron.collection import Collected, batches_ahead, collect
from ais_megatron.config import Config
from ais_megatron.distributed import Unavailable, device, gather_batch, rank, rank_consistent, reduce_metrics
from ais_megatron.evaluation import Evaluations
from ais_megatron.interruption import stop_if_asked
from ais_megatron.policy import checkpoint
from ais_megatron.policy.calibration import Calibration
from ais_megatron.policy.parallel import model_parallel_group
from ais_megatron.policy.saver import Saver, checkpoint_to_resume, tidy
from ais_megatron.policy.training_state import TrainingState
from ais_megatron.prompts import training_prompts
from ais_megatron.quantization.kv_scales import KVScales
from ais_megatron.runs.exploration import num_distinct, num_solved_groups
from ais_megatron.runs.folder import SUMMARY_FILE, open_run_folder, write_json_atomic
from ais_megatron.runs.metrics import PhaseTimer, Sinks, read_metrics
from ais_megatron.runs.profiling import StepProfiler
from ais_megatron.runs.report import write_report
from ais_megatron.runs.samples import Sample, repetition, sample_of
from ais_megatron.runs.summary import print_table, summarize
from ais_megatron.session import Session, build_session
from ais_megatron.update import Update, lagged_update, update

LAST_TOKENS = 64  # of a response, in which repetition is measured every step: a loop shows there first


def train(config: Config) -> Path:
    """Run GRPO from the starting policy for `train.steps` steps and return the run folder.

    Raises:
        ValueError: the configuration, a data file or a checkpoint cannot be used.
        RuntimeError: the engine or a gradient is corrupt.
        Preempted: a signal asked the run to stop, and its state is saved.
    All ranks raise these errors together. ValueError and RuntimeError are raised before the step changes a weight.
    """
    started = time.perf_counter()
    with rank_consistent():
        run_dir = open_run_folder(config, is_main=rank() == 0)
        sinks = Sinks(config, run_dir, is_main=rank() == 0)
    session = build_session(config)
    checkpoints = run_dir / "checkpoints"
    tidy(checkpoints)
    resumed = checkpoint_to_resume(checkpoints, config.checkpoint) if config.run.resume else None
    if config.run.resume and resumed is None:
        _say(f"run.resume=true: there is no checkpoint in {checkpoints}, so the run starts at step 0")
    state = begin(session, resumed)
    evaluations = Evaluations(session, sinks)
    state = evaluations.begin(state)
    start_accuracy = state.start_accuracy
    assert start_accuracy is not None
    _say(f"held-out pass@1 at the start: {start_accuracy:.1%}")
    sinks.truncate_after(state.step)
    if resumed is not None:
        ahead = list(batches_ahead(session, state.next_prompt, config.train.steps - state.step))
        session.generator.resume(resumed, state.step - config.rollout.ahead, ahead)
    timer = PhaseTimer(torch.cuda.synchronize if device().type == "cuda" else None)
    on_cuda = device().type == "cuda"
    profiler = StepProfiler(config.run.profile_steps, config.run.profiler, run_dir, rank(), timer, on_cuda)
    saver = Saver(
        *(session.policy, checkpoints, config.checkpoint, state.step if resumed else None),
        add_files=session.tokenizer.save,
        add_own=session.generator.save,
        prepare=session.turns.trainer,
    )
    with closing(session.engine), sinks, Watchdog(config.run.watchdog_minutes, run_dir, rank()) as watchdog:
        while state.step < config.train.steps:
            stop_if_asked(saver, state)
            try:
                with profiler.step(state.step + 1):
                    row, state, outage, samples = train_step(session, state, timer, before_sync=lambda: evaluations.settle(timer))
            except Unavailable as error:  # there are no rollouts, so the policy is still that of `state`
                saver.save_now(state)
                raise _resumable(error, checkpoints) from error
            if profiler.has_recorded:
                with rank_consistent():
                    profiler.write()
            done, is_last = state.step, state.step == config.train.steps
            if not outage:
                row |= evaluations.after(done, timer)
            sinks.log_samples(samples)
            sinks.log(done, row | timer.take())  # before the checkpoint, because a run that resumes after it must find this row
            if outage:
                saver.save_now(state)
                raise _resumable(outage, checkpoints) from outage
            if is_last or (config.checkpoint.every and done % config.checkpoint.every == 0):
                with timer.phase("checkpoint"):
                    saver.save(state)
                    if not is_last:
                        session.turns.hand_back(session.sync.repeat)
            watchdog.beat()
        saver.finish()
    _finish(run_dir, start_accuracy, time.perf_counter() - started)
    return run_dir


def train_step(
    session: Session, state: TrainingState, timer: PhaseTimer, before_sync: Callable[[], None] = lambda: None
) -> tuple[dict[str, Any], TrainingState, Unavailable | None, list[Sample]]:
    """One step, from prompts to an engine with the new weights.

    Returns the metrics of the step, the state after it, the error if the engine could not get the new weights any more, and the
    responses to record (`metrics.samples_every`), on the main rank.

    before_sync: called on all ranks before the engine gets the new weights.

    Raises:
        Unavailable: no engine can generate rollouts. The step has changed nothing.
    """
    config, policy = session.config, session.policy
    began = time.perf_counter()
    collected = collect(session, state.next_prompt, timer)  # prompts -> rollouts -> rewards -> advantages
    for batch_ahead in batches_ahead(session, collected.next_prompt, config.train.steps - state.step - 1):
        session.generator.start(*batch_ahead)
    with timer.phase("sync"):
        session.turns.trainer()
    learn = lagged_update if config.ais.lag else update
    wants_samples = _wants_samples(config, state.step + 1)
    outcome = learn(policy, collected.batch, state.ais, timer, wants_samples)  # logprobs -> diagnostics -> alpha -> loss -> weights
    with timer.phase("calibrate"):
        calibration = policy.calibrate(collected.batch) if config.calibration.mode == "fresh" else outcome.calibration
    before_sync()
    with timer.phase("sync"):
        outage = _push(session, _scales(config, calibration), version=state.step + 1)
    samples = _samples(session, collected, outcome, state.step + 1) if wants_samples and rank() == 0 else []
    ended = time.perf_counter()
    seconds = ended - began
    row = {
        "alpha": outcome.alpha,
        **(_chosen_limit(outcome.correction) if config.measures_gradients else {}),
        **asdict(outcome.diagnostics),
        **outcome.metrics,
        **policy.work_metrics,
        **_rollout_metrics(session, collected, state.step, seconds),
        **_calibration_metrics(calibration),
        **_idle_shares(session, timer, began, ended),
        "time/step": seconds,
    }
    return row, replace(state, step=state.step + 1, next_prompt=collected.next_prompt, ais=outcome.state), outage, samples


def _chosen_limit(correction: Correction) -> dict[str, float]:
    """Above weight_cap and below weight_floor weights are limited, by truncation if there is no floor."""
    is_band = correction.name == "mis"
    return {"weight_cap": correction.high if is_band else correction.weight_cap, "weight_floor": correction.low if is_band else 0.0}


def _wants_samples(config: Config, step: int) -> bool:
    every = config.metrics.samples_every
    return bool(every) and (step in (1, config.train.steps) or step % every == 0)


def _samples(session: Session, collected: Collected, outcome: Update, step: int) -> list[Sample]:
    """The first responses that this rank both generated and trained on, so their texts and all their log-probabilities are here. A response
    outside the loss has no log-probabilities of the trainer."""
    batch, old = collected.batch, outcome.old_logprobs
    both = [(i, row) for i, row in enumerate(collected.rows) if row is not None and not collected.rollouts[i].is_dropped]
    if not both:
        _say(f"step {step}: the main rank trains on no response that it generated itself, so samples.jsonl gets none")
    samples = []
    for i, row in both[: session.config.metrics.samples]:
        rollout = collected.rollouts[i]
        start = len(rollout.prompt.token_ids)
        response = slice(start, start + len(rollout.token_ids))
        known = old[row, response].tolist() if old is not None and bool(batch.loss_mask[row, response].all()) else None
        advantage = float(batch.advantages[row])
        samples.append(sample_of(step, rollout, collected.rewards[i], advantage, known, session.tokenizer.decode, session.texts))
    return samples


def _push(session: Session, scales: KVScales | None, version: int) -> Unavailable | None:
    try:
        session.generator.settle()
        session.turns.servers()
        session.sync.push(scales, version)
    except Unavailable as outage:
        return outage
    return None


def _resumable(outage: Unavailable, checkpoints: Path) -> Unavailable:
    return Unavailable(f"{outage}. The run was saved in {checkpoints}; continue it with run.resume=true when there are servers again")


def begin(session: Session, folder: Path | None, with_optimizer: bool = True) -> TrainingState:
    """Give the engine its first weights, from the checkpoint in `folder` or from the policy. Returns the state of the run."""
    config, policy = session.config, session.policy
    if folder is not None and with_optimizer:
        session.turns.trainer()
    state = checkpoint.load(policy, folder, with_optimizer) if folder is not None else TrainingState()
    session.turns.servers()
    calibration = policy.calibrate(_prompt_batch(session)) if state.calibration is None else state.calibration
    session.sync.push(_scales(config, calibration), version=state.step)
    return state


def _prompt_batch(session: Session) -> Batch:
    """The first step's prompts as a batch, on which K and V are measured before the first response exists."""
    with rank_consistent():
        prompts = training_prompts(session.task, session.tokenizer, 0, session.config.rollout.prompts_per_step, session.share)
        rollouts = [Rollout(p, p.token_ids[-1:], (0.0,), "stop", -1) for p in prompts]
        local = assemble(rollouts, torch.zeros(len(prompts)), torch.zeros(len(prompts)))
    return gather_batch(local, model_parallel_group())


def _scales(config: Config, calibration: Calibration) -> KVScales | None:
    return None if config.calibration.mode == "off" else calibration.scales


def _say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


def _finish(run_dir: Path, start_accuracy: float, wall_seconds: float) -> None:
    """Write summary.json and the report, and print the closing table."""
    with rank_consistent():
        if rank() == 0:
            rows = read_metrics(run_dir)
            final_accuracy = next((a for row in reversed(rows) if (a := row.get("held_out_accuracy")) is not None), start_accuracy)
            summary = summarize(rows, start_accuracy, final_accuracy, wall_seconds)
            write_json_atomic(run_dir / SUMMARY_FILE, summary)
            print_table(summary, write_report(run_dir))


def _rollout_metrics(session: Session, collected: Collected, step: int, seconds: float) -> dict[str, float]:
    """Figures about all responses of the whole job, whether they are in the batch or not. Exactly one rank generated each response.

    repetition_at_the_end: `repetition` of the last `LAST_TOKENS` tokens, as a mean over responses.
    staleness: how many updates the trainer (at `step`) is ahead of the weights that sampled a token, as a mean over tokens.
    dropped_fraction, stale_fraction: responses without finite log-probabilities, and those older than `rollout.max_staleness`.
    """
    present = [not r.is_dropped for r in collected.rollouts]
    stale = sum(r.finish_reason == STALE for r in collected.rollouts)
    rollouts = [r for r in collected.rollouts if not r.is_dropped]
    rewards = [reward for reward in collected.rewards if not reward.is_missing]
    values = collected.values[~collected.values.isnan()]
    n, judged = len(rollouts), len(rewards)
    spans = [span for r in rollouts for span in r.versions_by_token]
    tokens = sum(len(r.token_ids) for r in rollouts)
    group_size = session.config.rollout.group_size
    means = reduce_metrics(
        {
            "reward_mean": (float(values.sum()), judged),
            "reward_square": (float(values.square().sum()), judged),
            "accuracy": (sum(r.correct for r in rewards), judged),
            "well_formed": (sum(r.well_formed for r in rewards), judged),
            "reward_errors": (n - judged, 1.0 / torch.distributed.get_world_size()),
            "response_length_mean": (tokens, n),
            "repetition_at_the_end": (sum(repetition(r.token_ids[-LAST_TOKENS:]) for r in rollouts), n),
            "finished_fraction": (sum(r.finish_reason == "stop" for r in rollouts), n),
            "staleness": (sum((step - version) * count for version, count in spans), tokens),
            "mixed_version_fraction": (sum(len(r.versions_by_token) > 1 for r in rollouts), n),
            "dropped_fraction": (len(present) - n - stale, len(present)),
            "stale_fraction": (stale, len(present)),
            "zero_signal_groups": (num_zero_signal_groups(collected.values, group_size) if present else 0, len(present) / group_size),
            "solved_groups": (num_solved_groups(collected.rewards, group_size), len(present) / group_size),
            "distinct_responses": (num_distinct(collected.rollouts, group_size), n),
            "num_responses": (n, 1.0 / torch.distributed.get_world_size()),
        }
    )
    num_tokens = round(means["response_length_mean"] * means["num_responses"])
    variance = means.pop("reward_square") - means["reward_mean"] ** 2
    return {
        **means,
        "reward_std": max(variance, 0.0) ** 0.5,
        "prompts_sampled": collected.prompts_sampled,
        "num_response_tokens": num_tokens,
        "tokens_per_second": num_tokens / seconds,
    }


def _idle_shares(session: Session, timer: PhaseTimer, began: float, ended: float) -> dict[str, float]:
    """Shares of a step in which the policy waits for responses and rewards (as a mean over ranks), and in which the engine generates
    nothing (as a mean over its servers or ranks). A replayed recording has no engine."""
    waiting = timer.seconds("generate", "reward") / (ended - began)
    shares = reduce_metrics({"idle/trainer": (waiting, 1.0)})
    return shares if session.config.rollout.engine_traits.replays else shares | {"idle/engine": session.generator.idle_share(began, ended)}


def _calibration_metrics(calibration: Calibration) -> dict[str, float]:
    scales = calibration.scales
    return {
        "k_scale_max": float(scales.k_scale.max()),
        "v_scale_max": float(scales.v_scale.max()),
        "q_amax": float(scales.q_amax.max()),
        "kv_saturated_fraction": calibration.saturated_fraction,
    }
