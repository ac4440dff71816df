"""A run's metrics: the seconds of each phase, one line of ``metrics.jsonl`` per step, and what the terminal shows. And its samples, in
``samples.jsonl``, which is written in the same way (see `samples`).

``metrics.jsonl`` is always written. It is the only record that is read again, by `read_metrics`, `report` and resumed runs.
TensorBoard and Weights & Biases get copies (``metrics.tensorboard``, ``metrics.wandb``). Every line is a single ``os.write`` to a
descriptor opened with O_APPEND, so a killed process leaves complete lines. Only a crashed machine or a full disk can leave an
incomplete last line, which the readers here ignore.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ais_megatron.cluster.exits import Preempted
from ais_megatron.config import Config, ConfigError
from ais_megatron.runs.folder import EVALUATIONS_FILE, METRICS_FILE, encode_json, write_text_atomic
from ais_megatron.runs.samples import SAMPLES_FILE, Sample, divergence, encode_sample

PHASES = ("generate", "reward", "logprobs", "diagnose", "train", "calibrate", "sync", "evaluate", "checkpoint")
WANDB_ID_FILE = "wandb_id"

# (metric, its format in the line of a step): the few figures that show whether a run is healthy.
_LINE_FIGURES = (
    ("reward_mean", "reward {:.3f}"),
    ("held_out_accuracy", "held-out {:.1%}"),
    ("alpha", "alpha {:.3f}"),
    ("weight_reliability", "rho {:.3f}"),
    ("divergence_severity", "D {:.1e}"),
    ("tokens_per_second", "{:,.0f} tokens/s"),
    ("time/step", "{:.1f} s"),
)
_SECRET_KEY = re.compile(r"(^|_)(secret|password|passwd|credentials?|api_?key|(access|auth|hf|api)_token)($|_)", re.IGNORECASE)

MetricsRow = dict[str, Any]


class PhaseTimer:
    """Wall seconds spent in each phase of one step.

    Args:
        synchronize: called at the end of a phase that did not raise, before its clock stops. On CUDA pass
            ``torch.cuda.synchronize``. Kernels run asynchronously, so otherwise a later phase would seem to take their time.
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize
        self._seconds: dict[str, float] = {}
        self._open: str | None = None
        self.named_range: Callable[[str], AbstractContextManager[Any]] | None = None
        """Marks each phase for a profiler while a step is profiled (`profiling`)."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall seconds of the block to phase `name`, even if the block raises. Phases do not nest, so they add up to the step."""
        assert name in PHASES, f"unknown phase {name!r}; known: {', '.join(PHASES)}"
        assert self._open is None, f"phase {name!r} begins inside phase {self._open!r}"
        self._open = name
        start = time.perf_counter()
        try:
            if self.named_range is None:
                yield
            else:
                with self.named_range(name):
                    yield
            if self._synchronize is not None:
                self._synchronize()
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start
            self._open = None

    def seconds(self, *names: str) -> float:
        """Seconds of these phases together since the last `take`."""
        return sum(self._seconds.get(name, 0.0) for name in names)

    def take(self) -> dict[str, float]:
        """``{"time/generate": seconds, ...}`` for the phases since the last call. Starts again from zero."""
        assert self._open is None, f"phase {self._open!r} is still running"
        taken = {f"time/{name}": seconds for name, seconds in self._seconds.items()}
        self._seconds = {}
        return taken


