"""Writes the table and the plot of a scaling experiment, from the folders that `slurm/scaling.sbatch` wrote.

Every line of the experiment's ``grid.tsv`` is an array task with its own run folder ``NN-SERIES-NAME``. A worker is a GPU, or a process
on CPUs. Efficiency is the throughput per worker, relative to that of the smallest finished task in the series:

    efficiency = (tokens / second / worker) / (the same of the task with the fewest workers)

With constant work (strong scaling) this is t_0 g_0 / (t g). With work that grows with the workers (weak scaling) it is t_0 / t. It
counts tokens and not steps, because the lengths of responses differ between runs. A task that failed or never ran has a row that says
so.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ais_megatron.cluster.layout import LAYOUT_FILE, read_layout
from ais_megatron.runs.folder import SUMMARY_FILE, write_text_atomic
from ais_megatron.runs.metrics import PHASES, read_metrics
from ais_megatron.runs.plotting import BLUE, GREEN, ORANGE, PHASE_COLOURS, PURPLE, STYLE
from ais_megatron.runs.summary import is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GRID_FILE, TABLE_FILE, PLOT_FILE = "grid.tsv", "scaling.md", "scaling.png"
COLUMNS = ("series", "name", "trainer_nodes", "rollout_nodes", "overrides")
STATUS_FILE = "exit_status"  # written by the sbatch file when it ends
SERIES_COLOURS = (BLUE, ORANGE, GREEN, PURPLE)


@dataclass(frozen=True)
class ArrayTask:
    """One line of the grid and its result. The first step of a run is a warm-up and counts nowhere."""

    number: int
    series: str
    name: str
    nodes: int
    overrides: str
    problem: str | None = None
    """Why there is nothing to measure; None if the run finished."""
    workers: int = 0
    """GPUs of ranks and servers; on CPUs processes."""
    seconds: float = 0.0
    """Median of a step."""
    tokens_per_second: float = 0.0
    """Over all steps together."""
    phases: tuple[tuple[str, float], ...] = ()
    """(phase, mean seconds per step)."""

    @property
    def folder(self) -> str:
        return f"{self.number:02d}-{self.series}-{self.name}"


def read_grid(path: Path) -> list[ArrayTask]:
    """The tasks in a grid file, without results.

    Raises:
        ValueError: the file is missing, or a line does not have the right columns.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; give the folder that slurm/scaling.sbatch wrote (AIS_RUN_ROOT/scaling-ARRAYID)")
    tasks = []
    for number, line in enumerate((line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")), start=1):
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) < len(COLUMNS) - 1 or not (fields[2].isdigit() and fields[3].isdigit()):
            raise ValueError(f"{path}: task {number}: expected {', '.join(COLUMNS)}, separated by tabs; got {line!r}")
        series, name, trainer_nodes, rollout_nodes, *overrides = fields
        tasks.append(ArrayTask(number, series, name, int(trainer_nodes) + int(rollout_nodes), " ".join(overrides)))
    return tasks


def measure(task: ArrayTask, parent: Path) -> ArrayTask:
    """`task` with the figures from its run folder below `parent`, or with the reason why there are none."""
    folder = parent / task.folder
    if not folder.is_dir():
        return _without(task, "missing: never started")
    rows = read_metrics(folder)
    status = _text(folder / STATUS_FILE)
    if not (folder / SUMMARY_FILE).exists():
        ended = f"ended with status {status}" if status else "has not ended"
        return _without(task, f"failed: {ended} after {len(rows)} steps; see {folder / 'logs'}")
    timed = [row for row in rows if is_number(row.get("time/step")) and is_number(row.get("num_response_tokens"))]
    timed = timed[1:] or timed
    if not timed or not (folder / LAYOUT_FILE).exists():
        return _without(task, f"failed: no step after the warm-up in {folder}")
    seconds = [row["time/step"] for row in timed]
    return ArrayTask(
        **{key: getattr(task, key) for key in ("number", "series", "name", "nodes", "overrides")},
        workers=read_layout(folder / LAYOUT_FILE).num_workers,
        seconds=statistics.median(seconds),
        tokens_per_second=sum(row["num_response_tokens"] for row in timed) / sum(seconds),
        phases=tuple((name, statistics.fmean(row.get(f"time/{name}") or 0.0 for row in timed)) for name in PHASES),
    )


def _without(task: ArrayTask, problem: str) -> ArrayTask:
    return ArrayTask(task.number, task.series, task.name, task.nodes, task.overrides, problem)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""


def efficiencies(tasks: Sequence[ArrayTask]) -> dict[int, float]:
    """The efficiency of every task that has figures, by its number."""
    smallest: dict[str, ArrayTask] = {}
    done = [task for task in tasks if task.problem is None]
    for task in done:
        if task.series not in smallest or task.workers < smallest[task.series].workers:
            smallest[task.series] = task

    def per_worker(task: ArrayTask) -> float:
        return task.tokens_per_second / task.workers

    return {task.number: per_worker(task) / per_worker(smallest[task.series]) for task in done}


def write_scaling_report(parent: Path) -> str:
    """Write ``scaling.md`` and ``scaling.png`` into `parent`. Returns the table and the paths of both files.

    Raises:
        ValueError: `parent` is not the folder of a scaling experiment.
    """
    parent = Path(parent)
    tasks = [measure(task, parent) for task in read_grid(parent / GRID_FILE)]
    table = markdown_table(tasks)
    missing = [task for task in tasks if task.problem is not None]
    closing = [f"{len(tasks) - len(missing)} of {len(tasks)} tasks finished"]
    closing += [f"{task.folder}: {task.problem}" for task in missing]
    text = table + "\n\n" + "\n".join(f"- {line}" for line in closing) + "\n"
    if len(missing) < len(tasks):
        _save_plot(tasks, parent / PLOT_FILE)
        text += f"\n![scaling]({PLOT_FILE})\n"
    else:
        (parent / PLOT_FILE).unlink(missing_ok=True)
    write_text_atomic(parent / TABLE_FILE, "# Scaling\n\n" + text)
    plot = f" and {parent / PLOT_FILE}" if len(missing) < len(tasks) else ""
    return "\n".join([table, "", *closing, "", f"report: {parent / TABLE_FILE}{plot}"])


def markdown_table(tasks: Sequence[ArrayTask]) -> str:
    """A Markdown table with one row per task, aligned for reading in a terminal."""
    efficiency = efficiencies(tasks)
    header = ["task", "series", "name", "nodes", "workers", "s/step", "tokens/s", "tokens/s/worker", "efficiency", "largest phases"]
    rows = []
    for task in tasks:
        start = [str(task.number), task.series, task.name, str(task.nodes)]
        if task.problem is not None:
            rows.append([*start, "-", "-", "-", "-", "-", task.problem.split(":")[0]])
            continue
        largest = sorted(task.phases, key=lambda phase: -phase[1])[:3]
        rows.append(
            [
                *start,
                str(task.workers),
                f"{task.seconds:.3g}",
                f"{task.tokens_per_second:,.0f}",
                f"{task.tokens_per_second / task.workers:,.0f}",
                f"{efficiency[task.number]:.0%}",
                ", ".join(f"{name} {seconds / max(task.seconds, 1e-9):.0%}" for name, seconds in largest),
            ]
        )
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines)


