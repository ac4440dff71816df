"""Exit statuses of a run, which scripts and schedulers may rely on.

0    finished
1    `doctor` found something missing that the configuration needs, `plan` found that a run cannot fit, or `compare` has unfinished
     runs
2    an error; the message says whether the user can correct it
75   stopped by SIGTERM or SIGUSR1 after a complete step, with a checkpoint; start it again with run.resume=true
124  a rank made no progress for run.watchdog_minutes; logs/rank_N.stacks shows what each rank was doing
130  interrupted (Ctrl-C)
128+N  a rank was killed by signal N (137 is SIGKILL, often sent by the kernel because memory ran out)
"""

from __future__ import annotations

CHECK_FAILED = 1
USER_ERROR = 2
EXIT_REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: try again later
EXIT_HUNG = 124  # what timeout(1) returns
INTERRUPTED = 130


class Preempted(Exception):
    """A signal asked the run to stop, and its state is saved. All ranks raise this together.

    This is not an error, so it is neither a ValueError nor a RuntimeError."""
