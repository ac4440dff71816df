"""Checks that a server really uses the weights and KV scales that it is sent, because it reports no error if it does not.

Every server is checked once, and again after a restart.

Coverage: all tensors of the server are overwritten with noise. After the push every checksum must have changed. Only this finds a name
that the server does not know, or a tensor that we never send. With an FP8 KV cache the scales of every layer must be among the tensors.
SGLang has them only if our plugin runs in it.

Scales: K and V divided by s, rounded to FP8 and multiplied by s hardly depend on s, until s is so large that they all round to zero.
So scales that are 2^14 times too large must change something. If they change a lot, the model depends on its attention. Then scales 8
and 64 times too large must give almost the same result, and prefill must agree with decoding, which replays captured CUDA graphs. A
server that reads with other scales than it writes with is wrong by a factor of 8 there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ais_megatron.batch import Bucket
from ais_megatron.rollout.sglang.api import ServerAPI
from ais_megatron.rollout.sglang.transport import Transport, WeightUpdate

PROMPT_TOKENS, DECODED_TOKENS = 24, 8
LOW, HIGH, FLUSHES = 8.0, 64.0, 2.0**14  # powers of two keep E4M3's grid; far above 1, so that nothing saturates
IDENTICAL, TELLING = 1e-6, 0.2  # nats per token: below IDENTICAL no effect; above TELLING far more than the noise of FP8 and routing
NOISE = 0.5  # the largest effect of a harmless factor, as a share of the effect of FLUSHES

Checksums = list[dict[str, str]]


async def randomize(servers: Sequence[ServerAPI]) -> list[Checksums]:
    """Overwrite the servers' weights with noise. Returns their checksums, for `check_coverage` after the push."""
    await asyncio.gather(*(server.randomize_weights() for server in servers))
    return list(await asyncio.gather(*(server.checksums() for server in servers)))


async def check_coverage(servers: Sequence[ServerAPI], noise: list[Checksums], scales: Bucket) -> None:
    """Raise RuntimeError if a server still has a tensor from `randomize`, or does not have one of `scales`."""
    pushed = await asyncio.gather(*(server.checksums() for server in servers))
    for server, old, new in zip(servers, noise, pushed, strict=True):
        # In Qwen3.5 the layer itself has the attention: its scale is called model.layers.N.attn.k_scale.
        without = [name for name, _ in scales if not any(name in part or name.replace(".self_attn", "") in part for part in new)]
        if without:
            raise RuntimeError(
                f"{server.url}: has no {without[0]}, so its FP8 cache would use scale 1.0 whatever is pushed. Install ais_megatron in "
                "SGLang's environment (our plugin makes the scales loadable, and `ais-megatron doctor CONFIG` checks it), or set "
                "rollout.kv_cache=bf16"
            )
        untouched = sorted({name for a, b in zip(old, new, strict=True) for name in a if a[name] == b.get(name)})
        if untouched:
            raise RuntimeError(
                f"{server.url}: the weight sync did not reach {untouched[0]} and {len(untouched) - 1} other tensors; the server runs "
                "a model that differs from model.architecture, or an SGLang version with other names (0.5.23 is known to work)"
            )


async def check_scales(servers: Sequence[ServerAPI], transport: Transport, scales: Bucket, version: str | None, vocab_size: int) -> None:
    """Raise RuntimeError if the KV cache of a server does not use `scales`. Afterwards the servers have `scales` again.

    All servers get each factor in the same update, so a transport needs only the one process group with all servers.
    """
    prompt = test_prompt(vocab_size)

    async def measure(factor: float) -> list[tuple[list[float], float]]:
        await _push_scaled(servers, transport, scales, factor, version)
        return list(await asyncio.gather(*(_logprobs(server, prompt) for server in servers)))

    low, high, flushed = [await measure(factor) for factor in (LOW, HIGH, FLUSHES)]
    await _push_scaled(servers, transport, scales, 1.0, version)
    for server, (base, _), (scaled, decoding), (none, _) in zip(servers, low, high, flushed, strict=True):
        _judge(server, effect=distance(base, none), noise=distance(base, scaled), decoding=decoding)


def _judge(server: ServerAPI, effect: float, noise: float, decoding: float) -> None:
    """Judge a server from differences in nats per token.

    effect: of scales that round K and V to zero. noise: of harmless scales. decoding: between decoding and prefill."""
    if effect <= IDENTICAL:
        raise RuntimeError(
            f"{server.url}: pushed KV scales have no effect, even if they are {FLUSHES:g} times too large, so its attention backend does "
            "not read them. Use rollout.sglang.attention_backend=fa3, or rollout.kv_cache=bf16"
        )
    if effect > TELLING and max(noise, decoding) > NOISE * effect:
        raise RuntimeError(
            f"{server.url}: the KV cache is read with other scales than it is written with (scales {HIGH:g} instead of {LOW:g} times too "
            f"large moved log-probabilities by {noise:.2g} nats, and decoding differs from prefill by {decoding:.2g} nats; a KV cache of "
            f"zeros moves them by {effect:.2g}). This happens if an attention backend keeps scales in captured CUDA graphs. Use "
            "rollout.sglang.attention_backend=fa3, or rollout.kv_cache=bf16"
        )


async def _push_scaled(servers: Sequence[ServerAPI], transport: Transport, scales: Bucket, factor: float, version: str | None) -> None:
    update = WeightUpdate(transport, servers, "retract", version)
    try:
        await update.begin()
        await update.end([(name, tensor * factor) for name, tensor in scales])
    except Exception:
        await update.abandon()
        raise


async def _logprobs(server: ServerAPI, prompt: list[int]) -> tuple[list[float], float]:
    """The log-probabilities of the prompt's tokens, and how much those of a greedy continuation differ between decoding and prefill."""
    decoded = await _ask(server, prompt, DECODED_TOKENS)
    tokens = prompt + decoded["output_ids"]
    prefilled = await prompt_logprobs(server, tokens)
    while_decoding = [entry[0] for entry in decoded["meta_info"]["output_token_logprobs"]]
    return prefilled[: len(prompt) - 1], distance(prefilled[len(prompt) - 1 :], while_decoding)


def test_prompt(vocab_size: int) -> list[int]:
    return [1 + (7 * i) % (vocab_size - 1) for i in range(PROMPT_TOKENS)]


async def prompt_logprobs(server: ServerAPI, tokens: list[int], **adapter: str) -> list[float]:
    """The log-probability of every token but the first, from prefill."""
    return [entry[0] for entry in (await _ask(server, tokens, 1, **adapter))["meta_info"]["input_token_logprobs"][1:]]


async def _ask(server: ServerAPI, tokens: list[int], max_tokens: int, **adapter: str) -> dict[str, Any]:
    sampling = {"max_new_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
    return await server.generate(input_ids=tokens, sampling_params=sampling, return_logprob=True, logprob_start_len=0, **adapter)


def distance(one: list[float], other: list[float]) -> float:
    """Mean of |difference|, in nats."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
