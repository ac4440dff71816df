"""The charts of a run's report: which figures each one shows, and what a reader should know about them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ais_megatron.runs.metrics import PHASES, MetricsRow
from ais_megatron.runs.summary import is_number

POSITIONS = "divergence_by_position"
TRUNCATED = "truncated_fraction"


@dataclass(frozen=True)
class Chart:
    """Curves over the steps."""

    heading: str
    caption: str
    columns: tuple[tuple[str, str], ...]
    """(column of metrics.jsonl, its name in the legend). A column without a value is left out; a chart without any is named as missing."""
    percent: bool = False
    log: bool = False
    """Whether the axis is logarithmic."""
    zero: bool = False
    """Whether the axis begins at 0."""
    reference: float | None = None
    """The value of a dashed line."""

    def spec(self, run: Run) -> dict[str, Any] | None:
        series = [{"key": key, "name": name} for key, name in self.columns if run.has(key)]
        return {"kind": "lines", "series": series, **_options(self.percent, self.log, self.zero, self.reference)} if series else None

    @property
    def missing(self) -> str:
        return ", ".join(key for key, _ in self.columns)


@dataclass(frozen=True)
class Run:
    """What the report knows of a run."""

    rows: Sequence[MetricsRow]
    """Of metrics.jsonl."""
    evaluations: Sequence[MetricsRow]
    """Of evaluations.jsonl: a row per set and evaluation, with the set's name under "set"."""
    summary: dict[str, Any] | None
    """The content of summary.json; None before the end of the run."""

    def has(self, key: str) -> bool:
        return any(is_number(row.get(key)) for row in self.rows)

    def points(self, key: str) -> dict[int, float]:
        """The values of a column by step."""
        return {row["step"]: row[key] for row in self.rows if is_number(row.get(key))}


def _options(percent: bool, log: bool, zero: bool, reference: float | None) -> dict[str, Any]:
    given: dict[str, Any] = {name: True for name, value in (("percent", percent), ("log", log), ("zero", zero)) if value}
    return given if reference is None else given | {"reference": reference}


LEARNING = (
    Chart(
        "Reward",
        "The mean verifiable reward of the training batch, and the shares of its responses that are correct and that have an answer.",
        (("reward_mean", "reward"), ("accuracy", "correct"), ("well_formed", "well-formed")),
    ),
    Chart("Response length", "Tokens per sampled response, on average.", (("response_length_mean", "tokens"),), zero=True),
    Chart("Entropy", "Of the policy's distribution over the next token, at the sampling temperature, in nats.", (("entropy", "entropy"),)),
    Chart(
        "Groups without a signal",
        "The share of prompts whose responses all got the same reward.",
        (("zero_signal_groups", ""),),
        percent=True,
    ),
    Chart(
        "Exploration",
        "The share of prompts that at least one response of the group solves, which is pass@k of the training prompts. And the share of "
        "responses that are left if equal ones of a group count once.",
        (("solved_groups", "solved prompts"), ("distinct_responses", "distinct responses")),
        percent=True,
    ),
    Chart("Gradient norm", "Before clipping.", (("grad_norm", "gradient norm"),), log=True),
)
MISMATCH = (
    Chart("Correction strength alpha", "0: the gradient without importance weights. 1: fully corrected.", (("alpha", "alpha"),)),
    Chart(
        "Weight reliability rho",
        "The effective sample size of the importance weights as a share of the batch: truncated as in use, and without truncation.",
        (("weight_reliability", "truncated weights"), ("weight_reliability_raw", "without truncation")),
    ),
    Chart(
        "Divergence severity D",
        "How far the rollout engine is from the trainer: an estimate of their KL divergence in nats per token.",
        (("divergence_severity", "D"),),
        log=True,
    ),
    Chart(
        "Variance amplification nu",
        "How the importance weights change the second moment of the advantages. 1 is neutral.",
        (("variance_amplification", "nu"),),
        reference=1.0,
    ),
)
THROUGHPUT = Chart(
    "Throughput", "Response tokens of the whole job per second of a step.", (("tokens_per_second", "tokens per second"),), zero=True
)

IDLE = Chart(
    "Idle shares",
    "Of the trainer, which waits for responses and rewards, and of the engine, whose servers have no request. Mean over ranks and servers.",
    (("idle/trainer", "trainer"), ("idle/engine", "engine")),
    percent=True,
    zero=True,
)

Points = dict[int, tuple[float, float | None]]  # value and standard error by step


def held_out(run: Run) -> dict[str, Any] | None:
    """pass@k of each set, with bands of one standard error. Runs of earlier versions have one set without an error."""
    curves = _evaluated(run, r"pass@\d+")
    if not curves and (points := held_out_points(run)):
        curves = {"held-out problems, pass@1": {step: (value, None) for step, value in points.items()}}
    series = [_series(name, points) for name, points in curves.items()]
    return {"kind": "lines", "series": series, "percent": True} if series else None


