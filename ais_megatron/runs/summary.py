"""Summarises a finished run in seven figures, for `summary.json`, the report and the closing table."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard


def summarize(
    rows: Sequence[Mapping[str, Any]], start_accuracy: float | None, final_accuracy: float | None, wall_seconds: float
) -> dict[str, float | None]:
    """A run in seven figures. A figure is None if no row has its metric.

    Args:
        rows: from `read_metrics`.
        start_accuracy, final_accuracy: pass@1 on the held-out problems, in [0, 1], before the first and after the last step.
        wall_seconds: duration of the whole run.

    Returns:
        The figures by name. Means are over steps. ``tokens_per_second`` divides all response tokens by the seconds of all steps,
        because a mean of the steps' own rates would give short steps too much weight.
    """
    timed = [row for row in rows if is_number(row.get("num_response_tokens")) and is_number(row.get("time/step"))]
    tokens = math.fsum(row["num_response_tokens"] for row in timed)
    seconds = math.fsum(row["time/step"] for row in timed)
    return {
        "start_accuracy": start_accuracy,
        "final_accuracy": final_accuracy,
        "mean_alpha": _mean(rows, "alpha"),
        "mean_weight_reliability": _mean(rows, "weight_reliability"),
        "mean_divergence_severity": _mean(rows, "divergence_severity"),
        "tokens_per_second": tokens / seconds if seconds > 0.0 else None,
        "wall_seconds": wall_seconds,
    }


def is_number(value: Any) -> TypeGuard[float]:
    """Whether `value` is a finite number and not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if is_number(row.get(key))]
    return math.fsum(values) / len(values) if values else None


def summary_lines(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, figure with unit) for every line of the closing table; ``-`` if a figure was not measured."""

    def figure(key: str, form: str) -> str:
        return form.format(summary[key]) if is_number(summary.get(key)) else "-"

    start, final = summary.get("start_accuracy"), summary.get("final_accuracy")
    change = f"{100.0 * (final - start):+.1f} points" if is_number(start) and is_number(final) else "-"
    wall = summary.get("wall_seconds")
    return [
        ("held-out pass@1 at the start", figure("start_accuracy", "{:.1%}")),
        ("held-out pass@1 at the end", figure("final_accuracy", "{:.1%}")),
        ("change", change),
        ("mean alpha", figure("mean_alpha", "{:.3f}")),
        ("mean ESS ratio (weight reliability)", figure("mean_weight_reliability", "{:.4f}")),
        ("mean KL (divergence severity)", figure("mean_divergence_severity", "{:.2e} nats/token")),
        ("response tokens per second", figure("tokens_per_second", "{:,.0f}")),
        ("wall time (h:mm:ss)", format_duration(wall) if is_number(wall) else "-"),
    ]


def scores_table(sets: Mapping[str, Mapping[str, Any]]) -> str:
    """A plain table of an evaluation with a line for each set, from the figures of `evaluation.Scores`. Errors are standard errors."""
    ks = sorted(
        {int(key.removeprefix("pass@")) for figures in sets.values() for key in figures if key.startswith("pass@") and "_" not in key}
    )
    head = ["set", "problems", "responses", *(f"pass@{k}" for k in ks), "reward", "well-formed", "truncated", "tokens", "dropped"]

    def figure(figures: Mapping[str, Any], key: str, form: str) -> str:
        if not is_number(figures.get(key)):
            return "-"
        error = figures.get(f"{key}_se")
        return form.format(figures[key]) + (" ± " + form.format(error) if is_number(error) else "")

    lines = [head]
    for name, figures in sets.items():
        forms = [("problems", "{}"), ("responses", "{}"), *((f"pass@{k}", "{:.1%}") for k in ks), ("reward_mean", "{:.3f}")]
        forms += [("well_formed", "{:.1%}"), ("truncated_fraction", "{:.1%}"), ("response_length_mean", "{:.1f}"), ("dropped", "{}")]
        lines.append([name, *(figure(figures, key, form) for key, form in forms)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))] for line in lines)
    return "\n".join("  ".join(cells) for cells in aligned)


def format_duration(seconds: float) -> str:
    """``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def print_table(summary: Mapping[str, Any], report_path: Path | None = None) -> None:
    """Print the closing table of a run to stdout, and the path of its report if there is one. `summary` is from `summarize`."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Run summary", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(justify="right")
    for name, text in summary_lines(summary):
        table.add_row(name, text)
    console = Console(force_terminal=sys.stdout.isatty(), highlight=False)
    console.print(table)
    if report_path is not None:  # below the table, because a path that is folded into a narrow column cannot be copied
        console.print(f"report: {report_path}", markup=False, soft_wrap=True)
