"""Who has the GPUs, if trainer and rollout servers share them (`rollout.colocated`).

    generate, reward             servers have weights and KV cache; the trainer has only its weights
    logprobs ... optimizer       servers have released both; the trainer has gradients and optimizer state too
    sync                         the trainer has put those away, servers take their memory back and get all weights

A side gives up its memory before the other one takes it. Servers keep no weights while they are released, so every turn of theirs begins
with a sync. Without colocation nothing here does anything.
"""

from __future__ import annotations

from collections.abc import Callable

from ais_megatron.distributed import barrier, rank_consistent
from ais_megatron.policy.policy import Policy
from ais_megatron.rollout.engine import ReleasesMemory, RolloutEngine


class Turns:
    """The turns of `policy` and of the servers of `engine`. They begin with that of the servers, for which the policy must rest already.
    All methods are collective.

    Raises:
        ValueError: the engine cannot release memory.
    """

    def __init__(self, policy: Policy, engine: RolloutEngine, is_colocated: bool) -> None:
        if is_colocated and not isinstance(engine, ReleasesMemory):
            raise ValueError(
                f"rollout.colocated=true: {type(engine).__name__} has no method release_memory; add it, or set rollout.colocated=false"
            )
        self._policy, self._engine = policy, engine if is_colocated and isinstance(engine, ReleasesMemory) else None
        self._is_trainers = False

    def trainer(self) -> None:
        """Give the GPUs to the trainer. No rank may wait for a response.

        Raises:
            RuntimeError: a server did not release its memory. All ranks raise it together, and the policy has not changed.
        """
        if self._engine is None or self._is_trainers:
            return
        barrier()  # all ranks have their responses
        with rank_consistent():
            self._engine.release_memory()
        self._policy.wake()
        self._is_trainers = True

    def servers(self) -> None:
        """Give the GPUs to the servers, which take their memory at the next push."""
        if self._engine is None or not self._is_trainers:
            return
        self._policy.rest()
        barrier()  # all ranks have freed their memory
        self._is_trainers = False

    def hand_back(self, push: Callable[[], None]) -> None:
        """End a turn of the trainer that changed no weight, for example for a checkpoint. `push` gives the servers their weights again."""
        if self._is_trainers:
            self.servers()
            push()
