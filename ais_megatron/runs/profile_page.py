"""The report's section on profiled steps: the seconds of each phase, and the operators that took longest."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from ais_megatron.runs.profiling import FOLDER

SHOWN = 25  # operators of a step

Profile = Mapping[str, Any]


def profile_section(profiles: Mapping[int, Sequence[Profile]]) -> str:
    """HTML for what `read_profiles` found; empty if no step was profiled. The newest step is open."""
    if not profiles:
        return ""
    newest = max(profiles)
    steps = "\n".join(_step(step, profiles[step], is_open=step == newest) for step in sorted(profiles))
    note = (
        "From run.profile_steps. The profiler itself takes time, so these steps are slower than others. The whole traces are in "
        f"<code>{FOLDER}/</code>, for Perfetto (ui.perfetto.dev) or chrome://tracing."
    )
    return f'<h2 id="profile">Profiled steps</h2>\n<p class="note">{note}</p>\n{steps}'


def _step(step: int, ranks: Sequence[Profile], is_open: bool) -> str:
    count = f"{len(ranks)} ranks" if len(ranks) > 1 else "1 rank"
    body = f'<div class="tables">\n{_phases(ranks)}\n{_operators(ranks)}\n</div>'
    return f"<details{' open' if is_open else ''}><summary>Step {step}, {count}</summary>\n{body}\n</details>"


def _phases(ranks: Sequence[Profile]) -> str:
    """Seconds of each phase on the rank that took longest for it, and on the one that took shortest."""
    names = list(dict.fromkeys(name for rank in ranks for name in rank["phases"]))
    rows = []
    for name in names:
        seconds = [rank["phases"].get(name, 0.0) for rank in ranks]
        rows.append((name, f"{max(seconds):.3f}", f"{min(seconds):.3f}"))
    return _table(("phase", "slowest rank [s]", "fastest rank [s]"), rows)


def _operators(ranks: Sequence[Profile]) -> str:
    """The operators of all ranks together, each with its mean over ranks."""
    key = "device_s" if any(rank["uses_device"] for rank in ranks) else "cpu_s"
    sums: dict[tuple[str, str], list[float]] = {}
    for rank in ranks:
        for row in rank["operators"]:
            total = sums.setdefault((row["name"], row["phase"]), [0.0, 0.0])
            total[0] += row["calls"] / len(ranks)
            total[1] += row[key] / len(ranks)
    whole = sum(seconds for _, seconds in sums.values())
    longest = sorted(sums.items(), key=lambda item: -item[1][1])[:SHOWN]
    kind = "GPU" if key == "device_s" else "CPU"
    rows = [
        (name, phase, f"{calls:,.0f}", f"{seconds:.4f}", f"{seconds / whole:.1%}" if whole else "-")
        for (name, phase), (calls, seconds) in longest
    ]
    return _table(("operator", "phase", "calls", f"own {kind} time [s]", "share"), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"
