"""Whole GRPO steps on one GPU, through the trainer's own code: seconds of each phase, tokens per second, memory.

    python benchmarks/gpu/end_to_end.py          [--device cpu --tiny] [--layers 28] [--steps 3]

First the model of configs/tiny_countdown.yaml through `train()`: warm start, steps with FP8 rollouts, evaluation, checkpoint, and one
step more after resuming. Then a Qwen3-0.6B-shaped model with random weights through `begin` and `train_step`, once with BF16 and once with
FP8 rollouts. Random weights say nothing that a real task could reward, so its task (`EvenNumbers`) counts the even token ids of a
response, which any model gets half right. NOT YET RUN ON A GPU.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from bench import Bench, Figure, mib, ms, number
from model import QWEN3_0_6B, layers_of, make_config

from ais_megatron.config import Config, load_config
from ais_megatron.distributed import init_process_group
from ais_megatron.policy.parallel import initialize_parallel
from ais_megatron.policy.policy import Policy
from ais_megatron.policy.training_state import TrainingState
from ais_megatron.rollout.local.engine import LocalEngine
from ais_megatron.runs.metrics import PhaseTimer, read_metrics
from ais_megatron.session import Session, with_engine
from ais_megatron.tasks.task import Problem, Reward
from ais_megatron.tokenizer import Turns
from ais_megatron.trainer import begin, train, train_step
from ais_megatron.weight_sync import weight_stream

TINY_CONFIG = Path(__file__).parents[2] / "configs" / "tiny_countdown.yaml"
ROLLOUTS = {"BF16": "none", "FP8": "fp8_e4m3"}
PHASE_KEYS = ("time/generate", "time/logprobs", "time/train", "time/sync")
Metrics = Mapping[str, float]


def main() -> None:
    def options(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--layers", type=int, default=28)
        parser.add_argument("--steps", type=int, default=3, help="GRPO steps of each kind; the first warms up and is not counted")

    bench = Bench(__doc__, options)
    bench.rounds = 2 if bench.tiny or bench.options.only_checks else max(2, bench.options.steps)
    init_process_group(bench.device.type)
    phases = ("step", "generate", "logprobs", "train", "sync")
    bench.columns("model", "rollouts", *phases, "tokens/s generated", "tokens/s", "peak memory", with_checks=True)
    for what, work in (("tiny model", tiny_model), ("0.6B-shaped model", larger_model)):
        bench.attempt(what, partial(work, bench))
        leave_parallel()
    bench.finish()


def tiny_model(bench: Bench) -> None:
    """`train()`, and again to resume."""
    with tempfile.TemporaryDirectory() as folder:
        config = tiny_config(bench, Path(folder), bench.rounds)
        reset_peak(bench)
        run = train(config)
        peak = peak_so_far(bench)
        steps = read_metrics(run)
        check_steps(bench, "tiny model, train()", config, steps)
        bench.check("tiny model: every step has its row", len(steps) == bench.rounds, f"{len(steps)} rows")
        bench.row("tiny", "FP8", *figures(steps[1:]), mib(peak))
        leave_parallel()
        train(tiny_config(bench, Path(folder), bench.rounds + 1, "run.resume=true"))
        rows = read_metrics(run)
        continues = len(rows) == bench.rounds + 1 and rows[: bench.rounds] == steps and math.isfinite(rows[-1]["loss"])
        bench.check("tiny model: a resumed run continues after the checkpoint", continues, f"{len(rows)} rows")


def tiny_config(bench: Bench, folder: Path, steps: int, *overrides: str) -> Config:
    """One rank; 150 steps of warm start, without which no response is ever well-formed (a few where only the code is tried)."""
    sizes = {"sft.steps": 8, "sft.batch_size": 16, "rollout.prompts_per_step": 4} if bench.tiny else {"sft.steps": 150}
    values = {
        "run.backend": bench.device.type,
        "run.dir": folder / "run",
        "parallel.dp": 1,
        **{f"model.{key}": value for key, value in layers_of(bench).items()},
        "train.steps": steps,
        "train.optimizer.warmup_steps": 0,
        "train.optimizer.decay": "constant",  # so that the steps do not depend on how many there will be
        "sft.optimizer.warmup_steps": 2,
        "sft.cache_dir": folder / "cache",
        "eval.every": 0,
        "eval.num_prompts": 8 if bench.tiny else 128,
        "metrics.progress_bar": "false",
        **sizes,
    }
    return load_config(TINY_CONFIG, [*(f"{key}={value}" for key, value in values.items()), *overrides])


def larger_model(bench: Bench) -> None:
    """The same policy with an engine of each kind, one after the other."""
    prompts, group, prompt, response = (2, 4, 8, 16) if bench.tiny else (16, 8, 128, 128)
    configs = {
        name: make_config(
            bench,
            bench.options.layers,
            QWEN3_0_6B,
            rollout={"quantization": fmt, "prompts_per_step": prompts, "group_size": group, "max_response_tokens": response},
            train={"steps": 1000, "optimizer": {"lr": 1e-5}},
        )
        for name, fmt in ROLLOUTS.items()
    }
    config = configs["BF16"]
    initialize_parallel(config)
    policy = Policy(config, config.train.optimizer, config.train.steps, config.rollout.temperature, None)
    vocabulary = config.architecture.vocab_size
    distances = []
    for name, each in configs.items():
        session = with_engine(each, policy, EvenNumbers(vocabulary, prompt), NumberTokenizer(vocabulary))
        with closing(session.engine):
            steps, peak = steps_of(bench, session, f"0.6B-shaped model, {name} rollouts")
        bench.row("0.6B-shaped", name, *figures(steps[1:]), mib(peak))
        distances.append(steps[0]["divergence_severity"])
    detail = "{:.1e} with BF16, {:.1e} with FP8 rollouts".format(*distances)
    bench.check("D is about 0 with BF16 rollouts, and larger with FP8", distances[0] < 1e-3 and distances[1] > 3 * distances[0], detail)


def steps_of(bench: Bench, session: Session, what: str) -> tuple[list[Metrics], int | None]:
    """GRPO steps and what must hold after them; returns the steps' metrics and the peak of allocated memory in bytes."""
    policy, timer = session.policy, PhaseTimer(torch.cuda.synchronize if bench.on_gpu else None)
    before = [parameter.detach().clone() for parameter in policy.model.parameters()]
    reset_peak(bench)
    state = begin(session, None)
    steps: list[Metrics] = []
    for _ in range(bench.rounds):
        if len(steps) >= 2 and bench.seconds_left <= 0:
            bench.skip(f"{what}: {bench.rounds - len(steps)} of {bench.rounds} steps", "no time left")
            break
        row, state, outage, _ = train_step(session, state, timer)
        assert outage is None, outage  # an embedded engine is never out of reach
        steps.append(row | timer.take())
    peak = peak_so_far(bench)
    check_steps(bench, what, session.config, steps)
    changed = sum(int((old != new).sum()) for old, new in zip(before, policy.model.parameters(), strict=True))
    share = changed / sum(old.numel() for old in before)
    bench.check(f"{what}: the weights have changed", share > 0, f"{share:.1%} of them in BF16")
    bench.check(f"{what}: the engine holds quantise(export(policy))", holds_the_export(session, state), f"version {session.engine.version}")
    return steps, peak