class Sinks:
    """Writes the metrics of every step to metrics.jsonl, the terminal and, if configured, TensorBoard and Weights & Biases.

    Every rank constructs one, so that a missing package is an error on all of them. Only the main rank writes. On the other ranks
    every method does nothing. Use it as a context manager.

    Raises:
        ConfigError: ``metrics.tensorboard`` or ``metrics.wandb`` asks for a package that is not installed, or Weights &
            Biases refuses to start (main rank only).
    """

    def __init__(self, config: Config, run_dir: Path, is_main: bool) -> None:
        wandb_mode = config.metrics.wandb
        if config.metrics.tensorboard:
            _require("tensorboard", "metrics.tensorboard=true", "metrics.tensorboard=false")
        if wandb_mode != "off":
            _require("wandb", f"metrics.wandb={wandb_mode}", "metrics.wandb=off")
        self._config = config
        self._run_dir = Path(run_dir)
        self._is_main = is_main
        self._rows = _RowFile(self._run_dir / METRICS_FILE)
        self._samples = _RowFile(self._run_dir / SAMPLES_FILE, encode_sample)
        self._evaluations = _RowFile(self._run_dir / EVALUATIONS_FILE)
        self._console = _Terminal(total=config.train.steps, wants_bar=config.metrics.progress_bar)
        self._tensorboard: Any = None
        self._purge_step: int | None = None
        self._wandb = _start_wandb(config, self._run_dir) if is_main and wandb_mode != "off" else None

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Record one step. `row` holds numbers, strings and lists of numbers. If it contains ``step``, the value must be the same.

        Raises:
            RuntimeError: the line could not be written completely (the disk is full).
        """
        if not self._is_main:
            return
        assert row.get("step", step) == step, f"row of step {row['step']} logged as step {step}"
        figures = {key: row[key] for key in sorted(row) if key != "step"}
        self._rows.append({"step": step, **figures})
        self._log_copies(step, figures)
        self._console.show(step, figures)

    def log_samples(self, samples: Sequence[Sample]) -> None:
        """Record the responses of one step. Call it before `log`, so that a step that has a row has its samples too.

        Raises:
            RuntimeError: as `log`.
        """
        if not self._is_main or not samples:
            return
        for sample in samples:
            self._samples.append(sample)
        if self._wandb is not None:
            self._wandb.log({"step": samples[0]["step"], "samples": _wandb_table(samples)})

    def log_evaluation(self, step: int, rows: Sequence[MetricsRow], in_a_row: bool) -> None:
        """Record an evaluation of the weights after `step` in evaluations.jsonl, with a line for each set.

        rows: "set" is the name of a set. The other figures are numbers; the first set of the run also has ``held_out_accuracy``.
        in_a_row: `log` will get these figures too.
        Raises:
            RuntimeError: as `log`.
        """
        if not self._is_main:
            return
        for row in rows:
            self._evaluations.append({"step": step, **row})
        if rows and not in_a_row:
            self._log_copies(step, evaluation_metrics(rows))

    def has_evaluation(self, step: int, sets: Sequence[str]) -> bool:
        """Whether all `sets` were measured after `step` (main rank only)."""
        recorded = {row["set"] for row in read_evaluations(self._run_dir) if row["step"] == step}
        if recorded:
            return set(sets) <= recorded
        # A run of an earlier version has no file of evaluations, and one figure in the row of the step.
        return any(row["step"] == step and row.get("held_out_accuracy") is not None for row in read_metrics(self._run_dir))

    def say(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self._is_main:
            self._console.say(text)

    def truncate_after(self, step: int) -> None:
        """Remove the lines after `step`, which a resumed run will repeat, and an incomplete last line."""
        if not self._is_main:
            return
        self._console.completed = self._rows.truncate_after(step)
        self._samples.truncate_after(step)
        self._close_tensorboard()
        self._purge_step = step + 1  # TensorBoard hides earlier events from this step on

    def truncate_evaluations_after(self, step: int) -> None:
        """The same for evaluations.jsonl."""
        if self._is_main:
            self._evaluations.truncate_after(step)

    def close(self, failed: bool = False) -> None:
        """Flush and close everything. A second call does nothing. `failed` marks the Weights & Biases run as failed."""
        self._console.close()
        self._rows.close()
        self._samples.close()
        self._evaluations.close()
        self._close_tensorboard()
        if self._wandb is not None:
            run, self._wandb = self._wandb, None
            run.finish(exit_code=int(failed))

    def __enter__(self) -> Sinks:
        if self._is_main:
            self._console.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None and kind is not Preempted)

    def _log_copies(self, step: int, figures: Mapping[str, Any]) -> None:
        self._log_tensorboard(step, figures)
        if self._wandb is not None:
            self._wandb.log({"step": step, **figures})

    def _log_tensorboard(self, step: int, figures: Mapping[str, Any]) -> None:
        if not self._config.metrics.tensorboard:
            return
        if self._tensorboard is None:  # created at the first row, because only then is it known whether rows were truncated
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=self._purge_step)
        for key, value in figures.items():
            if isinstance(value, int | float):
                self._tensorboard.add_scalar(key, value, step)

    def _close_tensorboard(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
            self._tensorboard = None


class _RowFile:
    """A file of lines with a step each. It is opened at the first row, so a run that dies earlier does not prevent a second start in its
    folder."""

    def __init__(self, path: Path, encode: Callable[[MetricsRow], bytes] = lambda row: encode_json(row).encode()) -> None:
        self._path, self._encode = path, encode
        self._descriptor: int | None = None

    def append(self, row: MetricsRow) -> None:
        if self._descriptor is None:
            self.truncate_after(sys.maxsize)  # the new row must not continue an incomplete last line
            self._descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        line = self._encode(row) + b"\n"
        # No fsync: what a process has written survives its death, and a resumed run repeats steps that a machine loses.
        written = os.write(self._descriptor, line)
        if written != len(line):
            raise RuntimeError(f"{self._path}: {written} of {len(line)} bytes of step {row['step']} written; is the disk full?")

    def truncate_after(self, step: int) -> int:
        """Keep the rows up to `step`, byte for byte. Returns their number."""
        self.close()  # the rename below leaves an open descriptor pointing at the old file
        if not self._path.exists():
            return 0
        kept, end = 0, 0
        for offset, line, row in _parse_rows(self._path):
            if row["step"] > step:
                break  # steps only grow
            kept, end = kept + 1, offset + len(line)
        if end < self._path.stat().st_size:
            os.truncate(self._path, end)
        return kept

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class _Terminal:
    """One line per step, and a progress bar below if stdout is a terminal and the bar is configured."""

    def __init__(self, total: int, wants_bar: bool) -> None:
        self._total = total
        # Uses isatty and not rich's own test, because environment variables can make rich write control characters to a log file.
        self._wants_bar = wants_bar and sys.stdout.isatty()
        self._bar: Any = None
        self._task: Any = None
        self.completed = 0

    def open(self) -> None:
        if self._bar is not None or not self._wants_bar:
            return
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        # By default rich estimates the speed from the last 30 s, but a step of a large model takes longer.
        self._bar = Progress(*columns, speed_estimate_period=86_400.0)
        self._task = self._bar.add_task("training", total=self._total, completed=self.completed)
        self._bar.start()

    def show(self, step: int, figures: Mapping[str, Any]) -> None:
        self.completed += 1
        self.open()
        self.say(step_line(step, self._total, figures))
        if self._bar is not None:
            self._bar.update(self._task, completed=self.completed)

    def say(self, line: str) -> None:
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _wandb_table(samples: Sequence[Sample]) -> Any:
    """The samples of one step as a table, without their tokens."""
    import wandb

    columns = ["step", "prompt", "response", "reward", "correct", "reason", "advantage", "length", "finish_reason", "repetition", "garbled"]
    data = [[*(sample[column] for column in columns), divergence(sample)] for sample in samples]
    return wandb.Table(columns=[*columns, "divergence_severity"], data=data)


def step_line(step: int, total: int, figures: Mapping[str, Any]) -> str:
    """One step as one line of plain text. Figures that the step did not measure are left out."""
    shown = [form.format(figures[key]) for key, form in _LINE_FIGURES if figures.get(key) is not None]
    return "  ".join([f"step {step:>{len(str(total))}}/{total}", *shown])


def _require(package: str, wish: str, instead: str) -> None:
    if find_spec(package) is None:
        raise ConfigError(f"{wish}: the package {package} is not installed; install ais_megatron[tracking], or set {instead}")


def _start_wandb(config: Config, run_dir: Path) -> Any:
    """Begin the Weights & Biases run whose id is in ``run_dir/wandb_id``, or continue it after a restart."""
    import wandb

    id_file = run_dir / WANDB_ID_FILE
    if not id_file.exists():
        write_text_atomic(id_file, uuid.uuid4().hex[:8] + "\n")
    mode = config.metrics.wandb
    assert mode != "off"
    try:
        run = wandb.init(
            project=config.metrics.wandb_project,
            name=run_dir.resolve().name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow" if mode == "online" else None,  # offline runs with the same id are joined at their upload
            mode=mode,
            dir=str(run_dir),
            config=_without_secrets(config.model_dump(mode="json")),
            # Command line, host, environment and source are not sent. config.yaml already records where the run comes from.
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True, x_disable_meta=True),
        )
    except wandb.Error as error:
        raise ConfigError(f"metrics.wandb={mode}: {error}; log in with `wandb login`, or set metrics.wandb=offline or off") from error
    # A resumed run logs steps that wandb's own counter has passed, and wandb would drop them. So plots use our step.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    if mode == "online":
        print(f"Weights & Biases: {run.url}", flush=True)
    return run


def _without_secrets(data: Any) -> Any:
    """The configuration without keys that sound secret. There are none today, and a later one must not leave the machine."""
    if isinstance(data, dict):
        return {key: _without_secrets(value) for key, value in data.items() if not _SECRET_KEY.search(key)}
    return [_without_secrets(value) for value in data] if isinstance(data, list) else data


def evaluation_metrics(rows: Sequence[MetricsRow]) -> MetricsRow:
    """The figures of one evaluation under the keys of metrics: ``eval/SET/FIGURE``, and ``held_out_accuracy`` for the first set."""
    figures: MetricsRow = {}
    for row in rows:
        if "held_out_accuracy" in row:
            figures["held_out_accuracy"] = row["held_out_accuracy"]
        figures |= {f"eval/{row['set']}/{key}": row[key] for key in row if key not in ("step", "set", "held_out_accuracy")}
    return figures


def read_metrics(run_dir: Path) -> list[MetricsRow]:
    """The rows of ``metrics.jsonl`` in the order of the file, with null for NaN. An incomplete last line is ignored.

    The row of a step also has the figures of an evaluation that ended only after the step was logged (``eval.blocking=false``).
    Returns an empty list if there is no file.

    Raises:
        ValueError: a line before the last is not a row. The message names file and line.
    """
    by_step: dict[int, list[MetricsRow]] = {}
    for row in read_evaluations(run_dir):
        by_step.setdefault(row["step"], []).append(row)
    return [evaluation_metrics(by_step.get(row["step"], ())) | row for row in _read_rows(Path(run_dir) / METRICS_FILE)]


def read_evaluations(run_dir: Path) -> list[MetricsRow]:
    """The rows of ``evaluations.jsonl``, one for each set of each evaluation, from step 0 on. Otherwise as `read_metrics`."""
    return _read_rows(Path(run_dir) / EVALUATIONS_FILE)


def _read_rows(path: Path) -> list[MetricsRow]:
    return [row for _, _, row in _parse_rows(path)] if path.exists() else []


def _parse_rows(path: Path) -> Iterator[tuple[int, bytes, MetricsRow]]:
    """Each complete line of `path` with its offset in the file and its row. One line is in memory at a time."""
    offset, size = 0, path.stat().st_size
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            is_last = offset + len(line) >= size
            if is_last and not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line.decode())
                if not isinstance(row, dict) or "step" not in row:
                    raise ValueError("it has no step")
            except ValueError as error:  # also JSONDecodeError and UnicodeDecodeError
                if is_last:
                    return  # incomplete although it ends with a line feed: file systems may lose the middle of unflushed data
                raise ValueError(f"{path}: line {number} is not a row ({error}); repair or delete this line") from error
            yield offset, line, row
            offset += len(line)
