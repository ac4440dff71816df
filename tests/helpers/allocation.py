"""What torch allocates, as its profiler sees it."""

from __future__ import annotations

from collections.abc import Callable


def allocated_peak(work: Callable[[], object]) -> int:
    """Most bytes that torch had allocated at once during `work`, of those it allocated there."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = sorted((e.start_ns(), e.nbytes()) for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    total = peak = 0
    for _, size in events:
        total += size
        peak = max(peak, total)
    return peak
