"""Profiles of single steps (`run.profile_steps`): a torch.profiler trace of every rank, and a table of its operators.

    run.dir/profile/step_000003/rank_0000.json.gz          the trace, for Perfetto or chrome://tracing
    run.dir/profile/step_000003/rank_0000.operators.json   seconds of each phase, and the operators that take longest

The phases of a step are named ranges in both, and on a GPU also NVTX ranges. With ``run.profiler=nsys`` there is no trace: the step is
marked for ``nsys profile --capture-range=cudaProfilerApi``, because CUPTI serves one profiler at a time. Steps that are not profiled do
nothing of this.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from ais_megatron.runs.folder import write_json_atomic
from ais_megatron.runs.metrics import PHASES, PhaseTimer

FOLDER, OPERATORS = "profile", ".operators.json"
KEPT = 200  # operators in a file
RANGE = "step"  # begins the name of the range of a whole step
NO_PHASE = "other"


class StepProfiler:
    """Profiles the steps in `steps` on this rank.

    timer: its phases become named ranges. on_cuda: record the GPU's kernels too. tool: `run.profiler`.
    """

    def __init__(self, steps: Sequence[int], tool: str, run_dir: Path, rank: int, timer: PhaseTimer, on_cuda: bool) -> None:
        self._steps, self._tool, self._on_cuda = frozenset(steps), tool, on_cuda
        self._run_dir, self._rank, self._timer = run_dir, rank, timer
        self._write: Callable[[], None] | None = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile the block, if it is a step to profile."""
        if number not in self._steps:
            yield
            return
        import torch

        self._timer.named_range = self._named_range
        try:
            with self._capture(number), self._named_range(f"{RANGE} {number}"):
                yield
                if self._on_cuda:
                    torch.cuda.synchronize()
        finally:
            self._timer.named_range = None

    def write(self) -> None:
        """Write what `step` has recorded. If it has recorded nothing, nothing is done.

        Raises:
            OSError: the files cannot be written.
        """
        if self._write is not None:
            write, self._write = self._write, None
            write()

    @property
    def has_recorded(self) -> bool:
        return self._write is not None

    @contextmanager
    def _capture(self, number: int) -> Iterator[None]:
        import torch

        if self._tool == "nsys":
            torch.cuda.profiler.start()
            try:
                yield
            finally:
                torch.cuda.profiler.stop()
            return
        kinds = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if self._on_cuda else [])]
        with torch.profiler.profile(activities=kinds) as profiler:
            yield
        path = self._run_dir / FOLDER / f"step_{number:06d}" / f"rank_{self._rank:04d}"
        self._write = lambda: _write(profiler, number, self._rank, path)

    def _named_range(self, name: str) -> AbstractContextManager[Any]:
        import torch

        ranges = ExitStack()
        ranges.enter_context(torch.profiler.record_function(name) if self._tool == "trace" else nullcontext())
        ranges.enter_context(torch.cuda.nvtx.range(name) if self._on_cuda else nullcontext())
        return ranges


def _write(profiler: Any, number: int, rank: int, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    trace = path.with_name(f"{path.name}.json.gz")
    unfinished = path.with_name(f".{path.name}.json.gz")  # torch compresses if the name ends so
    profiler.export_chrome_trace(str(unfinished))
    os.replace(unfinished, trace)
    write_json_atomic(path.with_name(path.name + OPERATORS), {"step": number, "rank": rank, **summary_of(profiler.events())})


def summary_of(events: Sequence[Any]) -> dict[str, Any]:
    """The seconds of each phase, and the operators with their phase, the longest first.

    An operator belongs to the phase in whose time it began, on whatever thread, because phases follow one another. Its own time leaves out
    the operators that it called. On a GPU it is that of its kernels.

    events: torch's ``FunctionEvent``s of one step, with times in microseconds.
    """
    spans = sorted((e.time_range.start, e.time_range.end, e.name) for e in events if e.name in PHASES and not _is_on_device(e))
    phases: dict[str, float] = {}
    for start, end, name in spans:
        phases[name] = phases.get(name, 0.0) + (end - start) / 1e6
    found: dict[tuple[str, str], list[float]] = {}
    next_span = 0
    for event in sorted((e for e in events if not _is_on_device(e)), key=lambda e: e.time_range.start):
        if event.name in PHASES or event.name.startswith(f"{RANGE} "):
            continue
        while next_span < len(spans) and spans[next_span][1] < event.time_range.start:
            next_span += 1
        is_inside = next_span < len(spans) and spans[next_span][0] <= event.time_range.start
        sums = found.setdefault((event.name, spans[next_span][2] if is_inside else NO_PHASE), [0.0, 0.0, 0.0])
        sums[0] += event.count
        sums[1] += event.self_cpu_time_total / 1e6
        sums[2] += event.self_device_time_total / 1e6
    rows: list[dict[str, Any]] = [
        dict(name=name, phase=phase, calls=int(calls), cpu_s=cpu, device_s=device) for (name, phase), (calls, cpu, device) in found.items()
    ]
    uses_device = any(row["device_s"] for row in rows)
    rows.sort(key=lambda row: -row["device_s" if uses_device else "cpu_s"])
    return {"phases": phases, "uses_device": uses_device, "operators": rows[:KEPT]}


def _is_on_device(event: Any) -> bool:
    """Kernels have events of their own beside those of the operators that launched them."""
    return bool(event.device_type.name != "CPU")


def read_profiles(run_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """What `StepProfiler` wrote, by step and in the order of the ranks; empty if no step was profiled.

    Raises:
        ValueError: a file is damaged.
    """
    profiles: dict[int, list[dict[str, Any]]] = {}
    for path in sorted((run_dir / FOLDER).glob(f"step_*/rank_*{OPERATORS}")):
        try:
            profile = json.loads(path.read_text(encoding="utf-8"))
            profiles.setdefault(profile["step"], []).append(profile)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a table of operators ({error}); delete it to report without it") from error
    return profiles
