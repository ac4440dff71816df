"""The training loop: prompts -> rollouts -> rewards -> logprobs -> diagnostics -> loss -> step -> sync.

SPMD: every rank runs these lines. What only one rank does is inside the callee; what can fail on one rank alone fails on
all together.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import torch

from ais_megatron.algorithm import ais
from ais_megatron.algorithm.advantages import group_relative_advantages, num_zero_signal_groups
from ais_megatron.algorithm.diagnostics import diagnose
from ais_megatron.batch import Batch, Rollout, assemble
from ais_megatron.config import Config
from ais_megatron.distributed import device, gather_batch, rank, rank_consistent, reduce_metrics
from ais_megatron.metrics import PhaseTimer, Sinks, read_metrics
from ais_megatron.policy import checkpoint
from ais_megatron.policy.calibration import Calibration
from ais_megatron.policy.policy import data_parallel_group, model_parallel_group
from ais_megatron.prompts import training_prompts
from ais_megatron.quantization.kv_scales import KVScales
from ais_megatron.report import write_report
from ais_megatron.run_folder import SUMMARY_FILE, open_run_folder, write_json_atomic
from ais_megatron.session import Session, build_session
from ais_megatron.summary import print_table, summarize
from ais_megatron.tasks import Reward
from ais_megatron.weight_sync import push


def train(config: Config) -> Path:
    """Run GRPO from the starting policy for `train.steps` steps; returns the run folder.

    Raises:
        ValueError: the configuration, a data file or a checkpoint cannot be used.
        RuntimeError: the engine or a gradient is corrupt. Both on all ranks together, before a weight has changed.
    """
    started = time.perf_counter()
    with rank_consistent():
        run_dir = open_run_folder(config, is_main=rank() == 0)
        sinks = Sinks(config, run_dir, is_main=rank() == 0)
    session = build_session(config)
    checkpoints = run_dir / "checkpoints"
    first, start_accuracy = begin(session, checkpoint.newest(checkpoints) if config.run.resume else None)
    if start_accuracy is None:
        start_accuracy = session.held_out_accuracy()
    _say(f"held-out pass@1 at the start: {start_accuracy:.1%}")
    sinks.truncate_after(first)
    accuracy = start_accuracy
    timer = PhaseTimer(torch.cuda.synchronize if device().type == "cuda" else None)
    with sinks:
        for step in range(first, config.train.steps):
            row = train_step(session, step, timer)
            done, is_last = step + 1, step + 1 == config.train.steps
            if is_last or (config.eval.every and done % config.eval.every == 0):
                with timer.phase("evaluate"):
                    accuracy = row["held_out_accuracy"] = session.held_out_accuracy()
            if is_last or (config.checkpoint.every and done % config.checkpoint.every == 0):
                with timer.phase("checkpoint"):
                    _save(session, checkpoints / f"step_{done:06d}", done, start_accuracy)
            sinks.log(done, row | timer.take())
    _finish(run_dir, start_accuracy, accuracy, time.perf_counter() - started)
    session.engine.close()
    return run_dir


def train_step(session: Session, step: int, timer: PhaseTimer) -> dict[str, object]:
    """One step, from prompts to an engine with the new weights; returns its row of metrics."""
    config, policy, engine = session.config, session.policy, session.engine
    began = time.perf_counter()
    with timer.phase("generate"), rank_consistent():
        prompts = training_prompts(session.task, session.tokenizer, step, config.rollout.prompts_per_step, session.share)
        rollouts = engine.generate(prompts, session.sampling) if prompts else []
    with timer.phase("reward"):
        with rank_consistent():
            rewards = session.score(rollouts)
            values = torch.tensor([r.value for r in rewards], dtype=torch.float32)
            advantages = group_relative_advantages(values, config.rollout.group_size, config.objective.std_floor)
            local = assemble(rollouts, values, advantages)
        batch = gather_batch(local, model_parallel_group())
    with timer.phase("logprobs"):
        old_logprobs, calibration = policy.logprobs_and_calibration(batch)
    with timer.phase("diagnose"):
        diagnostics = diagnose(
            old_logprobs, batch.rollout_logprobs, batch.advantages, batch.loss_mask, config.ais.weight_cap, data_parallel_group()
        )
        scaler = ais.loss_scaler(diagnostics, config)
    with timer.phase("train"):
        update = policy.train_step(batch, old_logprobs, scaler)
    with timer.phase("calibrate"):
        if config.calibration.mode == "fresh":
            calibration = policy.calibrate(batch)
    with timer.phase("sync"):
        push(policy, engine, config.rollout, _scales(config, calibration), version=step + 1)
    seconds = time.perf_counter() - began
    return {
        "alpha": scaler.alpha,
        **asdict(diagnostics),
        **update,
        **_rollout_metrics(session, rollouts, rewards, values, seconds),
        **_calibration_metrics(calibration),
        "weight_version": step,
        "time/step": seconds,
    }


def begin(session: Session, folder: Path | None, with_optimizer: bool = True) -> tuple[int, float | None]:
    """Give the engine its first weights: those of the checkpoint in `folder`, or the policy's own.

    Returns (steps done, held-out accuracy at the start of the run, None where this is the start).
    """
    config, policy = session.config, session.policy
    state = None
    if folder is not None:
        state = checkpoint.load(policy, folder, with_optimizer)
    if state is None or state.calibration is None:
        policy.calibrate(_prompt_batch(session))
    first = state.step if state else 0
    push(policy, session.engine, config.rollout, _scales(config, policy.calibrator.latest), version=first)
    return first, state.start_accuracy if state else None


def _prompt_batch(session: Session) -> Batch:
    """The first step's prompts alone: what there is to measure K and V on before the first response exists."""
    with rank_consistent():
        prompts = training_prompts(session.task, session.tokenizer, 0, session.config.rollout.prompts_per_step, session.share)
        rollouts = [Rollout(p, p.token_ids[-1:], (0.0,), "stop", -1) for p in prompts]
        local = assemble(rollouts, torch.zeros(len(prompts)), torch.zeros(len(prompts)))
    return gather_batch(local, model_parallel_group())


