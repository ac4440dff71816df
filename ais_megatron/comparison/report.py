"""Writes a comparison's table and figure from the folders of its runs.

Means and standard deviations are over the seeds of finished runs. A run that crashed or is missing is counted and named, but not
averaged. The difference to the reference arm is taken seed by seed, because runs of one seed share the warm start, the prompts and
the held-out problems. The table gives its mean and standard error over the seeds that both arms have finished.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ais_megatron.comparison.config import Comparison
from ais_megatron.comparison.paired import contrasts, differences, mean_and_error
from ais_megatron.comparison.records import RESULTS_FILE, write_results
from ais_megatron.comparison.runs import Result, last_line, least_reliability
from ais_megatron.runs.folder import write_text_atomic
from ais_megatron.runs.plotting import PHASE_COLOURS, STYLE, moving_average
from ais_megatron.runs.summary import is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TABLE_FILE, FIGURE_FILE = "comparison.md", "comparison.png"
_SMOOTHING = 5  # number of steps in the moving average of the diagnostics; must be odd
# (metric, heading, unit, logarithmic)
PANELS = (
    ("held_out_accuracy", "Held-out accuracy during training", "pass@1 [%]", False),
    ("alpha", r"Correction strength $\alpha$", r"$\alpha$ [0 to 1]", False),
    ("weight_reliability", r"Weight reliability $\rho$ (ESS ratio)", r"$\rho$ [0 to 1]", False),
    ("divergence_severity", "Divergence severity $D$ (k3)", "$D$ [nats per token]", True),
)


@dataclass(frozen=True)
class Line:
    """One line of the table: a task and an arm. Accuracies are those of finished runs, in [0, 1] and by seed."""

    task: str
    arm: str
    results: tuple[Result, ...]

    @property
    def finished(self) -> list[Result]:
        return [result for result in self.results if result.finished]

    @property
    def final(self) -> dict[int, float]:
        return {r.cell.seed: r.final_accuracy for r in self.finished if r.final_accuracy is not None}


def held_out(result: Result) -> list[tuple[int, float]]:
    """(step, pass@1) of the evaluations during training, including the start if it is known."""
    start = result.summary.get("start_accuracy")
    points = [(0, start)] if is_number(start) else []
    return points + [(row["step"], row["held_out_accuracy"]) for row in result.rows if is_number(row.get("held_out_accuracy"))]


def steps_to(result: Result, threshold: float) -> int | None:
    """The first evaluated step with an accuracy of `threshold` or more."""
    return next((step for step, accuracy in held_out(result) if accuracy >= threshold), None)


def has_collapsed(result: Result, share: float) -> bool:
    """Whether the last evaluation during training is below `share` of the best one."""
    accuracies = [accuracy for _, accuracy in held_out(result)]
    return bool(accuracies) and accuracies[-1] < share * max(accuracies)


def lines_of(comparison: Comparison, results: Sequence[Result]) -> list[Line]:
    """The lines of the table. Tasks and arms have the order of the file."""
    keys = dict.fromkeys((r.cell.task, r.cell.arm) for r in results)
    ordered = sorted(keys, key=lambda key: list(dict.fromkeys(task for task, _ in keys)).index(key[0]))
    return [Line(task, arm, tuple(r for r in results if (r.cell.task, r.cell.arm) == (task, arm))) for task, arm in ordered]


def difference(line: Line, reference: Line) -> tuple[float, float, int] | None:
    """(mean, standard error, number of seeds) of the final accuracy minus that of the reference with the same seed.

    The standard error of a single seed is NaN."""
    gaps = differences(line.final, reference.final)
    return (*mean_and_error(gaps), len(gaps)) if gaps else None


def markdown_table(comparison: Comparison, lines: Sequence[Line]) -> str:
    """A Markdown table with one row per task and arm, aligned for reading in a terminal."""
    reference, percent = comparison.reference_arm, f"{100 * comparison.threshold:g} %"
    header = ["task", "arm", "runs", "final [%]", "best [%]", f"vs {reference} [points]", f"steps to {percent}", "collapsed"]
    header += ["mean alpha", "mean D", "least rho"]
    table = []
    for line in lines:
        done = line.finished
        crashed = sum(r.state.startswith("crashed") for r in line.results)
        runs = f"{len(done)}/{len(line.results)}" + (f", {crashed} crashed" if crashed else "")
        base = next(other for other in lines if (other.task, other.arm) == (line.task, reference))
        gap = difference(line, base) if line.arm != reference else None
        reached = [step for r in done if (step := steps_to(r, comparison.threshold)) is not None]
        table.append(
            [
                line.task,
                line.arm,
                runs,
                _mean_and_deviation(list(line.final.values())),
                _mean_and_deviation([max(a for _, a in held_out(r)) for r in done if held_out(r)]),
                f"{100 * gap[0]:+.1f} ± {100 * gap[1]:.1f}" if gap and gap[2] > 1 else f"{100 * gap[0]:+.1f}" if gap else "-",
                f"{statistics.fmean(reached):.0f} ({len(reached)}/{len(done)})" if reached else f"- (0/{len(done)})",
                f"{sum(has_collapsed(r, comparison.collapse) for r in done)}/{len(done)}",
                _over(done, "alpha", "{:.3f}"),
                _over(done, "divergence_severity", "{:.2e}"),
                f"{min(least):.3f}" if (least := [rho for r in done if (rho := least_reliability(r)) is not None]) else "-",
            ]
        )
    return _aligned(header, table)


def _mean_and_deviation(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{100 * statistics.fmean(values):.1f}" + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


def _over(results: Sequence[Result], key: str, form: str) -> str:
    """The mean over all steps of all runs."""
    values = [row[key] for result in results for row in result.rows if is_number(row.get(key))]
    return form.format(statistics.fmean(values)) if values else "-"


def contrast_table(comparison: Comparison, lines: Sequence[Line]) -> str:
    """A Markdown table of `paired.contrasts` of final accuracies, in points; empty if no two arms share a seed."""
    header = ["task", "arm", "against", "seeds", "difference [points]", "p", "p, corrected"]
    table = []
    for task in dict.fromkeys(line.task for line in lines):
        finals = {line.arm: line.final for line in lines if line.task == task}
        table += [
            [
                task,
                c.arm,
                c.against,
                str(c.seeds),
                f"{100 * c.mean:+.1f}" + (f" ± {100 * c.standard_error:.1f}" if c.seeds > 1 else ""),
                f"{c.p:.2g}",
                f"{c.p_holm:.2g}",
            ]
            for c in contrasts(comparison.tested_pairs, finals)
        ]
    return _aligned(header, table) if table else ""


def _aligned(header: list[str], table: list[list[str]]) -> str:
    """A Markdown table whose columns are also aligned in a terminal."""
    widths = [max(len(row[i]) for row in [header, *table]) for i in range(len(header))]
    rows = [header, ["-" * width for width in widths], *table]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows)


def write_comparison_report(comparison: Comparison, results: Sequence[Result], command: str) -> str:
    """Write ``comparison.md``, ``comparison.png`` and ``results.jsonl`` into the comparison's folder.

    Returns the tables and the list of missing runs.

    command: the command that makes this comparison, which the page shows.
    """
    folder = Path(comparison.dir)
    folder.mkdir(parents=True, exist_ok=True)
    lines = lines_of(comparison, results)
    table = markdown_table(comparison, lines)
    if tests := contrast_table(comparison, lines):
        table += f"\n\n{tests}"
    done = [result for result in results if result.finished]
    closing = [f"{len(done)} of {len(results)} runs finished"]
    closing += [f"{r.cell.name}: {r.state}: {last_line(r.cell)}" for r in results if r.state.startswith("crashed")]
    closing += [f"{r.cell.name}: {r.state}" for r in results if not r.finished and not r.state.startswith(("crashed", "missing"))]
    if missing := _missing(lines):
        closing.append(f"missing: {', '.join(missing)}")
    if any(result.rows for result in results):
        _save_figure(comparison, lines, folder / FIGURE_FILE)
        drawn = f"\n![comparison]({FIGURE_FILE})\n"
    else:
        (folder / FIGURE_FILE).unlink(missing_ok=True)
        drawn = ""
    text = (
        f"# Comparison\n\n`{command}`\n\n{table}\n\n" + "\n".join(f"- {line}" for line in [*closing, *_legend(comparison)]) + "\n" + drawn
    )
    write_text_atomic(folder / TABLE_FILE, text)
    write_results(folder / RESULTS_FILE, results)
    return "\n".join([table, "", *closing, "", f"report: {folder / TABLE_FILE}" + (f" and {folder / FIGURE_FILE}" if drawn else "")])


def _missing(lines: Sequence[Line]) -> list[str]:
    """Runs that were never started: an arm with its seeds, or an arm alone if it has no run at all."""
    names = []
    for line in lines:
        seeds = [str(result.cell.seed) for result in line.results if result.state == "missing"]
        if len(seeds) == len(line.results):
            names.append(f"all of {line.task}/{line.arm}")
        elif seeds:
            names.append(f"{line.task}/{line.arm} (seeds {', '.join(seeds)})")
    return names


def _legend(comparison: Comparison) -> list[str]:
    final = "the last evaluation during training"
    if comparison.final_eval is not None:
        final = "the last policy, evaluated again with " + ", ".join(f"{k}={v}" for k, v in comparison.final_eval.items())
        final += "; a model with an aligned forward pass always with its own engine"
    return [
        f"final: {final}; ± is the standard deviation over seeds",
        f"vs {comparison.reference_arm}: mean difference to that arm in points, seed by seed; ± is its standard error",
        "p: how often flipped signs of the seeds' differences give a mean as far from 0; corrected: for the number of lines, by Holm",
        f"best, steps and collapsed (last below {comparison.collapse:g} of the best) are from evaluations with the rollout engine in "
        "training",
    ]


def _save_figure(comparison: Comparison, lines: Sequence[Line], path: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks, arms = list(dict.fromkeys(line.task for line in lines)), list(dict.fromkeys(line.arm for line in lines))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.5 * len(PANELS) / 2, 8.0 * len(tasks)), layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(2 * len(tasks), len(PANELS) // 2, squeeze=False)
        for number, task in enumerate(tasks):
            for axes, (key, title, unit, is_log) in zip(grid[2 * number : 2 * number + 2].flat, PANELS, strict=True):
                for line in lines:
                    if line.task == task:
                        _draw(axes, line, key, PHASE_COLOURS[arms.index(line.arm) % len(PHASE_COLOURS)])
                axes.set_title(title + (f": {task}" if len(tasks) > 1 else ""))
                axes.set_ylabel(unit)
                axes.set_xlabel("step")
                axes.ticklabel_format(axis="y", useOffset=False)
                if is_log and any(line.get_ydata().max() > 0 for line in axes.lines):
                    axes.set_yscale("log", nonpositive="mask")
                if key == "held_out_accuracy":
                    axes.axhline(100 * comparison.threshold, color="#666666", linewidth=1.0, linestyle="--")
        drawn = {line.get_label(): line for axes in grid.flat for line in axes.lines if line.get_label() in arms}
        figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=8)
        figure.suptitle("Mean over seeds; the band is one standard deviation")
        figure.savefig(path)


def _draw(axes: Axes, line: Line, key: str, colour: str) -> None:
    """Draw the mean over the arm's runs, finished or not, and one standard deviation around it. Each step uses the runs that measured
    it."""
    import numpy as np

    by_step: dict[int, list[float]] = {}
    for result in line.results:
        points = held_out(result) if key == "held_out_accuracy" else _smoothed(result, key)
        for step, value in points:
            by_step.setdefault(step, []).append(100 * value if key == "held_out_accuracy" else value)
    if not by_step:
        return
    steps = np.array(sorted(by_step))
    mean = np.array([statistics.fmean(by_step[step]) for step in steps])
    deviation = np.array([statistics.stdev(by_step[step]) if len(by_step[step]) > 1 else 0.0 for step in steps])
    axes.plot(steps, mean, color=colour, label=line.arm, marker="o" if len(steps) <= 20 else None, markersize=4)
    if deviation.any():
        least = min(min(values) for values in by_step.values())  # the band of a logarithmic axis may not go below the smallest value
        axes.fill_between(steps, np.maximum(mean - deviation, least), mean + deviation, color=colour, alpha=0.15, linewidth=0)


def _smoothed(result: Result, key: str) -> list[tuple[int, float]]:
    points = [(row["step"], row[key]) for row in result.rows if is_number(row.get(key))]
    return list(zip([step for step, _ in points], moving_average([value for _, value in points], _SMOOTHING), strict=True))
