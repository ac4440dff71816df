"""What a benchmark hands to `run_all.py`: figures by name, as the last line it prints.

A figure says how ours compares: ``ratio`` is how many times better ours is than the peer (above 1: ours is better) where there
is a peer, and ours itself otherwise. ``goal`` bounds the ratio: at least that much with a peer, at most that much without.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

MARK = "RESULT "
Figure = dict[str, object]


def against_peer(ours: float, peer: float, unit: str, goal: float | None = None, note: str = "") -> Figure:
    """unit: "s" and "bytes" are better the smaller, everything else the larger."""
    ratio = peer / ours if unit in ("s", "bytes") else ours / peer
    return _figure(ours, peer, ratio, unit, goal, None if goal is None else ratio >= goal, note)


def share(ours: float, unit: str = "of a step", goal: float | None = None, note: str = "") -> Figure:
    """A cost, better the smaller."""
    return _figure(ours, None, ours, unit, goal, None if goal is None else ours < goal, note)


def plain(ours: float, unit: str, note: str = "") -> Figure:
    """A figure without a judgement."""
    return _figure(ours, None, None, unit, None, None, note)


def _figure(ours: float, peer: float | None, ratio: float | None, unit: str, goal: float | None, met: bool | None, note: str) -> Figure:
    return {"ours": ours, "peer": peer, "ratio": ratio, "goal": goal, "met": met, "unit": unit, "note": note}


def emit(figures: dict[str, Figure]) -> None:
    """Print the figures for a reader and, last, for the runner."""
    for name, figure in figures.items():
        print(describe(name, figure))
    print(MARK + json.dumps(figures), flush=True)


def describe(name: str, figure: Figure) -> str:
    """One line of the table."""
    cells = [f"{value:.4g}" if isinstance(value, float | int) else "" for value in (figure["ours"], figure["peer"], figure["ratio"])]
    verdict = "" if figure["met"] is None else ("met" if figure["met"] else "MISSED") + f" (goal {figure['goal']:g})"
    return f"{name:<52} {cells[0]:>10} {cells[1]:>10} {cells[2]:>8}  {figure['unit']:<12} {verdict:<18} {figure['note']}".rstrip()


def machine() -> str:
    """The processor's name, as the kernel knows it, and the number of cores."""
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


@contextmanager
def stopwatch(into: list[float]) -> Iterator[None]:
    """Append the block's wall seconds."""
    start = perf_counter()
    yield
    into.append(perf_counter() - start)
