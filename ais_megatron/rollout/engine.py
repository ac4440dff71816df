"""The protocol of rollout engines, embedded or remote."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from ais_megatron.batch import Bucket, Prompt, Rollout


@dataclass(frozen=True)
class Denoising:
    """How to sample from a masked diffusion model, and under which masks to score its responses."""

    block_length: int
    """Number of tokens of a block. It divides `SamplingParams.max_tokens`."""
    steps_per_block: int
    """Forward passes for each block, at most `block_length`."""
    remasking: str
    """low_confidence or random."""
    likelihood: str
    """one_step or trajectory."""
    likelihood_temperature: float
    """Of the log-probabilities in `View`."""
    num_views: int
    """Number of masks under which a response is scored; 0: it is not scored."""
    prompt_mask: float
    """one_step: probability of each prompt token to be masked."""


@dataclass(frozen=True)
class SamplingParams:
    """How to sample.

    top_p and top_k restrict which tokens can be drawn. As in SGLang, the returned log-probabilities are still those of the full,
    temperature-scaled distribution. The trainer computes the same, so their ratio is exactly 1 if engine and trainer agree.
    """

    num_samples: int
    """Responses per prompt (the GRPO group)."""
    max_tokens: int
    """A response is cut at this length."""
    temperature: float = 1.0
    """0 is greedy. Log-probabilities are computed at this temperature (at 1.0 if greedy)."""
    top_p: float = 1.0
    top_k: int = 0
    """0: no limit."""
    seed: int = 0
    """Together with the prompt's index, the sample's number and the position it determines every random draw."""
    denoising: Denoising | None = None
    """For a masked diffusion model, whose responses all have `max_tokens` tokens on their canvas; None for other models."""


class WeightsLost(RuntimeError):
    """The engine answers, but no longer with the weights that it was given, because a server was restarted.

    `update_weights` restores them. The same call of `generate` then continues with the missing responses."""


class RolloutEngine(Protocol):
    """Generates with the latest weights that it was given, and reports their version."""

    @property
    def takes_updates_while_generating(self) -> bool:
        """Whether `update_weights` may be called while `generate` runs in another thread. Responses then record the versions that
        sampled them."""
        ...

    @property
    def version(self) -> int:
        """Version of the current weights; -1 before the first update. At -1 `generate` raises `RuntimeError`."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """`num_samples` responses for each prompt, grouped by prompt and in the order of `prompts`.

        Raises:
            ValueError: a prompt is empty, or exceeds the context length together with `max_tokens`. The message has its index.
            RuntimeError: there are no weights yet, or the engine failed.
            WeightsLost: see the class.
            Unavailable: a remote engine is gone.
        """
        ...

    def update_weights(self, buckets: Iterable[Bucket], version: int) -> None:
        """Load a full set of weights as one transaction. They come in buckets, under Hugging Face names.

        A quantised engine gets ``X.weight`` as float8_e4m3fn ``[N, K]`` with ``X.weight_scale_inv`` float32
        ``[ceil(N/block), ceil(K/block)]``, where block is `rollout.weight_block` (formats other than fp8_e4m3: with the dtype and
        scales_shape of their `Format`). KV scales are float32 scalars, named ``model.layers.N.self_attn.attn.k_scale`` (and v_scale).
        `version` becomes current only when every expected tensor has arrived.

        Raises:
            ValueError: a tensor is unknown, missing, or has a wrong shape or dtype. The message names it.
        """
        ...

    def probe(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Rollout]]:
        """The responses to `prompts` of each server of a remote engine. Empty on ranks that do not push weights, and for an embedded
        engine, whose memory certainly has what was pushed."""
        ...

    def close(self) -> None:
        """Release everything. Idempotent."""
        ...


@runtime_checkable
class ReleasesMemory(Protocol):
    """An engine whose servers can share the trainer's GPUs (`rollout.colocated`)."""

    def release_memory(self) -> None:
        """Free the memory of weights and KV cache. Called on every rank, when no response is in progress. `generate` is not called again
        before `update_weights`, which takes the memory back first.

        Raises:
            RuntimeError: a server did not free its memory.
        """
        ...
