"""What the GPU benchmarks share: options, timing by CUDA events, checks before times, one table at the end.

    bench = Bench(__doc__)                       --device cuda|cpu, --tiny, --rounds, --json FILE, --seconds, --only-checks
    bench.check("same bits", passed, detail)     a failed check lets the other checks run, and nothing is timed after it
    bench.attempt("the small model", work)       an independent part: what it raises is a failed check
    bench.columns("variant", "time", ...)        the checks are done: ends here if one failed, or with --only-checks
    bench.row("fused", ms(bench.time(f)), ...)   medians; text names the row, a `Figure` is something measured
    bench.skip("scaled_mm", "why")
    bench.finish()

With --json the same is kept as data, written anew after every event, so that a script that is killed leaves what it had.
On a CPU times are wall-clock times of code that is not meant for it: only the checks mean something there, and the table says so.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # a checkout that is not installed

# bytes per second, FLOP/s in BF16: what is printed as a share of the peak. From the vendor's data sheets, by name.
PEAKS = {"H200": (4.8e12, 989e12), "H100": (3.35e12, 989e12), "A100": (2.0e12, 312e12)}


T = TypeVar("T")


@dataclass(frozen=True)
class Figure:
    """Something measured. value: in `unit`, None where it cannot be measured here. text: how the table shows it."""

    value: float | None
    unit: str
    text: str

    def __str__(self) -> str:
        return self.text


class Bench:
    def __init__(self, doc: str, add_options: Callable[[argparse.ArgumentParser], object] | None = None) -> None:
        self._began = time.monotonic()
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        parser.add_argument("--tiny", action="store_true", help="smallest sizes: whether it runs, not how fast")
        parser.add_argument("--rounds", type=int, default=20, help="timed calls of each variant; the median is printed")
        parser.add_argument("--json", type=Path, metavar="FILE", help="keep checks, rows and what was skipped as data too")
        parser.add_argument("--seconds", type=float, default=float("inf"), help="time nothing new after this many seconds")
        parser.add_argument("--only-checks", action="store_true", help="end where the timing would begin")
        if add_options:
            add_options(parser)
        self.options = parser.parse_args()
        self.tiny, self.rounds = self.options.tiny, 2 if self.options.tiny else self.options.rounds
        if self.options.device == "cuda" and not torch.cuda.is_available():
            parser.error("there is no CUDA device here; --device cpu --tiny runs the checks")
        self.device = torch.device(self.options.device)
        self.title = doc.splitlines()[0]
        self._rows: list[tuple[object, ...]] = []
        self._columns: tuple[str, ...] = ()
        self._checks: list[dict[str, object]] = []
        self._skipped: list[dict[str, str]] = []
        name = torch.cuda.get_device_name() if self.on_gpu else platform.processor() or platform.machine()
        peaks: tuple[float | None, float | None] = next((p for key, p in PEAKS.items() if key in name), (None, None))
        self.peak_bytes, self.peak_flops = peaks
        print(f"{self.title}\ndevice: {name}; torch {torch.__version__}; Python {platform.python_version()}; seed 0", flush=True)
        torch.manual_seed(0)
        self._save()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        return self.options.seconds - (time.monotonic() - self._began)

    def check(self, what: str, passed: bool, detail: str = "") -> None:
        """Record it. What is wrong needs no speed: after a failed check nothing is timed, and the script's status is 1."""
        self._checks.append({"what": what, "passed": bool(passed), "detail": detail})
        print(f"check: {what}: {'ok' if passed else 'FAILED'}{f' ({detail})' if detail else ''}", flush=True)
        self._save()

    def attempt(self, what: str, work: Callable[[], T]) -> T | None:
        """What `work` returns. If it raises, that is a failed check, and the script goes on to what does not depend on it."""
        try:
            return work()
        except Exception as error:
            traceback.print_exc()
            self.check(f"{what} runs to its end", False, f"{type(error).__name__}: {error}".splitlines()[0])
            return None

    def skip(self, what: str, why: str) -> None:
        entry = {"what": what, "why": why}
        if entry in self._skipped:
            return
        self._skipped.append(entry)
        print(f"skipped: {what}: {why}", flush=True)
        self._save()

    def time(self, work: Callable[[], object], warmup: int = 3) -> float:
        """Median seconds of `work`, by CUDA events on a GPU. Ends the script, with what it has, once --seconds have passed."""
        if self.seconds_left <= 0:
            self.end_early("no time left")
        for _ in range(1 if self.tiny else warmup):
            work()
        seconds: list[float] = []
        while len(seconds) < self.rounds and (not seconds or self.seconds_left > 0):
            if self.on_gpu:
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                torch.cuda.synchronize()
                begin.record()
                work()
                end.record()
                end.synchronize()
                seconds.append(begin.elapsed_time(end) / 1e3)
            else:
                began = time.perf_counter()
                work()
                seconds.append(time.perf_counter() - began)
        if len(seconds) < self.rounds:
            self.skip(f"{self.rounds - len(seconds)} of {self.rounds} rounds of a variant", "no time left")
        return statistics.median(seconds)

    def peak_memory(self, work: Callable[[], object]) -> int | None:
        """Bytes that `work` allocates beyond what was there, at its worst; None on a CPU."""
        if not self.on_gpu:
            work()
            return None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def columns(self, *names: str, with_checks: bool = False) -> None:
        """Names the table's columns. Here the timing begins: with a failed check, or if only checks were asked for, the script ends.

        with_checks: checks and times come from the same runs, so that nothing ends here.
        """
        self._columns = names
        if with_checks:
            return
        if self.options.only_checks:
            self.end_early("only the checks were asked for")
        if self._failed:
            self.end_early("a check failed")

    def row(self, *cells: object) -> None:
        self._rows.append(cells)
        self._save()

    def end_early(self, why: str) -> NoReturn:
        """What is left is skipped; status 1 if a check failed, else 0."""
        self.skip("the rest of the times", why)
        self.finish()
        sys.exit(0)

    def finish(self) -> None:
        """Print the table and what was skipped; ends the script with status 1 if a check failed."""
        rows = [tuple(str(cell) for cell in row) for row in (self._columns, *self._rows)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self._columns))]
        print()
        for row in rows:
            print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))))
        print(f"medians of {self.rounds} rounds" + ("" if self.on_gpu and not self.tiny else "; times mean nothing on this device or size"))
        print("\n".join(f"skipped: {s['what']}: {s['why']}" for s in self._skipped) if self._skipped else "skipped: nothing", flush=True)
        self._save(finished=True)
        if self._failed:
            sys.exit(1)

    @property
    def _failed(self) -> bool:
        return not all(check["passed"] for check in self._checks)

    def _save(self, finished: bool = False) -> None:
        """The whole file again, in the place of the last one."""
        if self.options.json is None:
            return
        rows = [
            {name: asdict(cell) if isinstance(cell, Figure) else str(cell) for name, cell in zip(self._columns, row, strict=True)}
            for row in self._rows
        ]
        data = {"title": self.title, "finished": finished, "checks": self._checks, "rows": rows, "skipped": self._skipped}
        partial = self.options.json.with_suffix(".partial")
        partial.write_text(json.dumps(data))
        partial.replace(self.options.json)


def ms(seconds: float) -> Figure:
    return Figure(seconds, "s", f"{seconds * 1e3:.3f} ms")


def ratio(base: float, seconds: float) -> Figure:
    """How many times as fast as `base`."""
    return Figure(base / seconds, "times", f"{base / seconds:.2f}x")


def share(achieved: float, peak: float | None) -> Figure:
    return Figure(None, "share", "-") if peak is None else Figure(achieved / peak, "share", f"{achieved / peak:.0%}")


def mib(size: int | None) -> Figure:
    return Figure(None, "bytes", "-") if size is None else Figure(size, "bytes", f"{size / 2**20:,.0f} MiB")


def number(value: float, unit: str, shown: str = ",.0f") -> Figure:
    """shown: the format of the table's text, which leaves the unit to the column's name."""
    return Figure(value, unit, format(value, shown))
