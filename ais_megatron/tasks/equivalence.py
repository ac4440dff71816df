"""math-verify in a process of its own, with a limit on CPU time and memory that the kernel enforces.

math-verify's own timeouts raise an exception from a SIGALRM handler. That works in the main thread only, and Python runs a
handler between bytecodes: one big-integer power, such as 9^{9^{9}}, never returns to let it run. So the comparison happens
in a child that computes under the default action of a CPU timer (SIGPROF) and with an address-space limit: whatever it gets
stuck in, the kernel ends it, the answer counts as different, and the next comparison starts a new child. CPU time
and not wall time, so that a busy machine does not change rewards. The child also spares this process math-verify's imports.
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

CPU_SECONDS = 2.0  # for one comparison; a usual one takes 10 ms
WALL_SECONDS = 60  # only against a child that waits for something instead of computing
MEMORY_BYTES = 4 << 30


class _Worker:
    """The child and the two pipes to it: one JSON list [gold, answer, CPU seconds] a line in, one JSON boolean a line out."""

    def __init__(self) -> None:
        # -P: this folder must not be on the child's path, where our modules could shadow others of the same name.
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
            raise RuntimeError(f"math-verify could not be started in a process of its own: {ready.strip() or 'it ended at once'}")

    def ask(self, gold: str, answer: str, cpu_seconds: float) -> bool | None:
        """The verdict; None if the child ended before it gave one."""
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
            pass  # a request that the child did not live to read


_lock = threading.Lock()
_worker: _Worker | None = None


def are_equivalent(gold: str, answer: str, cpu_seconds: float = CPU_SECONDS) -> bool:
    """Whether math-verify takes two LaTeX expressions (without ``$``) for the same; False if it cannot tell in `cpu_seconds`.

    Safe to call from any thread and after a fork; calls take turns.

    Raises:
        RuntimeError: math-verify is not installed, or its process does not start.
    """
    global _worker
    if importlib.util.find_spec("math_verify") is None:
        raise RuntimeError("task.name=math500 needs math-verify; run pip install math-verify")
    with _lock:
        if _worker is not None and _worker.pid != os.getpid():
            _worker = None  # inherited through a fork: the parent goes on using it
        if _worker is None:
            _worker = _Worker()
        verdict = _worker.ask(gold, answer, cpu_seconds)
        if verdict is None:
            close_worker()
        return bool(verdict)


def close_worker() -> None:
    """End the child process, if there is one; the next comparison starts another."""
    global _worker
    if _worker is not None and _worker.pid == os.getpid():
        _worker.close()
    _worker = None


atexit.register(close_worker)


def _serve() -> None:
    """The child's loop. It ends when its input does, so it does not outlive the process that started it."""
    import logging
    import resource
    import signal

    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not look like a reply
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        replies.write(f"{error}\n")
        return
    logging.disable()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
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
        except Exception:  # whatever a parser makes of hostile text: the answer is not shown to be equal
            verdict = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        replies.write(json.dumps(bool(verdict)) + "\n")
        replies.flush()


if __name__ == "__main__":
    _serve()
