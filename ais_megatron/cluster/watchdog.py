"""Ends a job in which a rank hangs: nobody pays for a machine that waits, and the stacks say where it stood.

Every rank watches itself. Ranks that wait for a hung one in a collective make no progress either, so all of them write
``logs/rank_N.stacks`` and leave with status 124.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from ais_megatron.cluster.exits import EXIT_HUNG


class Watchdog:
    """A context; inside it `beat` must be called at least every `minutes`, from any thread. 0 minutes: it does nothing.

    A hang inside C code that keeps the interpreter's lock stops the watching thread as well; for that faulthandler's own
    timer, which needs no interpreter, is set to twice the time (it leaves with status 1).
    """

    def __init__(self, minutes: float, run_dir: Path, rank: int) -> None:
        self._seconds = minutes * 60.0
        self._path = Path(run_dir) / "logs" / f"rank_{rank}.stacks"
        self._rank = rank
        self._ended = threading.Event()
        self._deadline = 0.0

    def __enter__(self) -> Watchdog:
        if self._seconds:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._stacks = self._path.open("w", encoding="utf-8")  # opened now: a hung file system must not stop us later
            self.beat()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def beat(self) -> None:
        """Progress was made."""
        if self._seconds:
            self._deadline = time.monotonic() + self._seconds
            faulthandler.dump_traceback_later(2 * self._seconds, exit=True, file=self._stacks)

    def __exit__(self, *_: object) -> None:
        if self._seconds:
            self._ended.set()
            faulthandler.cancel_dump_traceback_later()
            self._stacks.close()
            if not self._path.stat().st_size:
                self._path.unlink()

    def _watch(self) -> None:
        while not self._ended.wait(max(self._deadline - time.monotonic(), 0.0)):
            if time.monotonic() < self._deadline:
                continue  # it beat while we slept
            print(
                f"error: rank {self._rank} made no progress for {self._seconds / 60:g} minutes (run.watchdog_minutes); "
                f"its stacks are in {self._path}; status {EXIT_HUNG}",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(self._stacks, all_threads=True)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            os._exit(EXIT_HUNG)