def check_steps(bench: Bench, what: str, config: Config, steps: Sequence[Metrics]) -> None:
    losses = [step["loss"] for step in steps]
    finite = all(math.isfinite(step[key]) for step in steps for key in ("loss", "grad_norm", "divergence_severity"))
    updated = not any(step["skipped_updates"] for step in steps)
    bench.check(f"{what}: losses and gradients are finite", finite and updated, "losses " + ", ".join(f"{loss:.1e}" for loss in losses))
    reliability = [step["weight_reliability"] for step in steps]
    detail = ", ".join(f"{value:.5f}" for value in reliability)
    bench.check(f"{what}: the ESS ratio lies in (0, 1]", all(0 < value <= 1 + 1e-12 for value in reliability), detail)
    bounds, alphas = config.ais, [step["alpha"] for step in steps]
    within = all(bounds.alpha_min <= alpha <= bounds.alpha_max for alpha in alphas)
    bench.check(f"{what}: alpha lies within its bounds", within, ", ".join(f"{alpha:.3f}" for alpha in alphas))


def holds_the_export(session: Session, state: TrainingState) -> bool:
    """Whether the engine's tensors are those of a sync made now, name by name and bit by bit (FP8's scales included)."""
    latest, engine = session.policy.calibrator.latest, session.engine
    assert latest is not None and isinstance(engine, LocalEngine)
    stream = weight_stream(session.policy, session.config.rollout, latest.scales)
    held, names = engine.state_tensors(), set()
    for bucket in stream:
        for name, tensor in bucket:
            names.add(name)
            kept = held.get(name)
            if kept is None or kept.dtype != tensor.dtype or not torch.equal(kept.float(), tensor.to(kept.device).float()):
                return False
    return names == set(held) and session.engine.version == state.step