def _save_plot(tasks: Sequence[ArrayTask], path: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done = [task for task in tasks if task.problem is None]
    efficiency = efficiencies(tasks)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13.0, 5.0 + 0.35 * max(0, len(done) - 8)), layout="constrained")
        FigureCanvasAgg(figure)
        throughput, share, bars = figure.subplots(1, 3, width_ratios=[1.0, 1.0, 1.5])
        for series, colour in zip(dict.fromkeys(task.series for task in done), SERIES_COLOURS * len(done), strict=False):
            points = sorted((t for t in done if t.series == series), key=lambda task: task.workers)
            workers = [task.workers for task in points]
            # Several layouts may have the same size. Each is a point, and the line connects the best of every size.
            best = {task.workers: max(t.tokens_per_second for t in points if t.workers == task.workers) for task in points}
            throughput.plot(workers, [t.tokens_per_second for t in points], "o", color=colour)
            throughput.plot(list(best), list(best.values()), color=colour, label=series)
            share.plot(workers, [100.0 * efficiency[t.number] for t in points], "o", color=colour, label=series)
            ideal = points[0].tokens_per_second / workers[0]
            throughput.plot(workers, [ideal * n for n in workers], linestyle="--", linewidth=1.0, color=colour)
        for axes, title, label in (
            (throughput, "Throughput (dashed: ideal)", "response tokens per second"),
            (share, "Efficiency", "tokens/s per worker, relative to the smallest [%]"),
        ):
            axes.set_title(title)
            axes.set_ylabel(label)
            axes.set_xlabel("workers (GPUs; on CPUs processes)")
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({t.workers for t in done}), [str(n) for n in sorted({t.workers for t in done})], minor=False)
            axes.set_ylim(bottom=0.0)
            axes.legend(loc="best")
        _draw_phases(bars, done)
        figure.savefig(path)


def _draw_phases(axes: Axes, done: Sequence[ArrayTask]) -> None:
    left = [0.0] * len(done)
    for index, (name, colour) in enumerate(zip(PHASES, PHASE_COLOURS, strict=True)):
        seconds = [task.phases[index][1] for task in done]
        if any(seconds):
            axes.barh([task.folder for task in done], seconds, left=left, color=colour, label=name)
            left = [before + more for before, more in zip(left, seconds, strict=True)]
    axes.invert_yaxis()
    axes.set_title("Where the time goes")
    axes.set_xlabel("wall time [s per step]")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5))
