"""Brings the policy's weights to the rollout engine: export -> quantise -> push -> verify.

Megatron's weights are exported as whole tensors under Hugging Face names, one bucket at a time. Each bucket is quantised here, once. The
engine gets all buckets and the KV scales as one transaction. Afterwards the engine's weights equal quantise(export(policy)), bit for bit.
A remote engine is tested: it answers a few prompts, and the policy's log-probabilities of these answers must be close to the engine's.

With `rollout.lora_sync=adapter` the frozen weights are pushed only if a server may lack them: the first time, after all servers were lost,
and when a push is repeated. Otherwise a push consists of LoRA's factors and the KV scales.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import chain

import torch

from ais_megatron.batch import Bucket, Prompt, assemble
from ais_megatron.config import RolloutConfig
from ais_megatron.distributed import LOCAL_ERRORS, Unavailable, gather_batch, raise_together, rank, rank_consistent
from ais_megatron.policy.policy import Policy
from ais_megatron.quantization.formats import format_of
from ais_megatron.quantization.fp8 import quantize_bucket
from ais_megatron.quantization.kv_scales import KVScales
from ais_megatron.rollout.engine import RolloutEngine, SamplingParams

logger = logging.getLogger(__name__)

PROBE_TOKENS = 8  # number of tokens that are sampled for each probe prompt


class WeightSync:
    """Brings the policy's weights to one engine. All methods are collective.

    probe_prompts: prompts that every server of a remote engine answers after each push.
    """

    def __init__(self, policy: Policy, engine: RolloutEngine, rollout: RolloutConfig, probe_prompts: Sequence[Prompt] = ()) -> None:
        self._policy, self._engine, self._rollout, self._probe_prompts = policy, engine, rollout, probe_prompts
        self._last: tuple[KVScales | None, int] | None = None
        self._q_warned: set[int] = set()
        self._sends_frozen = True  # (has no meaning if everything is sent every time)

    def push(self, scales: KVScales | None, version: int) -> None:
        """Push the policy's weights as `version`, with `scales` if the engine's KV cache is FP8.

        If a remote engine fails, or afterwards disagrees with the policy, everything is pushed once more.

        Raises:
            ValueError: the engine refused a tensor.
            Unavailable: no server of the engine answers any more.
            RuntimeError: it failed twice. All ranks raise any of these errors together.
        """
        self._last = (scales, version)
        self._policy.engine_has(scales)
        if scales is not None and self._rollout.kv_cache_is_fp8:
            self._warn_about_q(scales.q_overflow_layers())
        try:
            self._push_once(scales, version)
        except Unavailable:
            raise
        except RuntimeError as error:
            if not self._engine.takes_updates_while_generating:  # an embedded engine would fail again
                raise
            self._sends_frozen = True
            try:
                self._push_once(scales, version)
            except Unavailable:
                raise
            except RuntimeError as again:
                raise RuntimeError(f"pushing the weights of version {version} failed twice: {again}") from error

    def repeat(self) -> None:
        """Repeat the last push, before the policy has changed, so that restarted servers get its weights."""
        assert self._last is not None, "there was no push to repeat"
        self._sends_frozen = True
        self.push(*self._last)

    def _warn_about_q(self, layers: list[int]) -> None:
        """Warn once for each layer. There is no scale for Q, so values above 448 saturate if attention is computed in FP8."""
        new = [layer for layer in layers if layer not in self._q_warned]
        self._q_warned.update(new)
        if new and rank() == 0:
            logger.warning(
                "Q exceeds 448 in layers %s: attention kernels that cast Q to FP8 (FlashAttention-3 with an FP8 KV cache) saturate there; "
                "rollout.kv_cache=bf16 avoids it, and the metric q_amax shows how it develops",
                new,
            )

    def _push_once(self, scales: KVScales | None, version: int) -> None:
        stream = weight_stream(self._policy, self._rollout, scales, self._sends_frozen)
        error: Exception | None = None
        try:
            self._engine.update_weights(stream, version)
        except LOCAL_ERRORS as caught:
            error = caught
        for _ in stream:  # the other ranks wait in the same gathers, so a rank whose engine failed still takes part
            pass
        raise_together(error)
        self._verify()
        self._sends_frozen = False

    def _verify(self) -> None:
        """Raise RuntimeError if a server and the policy disagree about what the server has just sampled."""
        with rank_consistent():
            sampling = SamplingParams(1, PROBE_TOKENS, self._rollout.temperature)
            answers = self._engine.probe(self._probe_prompts, sampling) if self._probe_prompts else []
            rollouts = [rollout for answer in answers for rollout in answer]
            local = assemble(rollouts, torch.zeros(len(rollouts)), torch.zeros(len(rollouts)))
        batch = gather_batch(local, None)
        if not len(batch):
            return
        distance = (self._policy.logprobs(batch) - batch.rollout_logprobs).abs() * batch.loss_mask
        servers = len(batch) // len(self._probe_prompts)
        by_server = distance.view(servers, -1).sum(1) / batch.loss_mask.view(servers, -1).sum(1)
        limit = self._rollout.sglang.verify_tolerance
        with rank_consistent():
            if not bool((by_server <= limit).all()):  # (NaN, from a server without finite log-probabilities, is not within the limit)
                raise RuntimeError(
                    "after the sync the engine's log-probabilities of its own samples differ from the policy's by "
                    f"{by_server.max().item():.3g} nats per token (by server: {[round(v, 3) for v in by_server.tolist()]}; "
                    f"rollout.sglang.verify_tolerance={limit:g}); its weights or KV scales are corrupt"
                )


def weight_stream(policy: Policy, rollout: RolloutConfig, scales: KVScales | None, sends_frozen: bool = True) -> Iterator[Bucket]:
    """The tensors of a push, bucket by bucket. Collective, so every rank has to consume all of them.

    sends_frozen: whether LoRA's frozen weights are among them, if its factors are sent by themselves.
    """
    fmt = format_of(rollout)  # None: not quantised
    exported = _exported(policy, rollout, sends_frozen)
    try:
        for bucket in exported:
            yield quantize_bucket(bucket, fmt) if fmt else bucket
    except LOCAL_ERRORS:
        for _ in exported:  # what could not be quantised here may have gone well on the ranks that wait in the next gather
            pass
        raise
    if scales is None and rollout.engine_traits.keeps_kv_scales:
        scales = KVScales.unit(
            policy.config.architecture.num_hidden_layers
        )  # sent explicitly, because a server may have other scales from before
    if scales is not None and rollout.kv_cache_is_fp8:
        yield list(scales.named_tensors(policy.config.architecture.attention_layers))


def _exported(policy: Policy, rollout: RolloutConfig, sends_frozen: bool) -> Iterator[Bucket]:
    size = int(rollout.sync_bucket_mb * 2**20)
    if rollout.lora_sync == "merged":
        return policy.export_buckets(size)
    return chain(policy.export_frozen_buckets(size) if sends_frozen else (), policy.export_factor_buckets(size))
