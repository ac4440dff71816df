"""Runs the runs of a comparison one after the other. Each is its own `ais-megatron train`, so a failure does not stop the others.

The files in a run's folder tell what remains to do. With ``summary.json`` it is trained, and at most its final evaluation is
missing. With only ``metrics.jsonl`` it is unfinished, and continues from its newest checkpoint, or from the start without one.
``exit_status`` is the status with which it last ended, and ``train.log`` its output.
"""

from __future__ import annotations

import json
import time
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ais_megatron.cluster.exits import EXIT_REQUEUE, INTERRUPTED
from ais_megatron.cluster.launcher import run_ranks
from ais_megatron.comparison.config import Cell, Comparison, as_dotlist
from ais_megatron.config import Config, ConfigError, load_config
from ais_megatron.runs.folder import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, write_text_atomic
from ais_megatron.runs.metrics import MetricsRow, read_metrics
from ais_megatron.runs.summary import format_duration, is_number

LOG_FILE, STATUS_FILE, FINAL_EVAL_FILE = "train.log", "exit_status", "final_eval.json"
# These keys say where a run is made and not what it is. Cluster jobs set them, and a later report need not.
_NOT_COMPARED = (
    "run.dir run.resume run.backend run.timeout_minutes run.watchdog_minutes parallel. model.path model.architecture. "
    "tokenizer.path rollout.sglang. checkpoint. metrics. sft.cache_dir"
).split()


@dataclass(frozen=True)
class Result:
    """What is known about one run."""

    cell: Cell
    trained: bool
    """It has a summary."""
    finished: bool
    """It is trained, and its final evaluation is done if the comparison asks for one."""
    status: str
    """The exit status of its process; empty if none is recorded."""
    rows: list[MetricsRow]
    """The lines of its metrics.jsonl."""
    summary: dict[str, Any]
    final_accuracy: float | None
    """pass@1 on the held-out problems at the end, in [0, 1]. It is that of the final evaluation if there is one."""

    @property
    def state(self) -> str:
        """``finished``, ``crashed (status N)``, ``unfinished (N steps)`` or ``missing``."""
        if self.finished:
            return "finished"
        if self.status not in ("", "0", str(EXIT_REQUEUE), str(INTERRUPTED)):
            return f"crashed (status {self.status} after {len(self.rows)} steps)"
        if self.trained:
            return "trained, without its final evaluation"
        return f"unfinished ({len(self.rows)} of {self.cell.config.train.steps} steps)" if self.rows else "missing"


def result_of(cell: Cell, comparison: Comparison) -> Result:
    """Read the result of a run from its folder.

    Raises:
        ConfigError: the folder holds a run with another configuration.
        ValueError: a file is damaged.
    """
    _check_same_run(cell)
    summary = _json(cell.folder / SUMMARY_FILE)
    final = _json(cell.folder / FINAL_EVAL_FILE) if comparison.final_eval is not None else summary
    accuracy = final.get("accuracy", final.get("final_accuracy"))
    status = cell.folder / STATUS_FILE
    return Result(
        cell,
        trained=bool(summary),
        finished=bool(summary) and bool(final),
        status=status.read_text(encoding="utf-8").strip() if status.exists() else "",
        rows=read_metrics(cell.folder),
        summary=summary,
        final_accuracy=accuracy if summary else None,
    )


def _check_same_run(cell: Cell) -> None:
    recorded = cell.folder / CONFIG_FILE
    if not recorded.exists():
        return
    try:
        then = compared_keys(load_config(recorded))
    except ConfigError as error:
        raise ConfigError(
            f"{recorded}: was written by another version of ais_megatron ({error}); delete {cell.folder}, or choose another dir"
        ) from error
    now = compared_keys(cell.config)
    changed = [key for key in now if then.get(key) != now[key]]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{cell.folder}: holds a run with {key}={then.get(key)}, but the comparison now has {key}={now[key]}; delete the folder, or "
            "choose another dir"
        )


def compared_keys(config: Config, only_set: bool = False) -> dict[str, Any]:
    """The settings that make a run what it is, by key with dots. only_set: without those that have their default."""
    leaves = _leaves(config.model_dump(mode="json", exclude_unset=only_set))
    return {key: value for key, value in leaves.items() if not any(f"{key}.".startswith(prefix) for prefix in _NOT_COMPARED)}


