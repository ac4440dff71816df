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
    replays: bool = False
    """Its responses were recorded earlier, in `rollout.replay_dir`."""
    keeps_kv_scales: bool = False
    """It may hold KV scales from before, so that also scales of 1 must be sent to it."""

    @property
    def can_evaluate(self) -> bool:
        """It can answer with any weights that it is given. A recording cannot."""
        return not self.replays


ENGINES = {
    "local": EngineTraits(is_embedded=True),
    "sglang": EngineTraits(has_servers=True, keeps_kv_scales=True),
    "replay": EngineTraits(replays=True),
}
