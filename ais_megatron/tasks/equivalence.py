"""Runs math-verify in a child process, with limits on CPU time and memory that the kernel enforces.

math-verify's own timeouts raise an exception from a SIGALRM handler. That works only in the main thread, and Python runs a handler only
between bytecodes. A single power of big integers, such as 9^{9^{9}}, never returns, so the handler never runs. Here the child has a CPU
timer with the default action (SIGPROF) and a limit on its address space. If it gets stuck, the kernel ends it, the answer counts as
different, and the next comparison starts a new child. The limit is CPU time and not wall time, so a busy machine does not change
rewards. The child also keeps math-verify's imports out of this process.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

CPU_SECONDS = 2.0  # for one comparison, which usually takes 10 ms
WALL_SECONDS = 60  # only for a child that waits for something instead of computing
MEMORY_BYTES = 4 << 30


class _Worker:
    """The child and two pipes. A request is a line with the JSON list [gold, answer, CPU seconds], a reply a line with a JSON boolean."""

    def __init__(self) -> None:
        # -P keeps this folder out of the child's path, where our modules could shadow others with the same name.
        command = [sys.executable, "-P", str(Path(__file__).resolve())]
        self.pid = os.getpid()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8"
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.requests, self.replies = self.process.stdin, self.process.stdout
        ready = self.replies.readline()
        if ready != "ready\n":
            self.close()
            raise RuntimeError(f"math-verify could not be started in a child process: {ready.strip() or 'it ended immediately'}")

    def ask(self, gold: str, answer: str, cpu_seconds: float) -> bool | None:
        """The reply, or None if the child ended without one."""
        try:
            self.requests.write(json.dumps([gold, answer, cpu_seconds]) + "\n")
            self.requests.flush()
        except BrokenPipeError:
            return None
        reply = self.replies.readline()
        return json.loads(reply) if reply.endswith("\n") else None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.replies.close()
        try:
            self.requests.close()
        except BrokenPipeError:
            pass  # the child ended before it read the request


_lock = threading.Lock()
_worker: _Worker | None = None


def are_equivalent(gold: str, answer: str, cpu_seconds: float = CPU_SECONDS) -> bool:
    """Whether math-verify considers two LaTeX expressions (without ``$``) equal. False if it does not finish within `cpu_seconds`.

    May be called from any thread and after a fork. Calls run one after the other.

    Raises:
        RuntimeError: math-verify is not installed, or its process does not start.
    """
    global _worker
    if importlib.util.find_spec("math_verify") is None:
        raise RuntimeError("task.name=math500 needs math-verify; run pip install math-verify")
    with _lock:
        if _worker is not None and _worker.pid != os.getpid():
            _worker = None  # inherited by a fork, and still used by the parent
        if _worker is None:
            _worker = _Worker()
        verdict = _worker.ask(gold, answer, cpu_seconds)
        if verdict is None:
            close_worker()
        return bool(verdict)


def close_worker() -> None:
    """End the child process, if there is one. The next comparison starts a new one."""
    global _worker
    if _worker is not None and _worker.pid == os.getpid():
        _worker.close()
    _worker = None


atexit.register(close_worker)


def _serve() -> None:
    """The child's loop. It ends with its input, so the child does not outlive its parent."""
    import logging
    import resource
    import signal

    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # so that the output of a library does not look like a reply
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        replies.write(f"{error}\n")
        return
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    latex = [LatexExtractionConfig()]
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        gold, answer, cpu_seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        signal.alarm(WALL_SECONDS)
        try:
            left, right = (parse(f"${text}$", extraction_config=latex, parsing_timeout=None) for text in (gold, answer))
            verdict = bool(left and right) and verify(left, right, timeout_seconds=None)
        except Exception:  # a parser may raise anything on hostile text; then the answer counts as different
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        replies.write(json.dumps(bool(verdict)) + "\n")
        replies.flush()


if __name__ == "__main__":
    _serve()