def _scales(config: Config, calibration: Calibration) -> KVScales | None:
    return None if config.calibration.mode == "off" else calibration.scales


def _save(session: Session, folder: Path, step: int, start_accuracy: float) -> None:
    state = checkpoint.TrainingState(step, start_accuracy, session.policy.calibrator.latest)
    checkpoint.save(session.policy, folder, state, session.config.checkpoint.keep)
    with rank_consistent():
        if rank() == 0:
            session.tokenizer.save(folder)


def _say(text: str) -> None:
    if rank() == 0:
        print(text, flush=True)


def _finish(run_dir: Path, start_accuracy: float, final_accuracy: float, wall_seconds: float) -> None:
    """summary.json, the report and the closing table."""
    with rank_consistent():
        if rank() == 0:
            summary = summarize(read_metrics(run_dir), start_accuracy, final_accuracy, wall_seconds)
            write_json_atomic(run_dir / SUMMARY_FILE, summary)
            print_table(summary, write_report(run_dir))


def _rollout_metrics(
    session: Session, rollouts: list[Rollout], rewards: list[Reward], values: torch.Tensor, seconds: float
) -> dict[str, float]:
    """Figures about the responses themselves, over the whole job: every response was generated by exactly one rank."""
    n = len(rollouts)
    tokens = sum(len(r.token_ids) for r in rollouts)
    group_size = session.config.rollout.group_size
    means = reduce_metrics(
        {
            "reward_mean": (float(values.sum()), n),
            "reward_square": (float(values.square().sum()), n),
            "accuracy": (sum(r.correct for r in rewards), n),
            "well_formed": (sum(r.well_formed for r in rewards), n),
            "response_length_mean": (tokens, n),
            "finished_fraction": (sum(r.finish_reason == "stop" for r in rollouts), n),
            "zero_signal_groups": (num_zero_signal_groups(values, group_size) if n else 0, n / group_size),
            "num_responses": (n, 1.0 / torch.distributed.get_world_size()),
        }
    )
    num_tokens = round(means["response_length_mean"] * means["num_responses"])
    variance = means.pop("reward_square") - means["reward_mean"] ** 2
    return {
        **means,
        "reward_std": max(variance, 0.0) ** 0.5,
        "num_response_tokens": num_tokens,
        "tokens_per_second": num_tokens / seconds,
    }


def _calibration_metrics(calibration: Calibration) -> dict[str, float]:
    scales = calibration.scales
    return {
        "k_scale_max": float(scales.k_scale.max()),
        "v_scale_max": float(scales.v_scale.max()),
        "q_amax": float(scales.q_amax.max()),
        "kv_saturated_fraction": calibration.saturated_fraction,
    }
