"""Draws the plots of a run from its metrics, and defines the colours and the style of all our plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ais_megatron.runs.metrics import PHASES
from ais_megatron.runs.summary import is_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Draw = Callable[["Figure", "Curves"], None]

# The colours of Okabe and Ito, which colour-blind readers can tell apart, and one more for the ninth phase.
BLUE, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
PHASE_COLOURS = (BLUE, "#E69F00", "#56B4E9", PURPLE, ORANGE, GREEN, "#F0E442", "#8C8C8C", "#6A3D9A")
STYLE: dict[Any, Any] = {  # (matplotlib would have its keys be a Literal of all its settings)
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E3E3E3",
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "figure.dpi": 130,
}
MARKED_POINTS = 40  # a curve with at most this many points has markers; more would hide the line
SMOOTHED_POINTS = 60  # a curve with at least this many points is drawn pale, with its moving average on top
MOST_BARS = 100  # for longer runs, phase times are averaged over neighbouring steps


@dataclass(frozen=True)
class Curves:
    """The data of the plots."""

    rows: Sequence[dict[str, Any]]
    """The rows of metrics.jsonl."""
    summary: dict[str, Any] | None
    """The content of summary.json; None before the end of the run."""

    def points(self, key: str) -> tuple[list[int], list[float]]:
        """The steps at which `key` was measured, and its values."""
        found = [(row["step"], row[key]) for row in self.rows if is_number(row.get(key))]
        return [step for step, _ in found], [value for _, value in found]

    def has(self, key: str) -> bool:
        return any(is_number(row.get(key)) for row in self.rows)


@dataclass(frozen=True)
class Plot:
    """One image of the report."""

    file: str
    heading: str
    caption: str
    columns: tuple[str, ...]
    """The columns that it needs."""
    size: tuple[float, float]
    """Width and height in inches."""
    draw: Draw
    """The function that draws it."""


def missing_columns(plot: Plot, run: Curves) -> list[str]:
    if plot.file == HELD_OUT_FILE:  # if the rows have none, it shows the two evaluations of the summary
        return [] if held_out_points(run)[0] else list(plot.columns)
    if plot.file == PHASES_FILE:  # any phase is enough
        return [] if any(run.has(f"time/{name}") for name in PHASES) else list(plot.columns)
    return [column for column in plot.columns if not run.has(column)]


def save_plot(plot: Plot, run: Curves, path: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    # A Figure with its own Agg canvas, because pyplot would keep global state and look for a display.
    with matplotlib.rc_context(STYLE):
        pads = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.03, hspace=0.03)  # in inches
        figure = Figure(figsize=plot.size, layout=pads)
        FigureCanvasAgg(figure)
        plot.draw(figure, run)
        figure.savefig(path)


def _step_axis(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))


def _curve(axes: Axes, run: Curves, key: str, colour: str, label: str | None = None) -> None:
    """Draw one metric over the steps: few points with markers, many points with a moving average."""
    steps, values = run.points(key)
    if len(steps) < SMOOTHED_POINTS:
        axes.plot(steps, values, color=colour, label=label, marker="o" if len(steps) <= MARKED_POINTS else None, markersize=4)
        return
    axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1.0)
    axes.plot(steps, moving_average(values, _window(len(steps))), color=colour, label=label)


def _window(num_points: int) -> int:
    """Number of points in the moving average: odd, about a twentieth of the curve."""
    return max(3, num_points // 20 | 1)


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """The mean over the `window` (odd) points around each point. Near the ends fewer points exist."""
    assert window % 2 == 1
    half = window // 2
    around = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [math.fsum(part) / len(part) for part in around]


def _draw_reward(figure: Figure, run: Curves) -> None:
    axes = figure.subplots()
    _curve(axes, run, "reward_mean", BLUE, "mean reward")
    _curve(axes, run, "accuracy", ORANGE, "accuracy (share of correct responses)")
    axes.set_title("Reward and accuracy on the training batch")
    axes.set_ylabel("mean over responses [0 to 1]")
    _step_axis(axes)
    axes.legend(loc="best")


def held_out_points(run: Curves) -> tuple[list[int], list[float]]:
    """Steps and held-out accuracies from the rows. The first and last come from the summary if the rows do not have them."""
    points = dict(zip(*run.points("held_out_accuracy"), strict=True))
    first, last = run.rows[0]["step"], run.rows[-1]["step"]
    if run.summary is not None:
        start, final = run.summary.get("start_accuracy"), run.summary.get("final_accuracy")
        if is_number(start):
            points.setdefault(min(0, first), start)
        if is_number(final):
            points.setdefault(last, final)
    return sorted(points), [points[step] for step in sorted(points)]


def _draw_held_out(figure: Figure, run: Curves) -> None:
    axes = figure.subplots()
    steps, accuracies = held_out_points(run)
    percent = [100.0 * accuracy for accuracy in accuracies]
    axes.plot(steps, percent, color=GREEN, marker="o", markersize=6, clip_on=False)
    for i in sorted({0, len(steps) - 1}):  # the two figures that matter most
        neighbour = percent[i - 1] if i else percent[min(1, len(percent) - 1)]
        above = percent[i] >= neighbour  # the label goes to the side where there is no line
        offset, side = (0, 9 if above else -9), "bottom" if above else "top"
        axes.annotate(f"{percent[i]:.1f} %", (steps[i], percent[i]), offset, textcoords="offset points", ha="center", va=side)
    axes.margins(x=0.06, y=0.15)
    axes.set_title("Held-out problems")
    axes.set_ylabel("pass@1 [%]")
    _step_axis(axes)


def _draw_ais(figure: Figure, run: Curves) -> None:
    panels = (
        ("alpha", r"Correction strength $\alpha$", r"$\alpha$ [0 to 1]", BLUE),
        ("weight_reliability", r"Weight reliability $\rho$ (ESS ratio)", r"$\rho$ [0 to 1]", GREEN),
        ("divergence_severity", "Divergence severity $D$ (KL)", "$D$ [nats per token]", ORANGE),
        ("variance_amplification", r"Variance amplification $\nu$", r"$\nu$ [ratio]", PURPLE),
    )
    for axes, (key, title, label, colour) in zip(figure.subplots(2, 2, sharex=True).flat, panels, strict=True):
        _curve(axes, run, key, colour)
        axes.set_title(title)
        axes.set_ylabel(label)
        # Plain numbers on the axis, because an offset such as "+9.99e-1" would hide how 0.999 and 0.9991 differ.
        axes.ticklabel_format(axis="y", useOffset=False)
        if key == "divergence_severity" and any(value > 0.0 for value in run.points(key)[1]):
            axes.set_yscale("log", nonpositive="mask")
        if key == "variance_amplification":
            axes.axhline(1.0, color="#666666", linewidth=1.0, linestyle="--")
        _step_axis(axes)
        if not axes.get_subplotspec().is_last_row():
            axes.set_xlabel("")


def _draw_response_length(figure: Figure, run: Curves) -> None:
    axes = figure.subplots()
    _curve(axes, run, "response_length_mean", PURPLE)
    axes.set_title("Response length")
    axes.set_ylabel("mean length [tokens per response]")
    _step_axis(axes)


def bins_of(run: Curves) -> tuple[list[Sequence[dict[str, Any]]], list[float]]:
    """Consecutive rows in at most `MOST_BARS` equal bins, and the edges of the bins in steps."""
    size = math.ceil(len(run.rows) / MOST_BARS)
    bins = [run.rows[i : i + size] for i in range(0, len(run.rows), size)]
    return bins, [*(rows[0]["step"] - 0.5 for rows in bins), run.rows[-1]["step"] + 0.5]


def _draw_phase_times(figure: Figure, run: Curves) -> None:
    axes = figure.subplots()
    bins, edges = bins_of(run)

    def mean_seconds(key: str) -> list[float]:
        # A phase that a step did not enter took no time in that step.
        return [math.fsum(row.get(key) or 0.0 for row in rows) / len(rows) for rows in bins]

    bottom = [0.0] * len(bins)
    for name, colour in zip(PHASES, PHASE_COLOURS, strict=True):
        if run.has(f"time/{name}"):
            top = [below + more for below, more in zip(bottom, mean_seconds(f"time/{name}"), strict=True)]
            axes.stairs(top, edges, baseline=bottom, fill=True, color=colour, label=name)
            bottom = top
    if all(is_number(row.get("time/step")) for row in run.rows):
        axes.stairs(mean_seconds("time/step"), edges, baseline=None, color="#222222", linewidth=1.0, label="whole step")
    axes.set_ylim(bottom=0.0)
    axes.margins(x=0.0)
    axes.set_title("Where the time goes" + (f" (means of {len(bins[0])} steps)" if len(bins[0]) > 1 else ""))
    axes.set_ylabel("wall time [s per step]")
    _step_axis(axes)
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.01, 0.5))  # in the order of the stack


HELD_OUT_FILE, PHASES_FILE = "held_out_accuracy.png", "phase_times.png"
PLOTS = (
    Plot(
        HELD_OUT_FILE,
        "Held-out accuracy",
        "Share of correct responses on problems that never occur in training.",
        ("held_out_accuracy",),
        (9.0, 4.5),
        _draw_held_out,
    ),
    Plot(
        "reward.png",
        "Reward",
        "The mean verifiable reward of the training batch, and the share of its responses that are correct.",
        ("reward_mean", "accuracy"),
        (9.0, 4.5),
        _draw_reward,
    ),
    Plot(
        "ais.png",
        "Adaptive importance sampling",
        "How far the rollout engine is from the trainer (D), the effective sample size of the importance weights (rho), how they "
        "change the second moment of the advantages (nu; 1 is neutral), and how strongly the batch is corrected (alpha).",
        ("alpha", "weight_reliability", "divergence_severity", "variance_amplification"),
        (11.0, 7.0),
        _draw_ais,
    ),
    Plot(
        "response_length.png",
        "Response length",
        "Tokens per sampled response.",
        ("response_length_mean",),
        (9.0, 4.0),
        _draw_response_length,
    ),
    Plot(PHASES_FILE, "Phase times", "Wall seconds of each phase, stacked, per step.", ("time/<phase>",), (10.0, 4.5), _draw_phase_times),
)
