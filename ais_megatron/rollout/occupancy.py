"""Records when the places where responses are generated have work, for the idle shares in the metrics.

A place is an embedded engine, or one server. Each rank knows only its own requests, so the moments of several ranks are put together: the
step is cut into `SLOTS` equal slots, counted from each rank's own start of the step, and a server has work in a slot if any rank has a
request there. Clocks of different hosts are never compared.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil, floor
from threading import Lock
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

SLOTS = 512


@runtime_checkable
class HasOccupancy(Protocol):
    """An engine that knows when each of its servers has work of this rank. Other engines count as one place."""

    @property
    def occupancy(self) -> Occupancy: ...


class Occupancy:
    """When this rank had work at each of `places` places. May be used by several threads."""

    def __init__(self, places: int) -> None:
        self._open = [0] * places
        self._since = [0.0] * places
        self._spans: list[list[tuple[float, float]]] = [[] for _ in range(places)]
        self._lock = Lock()

    @contextmanager
    def at(self, place: int) -> Iterator[None]:
        """This rank has a piece of work at `place` during the block."""
        with self._lock:
            if not self._open[place]:
                self._since[place] = time.perf_counter()
            self._open[place] += 1
        try:
            yield
        finally:
            with self._lock:
                self._open[place] -= 1
                if not self._open[place]:
                    self._spans[place].append((self._since[place], time.perf_counter()))

    def take(self, start: float, end: float) -> Tensor:
        """bool ``[places, SLOTS]``: whether this rank had work in each slot between `start` and `end` (of ``time.perf_counter``). Earlier
        spans are forgotten."""
        busy = torch.zeros(len(self._open), SLOTS, dtype=torch.bool)
        with self._lock:
            for place, spans in enumerate(self._spans):
                going = [(self._since[place], end)] if self._open[place] else []
                for first, last in [*spans, *going]:
                    low, high = (SLOTS * (moment - start) / (end - start) for moment in (first, last))
                    busy[place, max(floor(low), 0) : max(ceil(high), 0)] = True
                spans[:] = [span for span in spans if span[1] > end]
        return busy
