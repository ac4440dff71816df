"""Properties of every rollout engine, which the rest of the program needs before an engine exists. (No torch, for the planner.)

No module outside ``rollout/`` compares `rollout.engine` with a name. A new engine is a line here and a line in `rollout.build`, or a
class of the user's own with its traits beside it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from ais_megatron.config import doors


class EngineTraits(NamedTuple):
    is_embedded: bool = False
    """It generates on the trainer's own ranks and shares their memory."""
    has_servers: bool = False
    """It consists of servers, which are configured in `rollout.sglang`."""
    replays: bool = False
    """Its responses were recorded earlier, in `rollout.replay_dir`."""
    keeps_kv_scales: bool = False
    """It keeps the KV scales of an earlier sync, so scales of 1 must be sent to it too."""
    holds_adapters: bool = False
    """It can keep frozen weights, and get only LoRA's factors at a sync."""
    diffuses: bool = False
    """It samples from masked diffusion models, and scores their responses under the masks of `diffusion.likelihood`."""

    @property
    def can_evaluate(self) -> bool:
        """It can generate with any weights. A recording cannot."""
        return not self.replays


ENGINES = {
    "local": EngineTraits(is_embedded=True, diffuses=True),
    "sglang": EngineTraits(has_servers=True, keeps_kv_scales=True, holds_adapters=True),
    "replay": EngineTraits(replays=True),
}


@lru_cache
def own_traits(name: str) -> EngineTraits:
    """The `EngineTraits(...)` that the user's module assigns to ``Class.traits``, or an embedded engine's; see `doors.declared`."""
    return doors.declared("rollout.engine", name, "traits", EngineTraits(is_embedded=True))
