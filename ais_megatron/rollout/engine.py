"""What the trainer asks of any rollout engine, embedded or remote."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ais_megatron.batch import Bucket, Prompt, Rollout


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    num_samples: responses per prompt (the GRPO group).
    temperature: 0 is greedy; log-probabilities are those at this temperature (at 1.0 when greedy).
    top_p, top_k: restrict which tokens can be drawn. As in SGLang, the returned log-probabilities stay those of the
        full, temperature-scaled distribution: that is what the trainer computes too, so their ratio is exactly 1
        where engine and trainer agree.
    seed: with a prompt's index, the sample's number and the position it fixes every random draw.
    """

    num_samples: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


class WeightsLost(RuntimeError):
    """The engine answers, but no longer with the weights it was given (a server was restarted). `update_weights` brings them
    back; the same call of `generate` then continues with the responses that are still missing."""


class RolloutEngine(Protocol):
    """Generates with the weights it was last given, and says which those are."""

    @property
    def takes_updates_while_generating(self) -> bool:
        """Whether `update_weights` may be called while `generate` runs in another thread. Responses then carry the versions they
        were sampled with."""
        ...

    @property
    def version(self) -> int:
        """Version of the weights in force; -1 before the first update. Generating at -1 is a `RuntimeError`."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """`num_samples` responses for each prompt, grouped: those of prompts[0] first.

        Raises:
            ValueError: an empty prompt, or one that with `max_tokens` exceeds the context length (named by its index).
            RuntimeError: no weights yet, or the engine failed.
            WeightsLost: see there.
            Unavailable: a remote engine is gone.
        """
        ...

    def update_weights(self, buckets: Iterable[Bucket], version: int) -> None:
        """Take one full set of weights, streamed in buckets under Hugging Face names, as one transaction.

        A quantised engine gets ``X.weight`` as float8_e4m3fn ``[N, K]`` with ``X.weight_scale_inv`` float32
        ``[ceil(N/128), ceil(K/128)]`` (other formats than fp8_e4m3: in their `Format`'s dtype and scales_shape). KV scales come
        as ``model.layers.N.self_attn.attn.k_scale`` (and v_scale), float32 scalars. `version` takes effect only when every
        expected tensor has arrived.

        Raises:
            ValueError: unknown, missing, or wrongly shaped or typed tensors, named.
        """
        ...

    def probe(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Rollout]]:
        """For each server a remote engine consists of, its responses to `prompts`; nothing from an embedded engine, whose
        memory is known to hold what was pushed, and on ranks that do not update."""
        ...

    def close(self) -> None:
        """Free everything; idempotent."""
        ...
