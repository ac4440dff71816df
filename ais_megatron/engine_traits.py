"""What the rest of the program needs to know about a rollout engine before there is one. (No torch: the planner asks too.)

Nobody outside ``rollout/`` compares `rollout.engine` with a name: a new engine is a line here and a line in `rollout.build`.
"""

from __future__ import annotations

from typing import NamedTuple


class EngineTraits(NamedTuple):
    is_embedded: bool = False
    """It generates on the trainer's own ranks, and shares their memory."""
    has_servers: bool = False
    """It consists of servers, which are configured in `rollout.sglang`."""
    can_evaluate: bool = True
    """It can answer with any weights that it is given. A recording cannot."""
    keeps_kv_scales: bool = False
    """It may hold KV scales from before, so that also scales of 1 must be sent to it."""
    emulates_formats: bool = False
    """It computes in any of the quantised formats, not only in those that its kernels know."""


ENGINES = {
    "local": EngineTraits(is_embedded=True, emulates_formats=True),
    "sglang": EngineTraits(has_servers=True, keeps_kv_scales=True),
    "replay": EngineTraits(can_evaluate=False, emulates_formats=True),
}