def truncation(run: Run) -> dict[str, Any] | None:
    """The share of responses that were cut at the limit, in training and on each set."""
    series = [{"key": TRUNCATED, "name": "training", "always": True}] if run.has("finished_fraction") else []
    series += [_series(name.removesuffix(f", {TRUNCATED}"), points) for name, points in _evaluated(run, TRUNCATED).items()]
    return {"kind": "lines", "series": series, "percent": True, "zero": True} if series else None


def _evaluated(run: Run, figure: str) -> dict[str, Points]:
    """The figures that match a pattern, as a curve for each "set, figure"."""
    curves: dict[str, Points] = {}
    for row in run.evaluations:
        for key in row:
            if re.fullmatch(figure, key) and is_number(row[key]):
                curves.setdefault(f"{row['set']}, {key}", {})[row["step"]] = (row[key], row.get(f"{key}_se"))
    for row in run.rows:  # a run without a file of evaluations may have them here
        for key in row:
            if (found := re.fullmatch(rf"eval/(.+)/({figure})", key)) and is_number(row[key]):
                curves.setdefault(f"{found[1]}, {found[2]}", {}).setdefault(row["step"], (row[key], row.get(f"{key}_se")))
    return curves


def _series(name: str, points: Points) -> dict[str, Any]:
    steps = sorted(points)
    return {"name": name, "always": True, "x": steps, "y": [points[s][0] for s in steps], "error": [points[s][1] for s in steps]}


def held_out_points(run: Run) -> dict[int, float]:
    """Held-out accuracy by step from the rows. The first and last come from the summary if the rows do not have them."""
    points = run.points("held_out_accuracy")
    first, last = run.rows[0]["step"], run.rows[-1]["step"]
    start, final = (run.summary or {}).get("start_accuracy"), (run.summary or {}).get("final_accuracy")
    if is_number(start):
        points.setdefault(min(0, first), start)
    if is_number(final):
        points.setdefault(last, final)
    return points


def positions(run: Run) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """D by position in the response: a map over the steps, and its profile in the first and last tenth of the steps."""
    found = [(row["step"], row[POSITIONS]) for row in run.rows if row.get(POSITIONS)]
    values = [value for _, bins in found for value in bins if is_number(value) and value > 0.0]
    if not values:
        return None
    labels = [position_label(number) for number in range(max(len(bins) for _, bins in found))]
    tenth = max(1, len(found) // 10)
    parts = {"first": found[:tenth], "last": found[-tenth:]} if len(found) > 1 else {"only": found}
    series = []
    for name, part in parts.items():
        means = {}
        for number in range(len(labels)):
            present = [bins[number] for _, bins in part if len(bins) > number and is_number(bins[number])]
            if present:
                means[number] = sum(present) / len(present)
        text = f"{name} {tenth} steps" if tenth > 1 else f"step {part[0][0]}"
        series.append({"name": text, "always": True, "x": list(means), "y": list(means.values())})
    shared = {"labels": labels, "xName": "token of the response"}
    return (
        {"kind": "heat", "series": [], "steps": [s for s, _ in found], "values": [b for _, b in found], "range": _range(values), **shared},
        {"kind": "lines", "series": series, "log": True, **shared},
    )


def position_label(number: int) -> str:
    """The tokens of a bin of `diagnostics.Diagnostics.divergence_by_position`, counted from 1."""
    first, last = 2**number, 2 ** (number + 1) - 1
    return str(first) if first == last else f"{first}–{last}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The ends of a colour scale. The extreme hundredths, and what is tiny beside the rest, would leave one colour for all others."""
    ordered = sorted(values)
    high = ordered[-1 - len(ordered) // 100]
    return max(ordered[len(ordered) // 100], high / 300.0), high


def phases(run: Run) -> dict[str, Any] | None:
    series = [{"key": f"time/{name}", "name": name} for name in PHASES if run.has(f"time/{name}")]
    if series and run.has("time/step"):
        series.append({"key": "time/other", "name": "other"})
    return {"kind": "stack", "series": series} if series else None


def columns(run: Run) -> dict[str, list[float | None]]:
    """Every numeric column of the run, one value per row, and two that follow from them: the truncated share of the training responses, and
    as ``time/other`` the seconds of a step that no phase accounts for."""
    names = sorted({key for row in run.rows for key, value in row.items() if is_number(value) and key != "step"})
    found: dict[str, list[float | None]] = {name: [row[name] if is_number(row.get(name)) else None for row in run.rows] for name in names}
    if "finished_fraction" in found:
        found[TRUNCATED] = [None if value is None else 1.0 - value for value in found["finished_fraction"]]
    inside = [f"time/{name}" for name in PHASES if name not in ("evaluate", "checkpoint")]  # time/step ends before these two
    if "time/step" in found:
        found["time/other"] = [
            max(0.0, row["time/step"] - sum(row.get(key) or 0.0 for key in inside)) if is_number(row.get("time/step")) else None
            for row in run.rows
        ]
    return found
