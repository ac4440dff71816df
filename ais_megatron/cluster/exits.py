"""How a run ends: the statuses that scripts and schedulers may rely on, and the one ending that is no error.

0    finished
1    `doctor` found something missing that the configuration needs, `plan` that it cannot fit, `compare` runs that did not finish
2    something the user can mend, or a fault; the message says what
75   stopped by SIGTERM or SIGUSR1 after a whole step, with a checkpoint: start it again with run.resume=true
124  a rank made no progress for run.watchdog_minutes; logs/rank_N.stacks shows where each one stood
130  interrupted (Ctrl-C)
128+N  a rank was killed by signal N (137: SIGKILL, often the kernel's for want of memory)
"""

from __future__ import annotations

CHECK_FAILED = 1
USER_ERROR = 2
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again later
EXIT_HUNG = 124  # what timeout(1) returns
INTERRUPTED = 130


class Preempted(Exception):
    """Raised on all ranks together when a signal asked the run to stop and its state is saved; no error, hence neither
    ValueError nor RuntimeError."""
