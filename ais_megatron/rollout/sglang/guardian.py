"""Runs a server and makes sure that it ends: ``python guardian.py PARENT_PID COMMAND ...``. Uses only the standard library.

A server that outlives its parent keeps its port and its GPU memory. The parent therefore starts this small process, which starts the
server in a process group of its own and watches it. It ends the whole group in three cases: the server's first process has ended; this
process got SIGTERM or SIGINT, and then the server has `GRACE_S` seconds to end by itself; or the parent is gone, even by kill -9. If
this process itself is killed, the kernel kills the server's first process (PR_SET_PDEATHSIG), and SGLang's children request the same.
The exit status is that of the server, or 128 + n if signal n ended it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
GRACE_S = 10.0
POLL_S = 0.2


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl failed")


def _end_orphans() -> None:
    """Kill and reap all remaining processes below this one. As a subreaper it also gets those that left the group."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0]:
                continue
        except ChildProcessError:
            return
        with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as children:
            for child in children.read().split():
                os.kill(int(child), signal.SIGKILL)
        time.sleep(POLL_S / 10)


def main(parent: int, command: list[str]) -> int:
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, frame: asked.append(received))
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans become children of this process, not of init
    try:
        server = subprocess.Popen(command, process_group=0, preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
    except OSError as error:
        print(f"{command[0]}: cannot be started ({error})", file=sys.stderr)
        return 127
    deadline = None
    while server.poll() is None:
        if os.getppid() != parent:
            break
        if asked and deadline is None:
            deadline = time.monotonic() + GRACE_S
            server.terminate()  # only the first process, because SGLang treats the end of another one as a crash
        if deadline is not None and time.monotonic() > deadline:
            break
        time.sleep(POLL_S)
    try:
        os.killpg(server.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # the group is empty
    status = server.wait()
    _end_orphans()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
