"""Does a server take what it is sent? Asked once of every server, and again after a restart, because it would not say.

Coverage: overwrite all its tensors with noise, push, and every single checksum must have changed. A name that the server
does not know, or a tensor that we never send, shows here and nowhere else. With an FP8 KV cache the scales of every layer
must be among those tensors: SGLang has them only if our plugin runs in it.

Scales: K and V divided by s, rounded to FP8 and multiplied by s again hardly depend on s, until s is so large that they all
round to zero. So with scales 2^14 times too large something must change; and where much changes, so that the model leans on
its attention, little may change between scales 8 and 64 times too large, and prefill and decoding (which replays captured
CUDA graphs) must agree. A server that reads with other scales than it writes with is off by a factor of 8 there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ais_megatron.batch import Bucket
from ais_megatron.rollout.sglang.api import ServerAPI
from ais_megatron.rollout.sglang.transport import Transport, WeightUpdate

PROMPT_TOKENS, DECODED_TOKENS = 24, 8
LOW, HIGH, FLUSHES = 8.0, 64.0, 2.0**14  # powers of two: E4M3's grid stays the same; well above 1: nothing saturates
IDENTICAL, TELLING = 1e-6, 0.2  # nats per token: below, no effect; above, the effect is far from the noise of FP8 and of routing
NOISE = 0.5  # share of the flush's effect that a harmless factor may have

Checksums = list[dict[str, str]]


async def randomize(servers: Sequence[ServerAPI]) -> list[Checksums]:
    """Overwrite the servers' weights with noise; returns its checksums, for `check_coverage` after the push."""
    await asyncio.gather(*(server.randomize_weights() for server in servers))
    return list(await asyncio.gather(*(server.checksums() for server in servers)))


async def check_coverage(servers: Sequence[ServerAPI], noise: list[Checksums], scales: Bucket) -> None:
    """RuntimeError if a tensor of a server still is what `randomize` left, or one of `scales` is not among its tensors."""
    pushed = await asyncio.gather(*(server.checksums() for server in servers))
    for server, old, new in zip(servers, noise, pushed, strict=True):
        without = [name for name, _ in scales if not any(name in part for part in new)]
        if without:
            raise RuntimeError(
                f"{server.url}: has no {without[0]}; its FP8 cache would run with scale 1.0, whatever is pushed. Install ais_megatron into "
                "SGLang's environment (its plugin makes the scales loadable; `ais-megatron doctor CONFIG` looks for it), or set "
                "rollout.kv_cache=bf16"
            )
        untouched = sorted({name for a, b in zip(old, new, strict=True) for name in a if a[name] == b.get(name)})
        if untouched:
            raise RuntimeError(
                f"{server.url}: the weight sync did not reach {untouched[0]} and {len(untouched) - 1} other tensors; the server runs "
                "another model than model.architecture describes, or an SGLang whose names differ (0.5.23 is known to work)"
            )


async def check_scales(servers: Sequence[ServerAPI], transport: Transport, scales: Bucket, version: str, vocab_size: int) -> None:
    """RuntimeError if the KV cache of a server does not obey `scales`; they are in force again afterwards.

    All servers get each factor in one update, so that a transport with a group needs no other group than that of all of them.
    """
    prompt = [1 + (7 * i) % (vocab_size - 1) for i in range(PROMPT_TOKENS)]

    async def measure(factor: float) -> list[tuple[list[float], float]]:
        await _push_scaled(servers, transport, scales, factor, version)
        return list(await asyncio.gather(*(_logprobs(server, prompt) for server in servers)))

    low, high, flushed = [await measure(factor) for factor in (LOW, HIGH, FLUSHES)]
    await _push_scaled(servers, transport, scales, 1.0, version)
    for server, (base, _), (scaled, decoding), (none, _) in zip(servers, low, high, flushed, strict=True):
        _judge(server, effect=_distance(base, none), noise=_distance(base, scaled), decoding=decoding)


def _judge(server: ServerAPI, effect: float, noise: float, decoding: float) -> None:
    """effect: of scales that flush K and V to zero; noise: of harmless ones; decoding: its distance from prefill. Nats per token."""
    if effect <= IDENTICAL:
        raise RuntimeError(
            f"{server.url}: pushed KV scales have no effect, even when they are {FLUSHES:g} times too large: its attention backend does "
            "not read them. Use rollout.sglang.attention_backend=fa3, or rollout.kv_cache=bf16"
        )
    if effect > TELLING and max(noise, decoding) > NOISE * effect:
        raise RuntimeError(
            f"{server.url}: KV is written with other scales than it is read with (scales {HIGH:g} instead of {LOW:g} times too large moved "
            f"log-probabilities by {noise:.2g} nats, and decoding is {decoding:.2g} nats away from prefill; no KV at all moves them by "
            f"{effect:.2g}). An attention backend that bakes scales into captured graphs does that: use "
            "rollout.sglang.attention_backend=fa3, or rollout.kv_cache=bf16"
        )


async def _push_scaled(servers: Sequence[ServerAPI], transport: Transport, scales: Bucket, factor: float, version: str) -> None:
    update = WeightUpdate(transport, servers, "retract", version)
    try:
        await update.begin()
        await update.end([(name, tensor * factor) for name, tensor in scales])
    except Exception:
        await update.abandon()
        raise


async def _logprobs(server: ServerAPI, prompt: list[int]) -> tuple[list[float], float]:
    """Of the prompt's tokens, and by how much those of a greedy continuation differ between decoding and prefill."""
    decoded = await _ask(server, prompt, DECODED_TOKENS)
    tokens = prompt + decoded["output_ids"]
    prefilled = [entry[0] for entry in (await _ask(server, tokens, 1))["meta_info"]["input_token_logprobs"][1:]]
    while_decoding = [entry[0] for entry in decoded["meta_info"]["output_token_logprobs"]]
    return prefilled[: len(prompt) - 1], _distance(prefilled[len(prompt) - 1 :], while_decoding)


async def _ask(server: ServerAPI, tokens: list[int], max_tokens: int) -> dict[str, Any]:
    sampling = {"max_new_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
    return await server.generate(input_ids=tokens, sampling_params=sampling, return_logprob=True, logprob_start_len=0)


def _distance(one: list[float], other: list[float]) -> float:
    """Mean of |difference|, in nats."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