def figures(steps: Sequence[Metrics]) -> list[Figure]:
    """Medians over `steps`: seconds of a step and its phases, tokens per second of generation alone and of the whole step."""
    phases = [ms(statistics.median(step.get(key, 0.0) for step in steps)) for key in ("time/step", *PHASE_KEYS)]
    generated = statistics.median(step["num_response_tokens"] / step["time/generate"] for step in steps)
    return [*phases, number(generated, "tokens/s"), number(statistics.median(s["tokens_per_second"] for s in steps), "tokens/s")]


def reset_peak(bench: Bench) -> None:
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()


def peak_so_far(bench: Bench) -> int | None:
    return torch.cuda.max_memory_allocated() if bench.on_gpu else None


def leave_parallel() -> None:
    """So that the next configuration can build its own groups in this process."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()


class NumberTokenizer:
    """Text is token ids in decimal; the last id ends a response."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size, self.eos_id, self.pad_id = vocab_size, vocab_size - 1, 0
        self.eos_ids: tuple[int, ...] = (self.eos_id,)

    def encode_prompt(self, prompt: str | Turns) -> list[int]:
        assert isinstance(prompt, str), "these prompts have one turn"
        return [int(word) for word in prompt.split()]

    def encode_response(self, text: str) -> list[int]:
        return [*self.encode_prompt(text), self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(i) for i in ids if i not in (self.eos_id, self.pad_id))

    def save(self, folder: str | Path) -> None:
        pass  # there is nothing to keep


class EvenNumbers:
    """Random prompts of `prompt_tokens` ids; a response is worth the share of its ids that are even."""

    name, special_pieces = "even_numbers", ()

    def __init__(self, vocab_size: int, prompt_tokens: int) -> None:
        self._vocab_size, self._prompt_tokens = vocab_size, prompt_tokens

    def train_problem(self, index: int) -> Problem:
        source = random.Random(index)
        return Problem(" ".join(str(source.randrange(1, self._vocab_size - 1)) for _ in range(self._prompt_tokens)), {}, None)

    def test_problems(self, num: int) -> list[Problem]:
        return [self.train_problem(2**40 + i) for i in range(num)]

    def reward(self, problem_truth: Mapping[str, object], response: str) -> Reward:
        ids = [int(word) for word in response.split()]
        return Reward(sum(i % 2 == 0 for i in ids) / max(len(ids), 1), well_formed=bool(ids), correct=False)

    def tokenizer_corpus(self, num_lines: int) -> list[str]:
        return [self.train_problem(i).text for i in range(num_lines)]


if __name__ == "__main__":
    main()
