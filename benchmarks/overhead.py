"""What AIS and recalibration cost: seconds inside their code as a share of a whole step, in one process with one thread.

    python benchmarks/overhead.py [--rounds 5]

AIS: the diagnostics and alpha, and the factors of every token inside the loss. `measured` adds the sketches of gradients in the pass for
old log-probabilities: that pass's share of a step with them, less its share without. `lagged` recalibration: the hooks on the forward
passes that run anyway. `fresh`: its own pass, over 1/32 of a rank's tokens (4,096, the default, of 131,072: 64 responses of
2,048 tokens). The model is grpo_step.py's, each step half of its batch, as one of its two ranks has. The old-logprob pass,
which every correction needs, is not counted here; lagged.py shows what it costs and `ais.lag=1` saves.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from contract import emit, share
from grpo_step import config_data

from ais_megatron.algorithm.gradients import GradientSums
from ais_megatron.algorithm.measured import Evidence
from ais_megatron.algorithm.scaler import LossScaler
from ais_megatron.batch import Batch
from ais_megatron.collection import collect
from ais_megatron.config import build_config
from ais_megatron.distributed import init_process_group
from ais_megatron.policy.policy import Policy
from ais_megatron.runs.metrics import PhaseTimer
from ais_megatron.session import build_session
from ais_megatron.trainer import begin, train_step

FRESH_SHARE = 1 / 32
PROMPTS = 16


class Meter:
    """Seconds spent inside functions that it wraps."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += perf_counter() - start

        return timed

    def watch(self, owner: Any, *names: str) -> None:
        """Wrap functions of a class or an object where they are."""
        for name in names:
            setattr(owner, name, self.wrap(getattr(owner, name)))

    def take(self) -> float:
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def sketching(policy: Policy, batch: Batch, rounds: int) -> float:
    """Seconds that the measured coefficient adds to a pass for old log-probabilities, and to the choice of alpha."""

    def plain() -> None:
        policy.logprobs(batch)

    def sketched() -> None:
        gradients = policy.response_gradients(batch)
        assert gradients is not None
        policy.logprobs(batch, gradients)
        sums = GradientSums.of(policy.gradient_sums(gradients))
        Evidence().after(sums, policy.config.ais.memory).choice(policy.config.ais)

    seconds: dict[Callable[[], None], list[float]] = {plain: [], sketched: []}
    for _ in range(rounds):
        for work, taken in seconds.items():
            start = perf_counter()
            work()
            taken.append(perf_counter() - start)
    return statistics.median(sketch - pass_ for pass_, sketch in zip(*seconds.values(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    init_process_group("cpu")
    with tempfile.TemporaryDirectory() as folder:
        data = config_data(Path(folder), {"parallel": {"dp": 1}}, prompts_per_step=PROMPTS, quantization="fp8_e4m3")
        tokens = PROMPTS * data["rollout"]["group_size"] * data["rollout"]["max_response_tokens"]
        calibration = {"mode": "fresh", "fresh_tokens": int(tokens * FRESH_SHARE)}
        config = build_config(data | {"calibration": calibration, "ais": {"coefficient": "measured"}})
        session = build_session(config)
        product = config.ais.model_copy(update={"coefficient": "product"})
        session.policy.config = config.model_copy(update={"ais": product})
        state = begin(session, None)
        factors, hooks = Meter(), Meter()
        factors.watch(LossScaler, "factors")
        hooks.watch(session.policy.calibrator, "_record", "result")
        policy: Any = session.policy
        calibrate = policy.calibrate
        in_calibrate = Meter()

        def calibrate_apart(batch: Any) -> Any:
            lagged.append(hooks.take())  # what the old-logprob pass spent; the fresh pass is counted as a whole
            result = in_calibrate.wrap(calibrate)(batch)
            hooks.take()
            return result

        policy.calibrate = calibrate_apart
        lagged: list[float] = []
        shares: dict[str, list[float]] = {"ais": [], "lagged": [], "fresh": []}
        steps: list[float] = []
        for number in range(rounds + 1):
            timer = PhaseTimer()
            row, state, *_ = train_step(session, state, timer)
            taken, step, fresh, mixing = timer.take(), row["time/step"], in_calibrate.take(), factors.take()
            if number:
                steps.append(step - fresh)
                shares["ais"].append((taken["time/diagnose"] + mixing) / (step - fresh))
                shares["lagged"].append(lagged[-1] / (step - fresh))
                shares["fresh"].append(fresh / (step - fresh))
        policy.config, policy.calibrate = config, calibrate
        extra = sketching(policy, collect(session, 0, PhaseTimer()).batch, 4 * rounds)
        session.engine.close()
    shares["measured"] = [extra / statistics.median(steps)]
    medians = {name: statistics.median(values) for name, values in shares.items()}
    emit(
        {
            "AIS (diagnostics, alpha, mixing)": share(medians["ais"], goal=0.01, note="the old-logprob pass not counted"),
            "AIS, measured: what the sketches add": share(medians["measured"], goal=0.01, note="to the old-logprob pass"),
            "recalibration, lagged": share(medians["lagged"], goal=0.005),
            "recalibration, fresh": share(medians["fresh"], goal=0.03, note="a pass over 1/32 of the tokens"),
        }
    )


if __name__ == "__main__":
    main()
