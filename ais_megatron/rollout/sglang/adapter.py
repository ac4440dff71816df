"""LoRA's factors on SGLang servers, which keep the frozen weights (`rollout.lora_sync=adapter`).

Every version is an adapter of its own, and has the version's name. A request names the adapter of the version that its server reported
last. So a response never mixes versions: requests in flight during a sync keep their adapter. It is unloaded at the next sync, when no
request uses it any more. SGLang gives every load a random id, and the id is part of the keys of its prefix cache, so the KV of one
adapter is never used for another.

The factors are in the request itself, once for each tensor-parallel rank, so they reach servers on any host. SGLang reads them with its
restricted unpickler, which accepts tensors and plain containers only. They are not shared memory, because SGLang would keep reading them
there when the next version has overwritten it.

HTTP 200 is no proof that a server has an adapter. So our plugin reports a digest of the factors that each of the server's ranks holds, and
the digest is compared with that of what was sent. At a server's first sync an adapter of noise must also change its log-probabilities.

Source: SGLang 0.5.23, `tokenizer_control_mixin.py`, `lora_manager.py` and `lora.py`.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Sequence

import torch

from ais_megatron.batch import Bucket
from ais_megatron.config import Config
from ais_megatron.config.policy import adapter_targets
from ais_megatron.export.adapter import adapter_settings, factor_shapes, peft_name
from ais_megatron.rollout.sglang.api import Refused, ServerAPI
from ais_megatron.rollout.sglang.checks import IDENTICAL, distance, prompt_logprobs, test_prompt
from ais_megatron.rollout.sglang.plugin import digest
from ais_megatron.rollout.sglang.transport import each

NOISE_NAME = "noise"  # of the adapter that must change something


class Adapters:
    """Brings LoRA's factors to servers. shapes: of all factors, which are named from ``layers.`` on."""

    def __init__(self, config: Config) -> None:
        lora, a = config.policy.lora, config.architecture
        self.shapes = factor_shapes(config)
        targets = adapter_targets(lora, a)
        whole = config.model_copy(
            update={"policy": config.policy.model_copy(update={"lora": lora.model_copy(update={"targets": targets})})}
        )
        self._served = factor_shapes(whole)
        self._settings = adapter_settings(lora, targets, "")
        self._tp, self._vocab_size = config.rollout.sglang.tp, a.vocab_size

    async def load(self, servers: Sequence[ServerAPI], name: str, factors: Bucket) -> None:
        """Load an adapter on all servers, and make its name that of their weights.

        Adapters that no request can need any more are unloaded.

        Raises:
            RuntimeError: a server refused it, or does not hold these factors afterwards.
        """
        expected, payload = digest([tensor for _, tensor in factors]), self._payload(factors)

        async def load(server: ServerAPI) -> None:
            held, in_use = await _held(server), await server.weight_version()
            for old in {old for part in held for old in part} - {name, in_use}:
                await server.unload_adapter(old)
            if any(part.get(name) != expected for part in held):
                await self._replace(server, name, payload, held)
                held = await _held(server)
                if any(part.get(name) != expected for part in held):
                    raise RuntimeError(f"{server.url}: does not hold the LoRA factors of {name} after it has loaded them")
            await server.set_weight_version(name)

        await each(servers, load)

    async def check(self, servers: Sequence[ServerAPI], factors: Bucket) -> None:
        """Raise RuntimeError if an adapter does not change a server's log-probabilities, so that the factors have no effect."""
        if not servers:
            return
        generator = torch.Generator().manual_seed(0)
        noise = [(name, torch.randn(like.shape, generator=generator).to(like.dtype) * like.shape[1] ** -0.5) for name, like in factors]
        payload, prompt = self._payload(noise), test_prompt(self._vocab_size)

        async def check(server: ServerAPI) -> None:
            await self._replace(server, NOISE_NAME, payload, await _held(server))
            with_noise = await prompt_logprobs(server, prompt, lora_path=NOISE_NAME)
            await server.unload_adapter(NOISE_NAME)
            if distance(with_noise, await prompt_logprobs(server, prompt)) <= IDENTICAL:
                raise RuntimeError(
                    f"{server.url}: an adapter of noise has no effect, so the server does not use LoRA's factors. Set "
                    "rollout.lora_sync=merged, or choose another backend with --lora-backend in rollout.sglang.extra_args"
                )

        await each(servers, check)

    async def _replace(self, server: ServerAPI, name: str, payload: str, held: list[dict[str, str]]) -> None:
        if any(name in part for part in held):
            await server.unload_adapter(name)
        await server.load_adapter(lora_name=name, config_dict=self._settings, serialized_named_tensors=[payload] * self._tp)

    def _payload(self, factors: Bucket) -> str:
        """The factors as SGLang's unpickler reads them, in base64. Factors that a merged layer lacks are zero."""
        given = {name: tensor.cpu().clone() for name, tensor in factors}  # (a view would be pickled with the whole bucket)
        zeros = factors[0][1].cpu().new_zeros
        tensors = {peft_name(name): given[name] if name in given else zeros(shape) for name, shape in self._served.items()}
        return base64.b64encode(pickle.dumps(tensors)).decode()


async def _held(server: ServerAPI) -> list[dict[str, str]]:
    """For each of the server's ranks, the digests of its adapters by name."""
    try:
        return await server.adapters()
    except Refused as error:
        raise RuntimeError(
            f"{server.url}: does not say which LoRA adapters it has ({error}). Install ais_megatron in SGLang's environment "
            "(`ais-megatron doctor CONFIG` checks it), and start the server with this configuration's `ais-megatron serve`"
        ) from error