def _leaves(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in data.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves


def least_reliability(result: Result) -> float | None:
    """The least weight reliability of all steps, in [0, 1]; None if it was not measured."""
    known = result.summary.get("least_weight_reliability")  # results of other machines have it, because their curves are thinned
    values = [row["weight_reliability"] for row in result.rows if is_number(row.get("weight_reliability"))]
    return known if is_number(known) else min(values, default=None)


def _json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete this file") from error


def run_cells(comparison: Comparison, path: Path, cells: Sequence[Cell], may_train: bool = True, elsewhere: Container[str] = ()) -> int:
    """Do what remains to do of `cells`, and print a line about each. Returns 0, or `EXIT_REQUEUE` or `INTERRUPTED` after a signal.

    may_train: if False, only the final evaluations of trained runs are made, for example after a Slurm array.
    elsewhere: names of the runs that another machine has finished.
    """
    for number, cell in enumerate(cells, start=1):
        if cell.name in elsewhere:
            print(f"[{number}/{len(cells)}] {cell.name}: finished elsewhere", flush=True)
            continue
        result, began = result_of(cell, comparison), time.monotonic()
        todo = not result.finished and (result.trained or may_train)
        if todo:
            print(f"[{number}/{len(cells)}] {cell.name}: {'evaluating' if result.trained else 'training'}", flush=True)
            status = _run(cell, comparison, path, result)
            if status in (EXIT_REQUEUE, INTERRUPTED):
                print(f"stopped in {cell.name}; repeat the command to continue there", flush=True)
                return status
            result = result_of(cell, comparison)
        took = f" in {format_duration(time.monotonic() - began)}" if todo else ", not run again" if result.finished else ""
        accuracy = f", held-out pass@1 {result.final_accuracy:.1%}" if result.final_accuracy is not None else ""
        print(f"[{number}/{len(cells)}] {cell.name}: {result.state}{took}{accuracy}", flush=True)
        if todo and not result.finished:
            print(f"    its log is {cell.folder / LOG_FILE}; it ends with: {last_line(cell)}", flush=True)
    return 0


def _run(cell: Cell, comparison: Comparison, path: Path, result: Result) -> int:
    cell.folder.mkdir(parents=True, exist_ok=True)
    (cell.folder / STATUS_FILE).unlink(missing_ok=True)
    ranks, status = cell.config.parallel.local_world_size, 0
    with (cell.folder / LOG_FILE).open("ab") as log:
        if not result.trained:
            resume = ["run.resume=true"] if (cell.folder / METRICS_FILE).exists() else []
            status = _process(ranks, ["train", str(cell.base), *cell.overrides, *resume, "metrics.progress_bar=false"], log)
        if status == 0 and comparison.final_eval is not None:
            changes = final_changes(cell, comparison, path)
            status = _process(ranks, ["eval", str(cell.folder), *changes, "--out", str(cell.folder / FINAL_EVAL_FILE)], log)
    write_text_atomic(cell.folder / STATUS_FILE, f"{status}\n")
    return status


def final_changes(cell: Cell, comparison: Comparison, path: Path) -> list[str]:
    """The changes of the final evaluation. A run with an aligned forward pass keeps the engine's precision, because what it trains is the
    quantised model."""
    changes = as_dotlist(comparison.final_eval or {}, path, "final_eval")
    if not cell.config.policy.is_aligned:
        return changes
    return [change for change in changes if not change.startswith(("rollout.quantization=", "rollout.kv_cache="))]


def _process(num_ranks: int, arguments: list[str], log: IO[bytes]) -> int:
    log.write(f"\n$ ais-megatron {' '.join(arguments)}\n".encode())
    log.flush()
    return run_ranks(num_ranks, arguments, log)


def last_line(cell: Cell) -> str:
    """The last line of the run's log. If the run failed, it usually says why."""
    logs = [
        log for log in (cell.folder / LOG_FILE, cell.folder / "logs" / "trainer-0.log") if log.exists()
    ]  # the second one is from a Slurm job
    lines = [line for log in logs for line in log.read_text(encoding="utf-8", errors="replace").split("\n")]
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines or ["(nothing)"])[-1]
