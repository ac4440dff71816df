"""Finished runs as lines of JSON, so that a comparison can be spread over machines and continued where its folders are gone.

`compare` writes ``results.jsonl`` beside its table. A line holds what the table, the figure and the tests need of a run, in about two
kilobytes. ``ais-megatron compare FILE --results OTHER.jsonl`` takes the runs of such a file as finished.

Curves are thinned: a line keeps the mean of every five steps. Evaluations, and the least weight reliability of the run, are exact.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ais_megatron.comparison.config import Cell
from ais_megatron.comparison.runs import Result, compared_keys, least_reliability
from ais_megatron.config import ConfigError
from ais_megatron.runs.folder import write_text_atomic
from ais_megatron.runs.metrics import MetricsRow
from ais_megatron.runs.summary import is_number

RESULTS_FILE = "results.jsonl"
CURVES = ("alpha", "weight_reliability", "divergence_severity", "entropy", "reward_mean", "solved_groups", "distinct_responses")
BLOCK = 5  # steps whose mean is kept


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Write a line for each finished run."""
    write_text_atomic(path, "".join(json.dumps(_record(result)) + "\n" for result in results if result.finished))


def read_results(path: Path, cells: Sequence[Cell]) -> dict[str, Result]:
    """The results of a file by the name of their run. Runs that are not among `cells` are left out.

    Raises:
        ConfigError: the file is missing or damaged, or a run in it had other settings than its cell has now.
    """
    if not path.exists():
        raise ConfigError(f"--results {path}: there is no such file")
    known, results = {cell.name: cell for cell in cells}, {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            cell = known.get(record["run"])
            if cell is not None:
                _check_settings(path, number, record["settings"], cell)
                results[cell.name] = _result(record, cell)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"--results {path}, line {number}: not a result of a run ({error!r}); delete this line") from error
    return results


def _record(result: Result) -> dict[str, Any]:
    evaluated = [row for row in result.rows if is_number(row.get("held_out_accuracy"))]
    return {
        "run": result.cell.name,
        "settings": compared_keys(result.cell.config, only_set=True),
        "final_accuracy": result.final_accuracy,
        "summary": result.summary | {"least_weight_reliability": least_reliability(result)},
        "held_out": [[row["step"], row["held_out_accuracy"]] for row in evaluated],
        "curves": _thinned(result.rows),
    }


def _thinned(rows: Sequence[MetricsRow]) -> list[MetricsRow]:
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    return [{"step": block[-1]["step"]} | _means(block) for block in blocks]


def _means(block: Sequence[MetricsRow]) -> MetricsRow:
    values = {key: [row[key] for row in block if is_number(row.get(key))] for key in CURVES}
    return {key: float(f"{sum(known) / len(known):.4g}") for key, known in values.items() if known}


def _result(record: dict[str, Any], cell: Cell) -> Result:
    rows = {row["step"]: dict(row) for row in record["curves"]}
    for step, accuracy in record["held_out"]:
        rows.setdefault(step, {"step": step})["held_out_accuracy"] = accuracy
    in_order = [rows[step] for step in sorted(rows)]
    return Result(cell, True, True, "0", in_order, record["summary"], record["final_accuracy"])


def _check_settings(path: Path, number: int, then: dict[str, Any], cell: Cell) -> None:
    now = compared_keys(cell.config, only_set=True)
    for key in sorted(then.keys() | now.keys()):
        if then.get(key) != now.get(key):
            raise ConfigError(
                f"--results {path}, line {number}: {cell.name} was a run with {key}={then.get(key)}, but the comparison now has "
                f"{key}={now.get(key)}; leave out this file, or compare with these settings"
            )
