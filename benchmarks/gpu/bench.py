"""What the GPU benchmarks share: options, timing by CUDA events, checks before times, one table at the end.

    bench = Bench(__doc__)                       --device cuda|cpu, --tiny, --rounds
    bench.check("same bits", passed, detail)     a failed check ends the script before anything is timed
    bench.row("fused", bench.time(f), ...)       medians; `base` is what ratios refer to
    bench.skip("scaled_mm", "why")
    bench.finish()

On a CPU times are wall-clock times of code that is not meant for it: only the checks mean something there, and the table says so.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # a checkout that is not installed

# bytes per second, FLOP/s in BF16: what is printed as a share of the peak. From the vendor's data sheets, by name.
PEAKS = {"H200": (4.8e12, 989e12), "H100": (3.35e12, 989e12), "A100": (2.0e12, 312e12)}


class Bench:
    def __init__(self, doc: str, add_options: Callable[[argparse.ArgumentParser], object] | None = None) -> None:
        parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        parser.add_argument("--tiny", action="store_true", help="smallest sizes: whether it runs, not how fast")
        parser.add_argument("--rounds", type=int, default=20, help="timed calls of each variant; the median is printed")
        if add_options:
            add_options(parser)
        self.options = parser.parse_args()
        self.tiny, self.rounds = self.options.tiny, 2 if self.options.tiny else self.options.rounds
        if self.options.device == "cuda" and not torch.cuda.is_available():
            parser.error("there is no CUDA device here; --device cpu --tiny runs the checks")
        self.device = torch.device(self.options.device)
        self.title = doc.splitlines()[0]
        self._rows: list[tuple[str, ...]] = []
        self._columns: tuple[str, ...] = ()
        self._notes: list[str] = []
        name = torch.cuda.get_device_name() if self.on_gpu else platform.processor() or platform.machine()
        peak = next((p for key, p in PEAKS.items() if key in name), (None, None))
        self.peak_bytes, self.peak_flops = peak
        print(f"{self.title}\ndevice: {name}; torch {torch.__version__}; Python {platform.python_version()}; seed 0", flush=True)
        torch.manual_seed(0)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def check(self, what: str, passed: bool, detail: str = "") -> None:
        """Ends the script with status 1 if it failed: what is wrong needs no speed."""
        print(f"check: {what}: {'ok' if passed else 'FAILED'}{f' ({detail})' if detail else ''}", flush=True)
        if not passed:
            sys.exit(1)

    def skip(self, what: str, why: str) -> None:
        self._notes.append(f"skipped: {what}: {why}")
        print(self._notes[-1], flush=True)

    def time(self, work: Callable[[], object], warmup: int = 3) -> float:
        """Median seconds of `work`, by CUDA events on a GPU."""
        for _ in range(1 if self.tiny else warmup):
            work()
        seconds = []
        for _ in range(self.rounds):
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

    def columns(self, *names: str) -> None:
        self._columns = names

    def row(self, *cells: object) -> None:
        self._rows.append(tuple(str(cell) for cell in cells))

    def finish(self) -> None:
        """Print the table and what was skipped."""
        widths = [max(len(row[i]) for row in (self._columns, *self._rows)) for i in range(len(self._columns))]
        print()
        for row in (self._columns, *self._rows):
            print("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))))
        print(f"medians of {self.rounds} rounds" + ("" if self.on_gpu and not self.tiny else "; times mean nothing on this device or size"))
        print("\n".join(self._notes) if self._notes else "skipped: nothing")


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"


def ratio(base: float, seconds: float) -> str:
    """How many times as fast as `base`."""
    return f"{base / seconds:.2f}x"


def share(achieved: float, peak: float | None) -> str:
    return "-" if peak is None else f"{achieved / peak:.0%}"


def mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.0f} MiB"
