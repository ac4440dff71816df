"""Ends a job in which a rank hangs, and writes the stacks of all ranks, which show where it hung.

Every rank watches itself. Ranks that wait for a hung rank in a collective make no progress either. So all of them write
``logs/rank_N.stacks`` and exit with status 124.
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
    """A context in which `beat` must be called at least every `minutes`, from any thread. With 0 minutes it does nothing.

    A hang in C code that holds the interpreter's lock stops the watching thread as well. For this case faulthandler's own timer,
    which needs no interpreter, is set to twice the time. It exits with status 1.
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
            self._stacks = self._path.open("w", encoding="utf-8")  # opened now, because a hung file system could block it later
            self.beat()
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def beat(self) -> None:
        """Report progress, which restarts the time limit."""
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
                continue  # there was progress during the wait
            print(
                f"error: rank {self._rank} made no progress for {self._seconds / 60:g} minutes (run.watchdog_minutes); "
                f"its stacks are in {self._path}; ending the job with status {EXIT_HUNG}",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(self._stacks, all_threads=True)
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            os._exit(EXIT_HUNG)
