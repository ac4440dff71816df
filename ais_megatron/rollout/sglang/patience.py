"""Waits for servers and prints a line once a minute. A start may take as long as compiling kernels, and silence looks like a hang."""

from __future__ import annotations

import sys
import time

EVERY_S = 60.0
DEEP_GEMM = (
    "On GPUs SGLang may be compiling its DeepGEMM kernels. This typically takes 10-20 minutes with a cold cache, and the servers of a "
    "host take turns. `ais-megatron serve CONFIG --compile` compiles them beforehand"
)


class Patience:
    """A wait of at most `limit_s` seconds.

    key: the configuration key of the limit.
    on_gpus: whether kernels may be compiled during the wait.
    """

    def __init__(self, limit_s: float, key: str, on_gpus: bool) -> None:
        self._limit_s, self._key, self._on_gpus = limit_s, key, on_gpus
        self._began = self._spoke = time.monotonic()

    @property
    def is_over(self) -> bool:
        return time.monotonic() - self._began > self._limit_s

    def tell(self, whom: str, detail: str) -> None:
        """If a minute has passed, print what is waited for and what is known about it."""
        now = time.monotonic()
        if now - self._spoke < EVERY_S:
            return
        self._spoke = now
        hint = f". {DEEP_GEMM}" if self._on_gpus else ""
        print(
            f"waiting for {whom} for {now - self._began:.0f} s (at most {self._limit_s:.0f} s, {self._key}); {detail}{hint}",
            file=sys.stderr,
            flush=True,
        )
