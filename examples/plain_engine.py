"""A rollout engine of your own: transformers' model in BF16 or float32, with a full forward pass for every token.

    ais-megatron train configs/tiny_countdown.yaml run.dir=runs/plain train.steps=2 rollout.engine=examples.plain_engine:PlainEngine \\
        rollout.quantization=none

It is slow, but it shows everything that the trainer needs from an engine. `RolloutEngine` in ais_megatron/rollout/engine.py documents
each method.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ais_megatron.batch import Prompt, Rollout
from ais_megatron.config import Config
from ais_megatron.config.engines import EngineTraits
from ais_megatron.config.hf_config import hf_config
from ais_megatron.distributed import device
from ais_megatron.rollout.engine import SamplingParams
from ais_megatron.rollout.manifest import Manifest
from ais_megatron.rollout.sampling import check_prompt, check_sampling, choose_tokens, uniform_draws


class PlainEngine:
    """Every rank creates one with the whole configuration. It has no weights until the first `update_weights`."""

    takes_updates_while_generating = False

    def __init__(self, config: Config, *, eos_ids: tuple[int, ...], pad_id: int) -> None:
        if config.rollout.quantization != "none" or config.rollout.kv_cache_is_fp8:
            raise ValueError(f"rollout.quantization={config.rollout.quantization}: PlainEngine quantises nothing; set it to none")
        self._architecture, self._eos_ids, self._version = config.architecture, torch.tensor(eos_ids, device=device()), -1
        dtype = torch.bfloat16 if config.model.dtype == "bf16" else torch.float32
        self._manifest = Manifest.of(config.architecture, config.rollout, dtype)
        settings = hf_config(config.architecture, config.model.dtype)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings))
        self._model = model.to(device(), dtype).eval().requires_grad_(False)
        self._destinations = dict(self._model.state_dict())

    @property
    def version(self) -> int:
        return self._version

    def update_weights(self, buckets: Iterable[list[tuple[str, Tensor]]], version: int) -> None:
        """Load whole tensors under Hugging Face names. `Manifest` refuses tensors that are missing, unknown, or of another shape or
        dtype."""
        self._version = -1  # until everything has arrived there are no weights
        self._manifest.begin()
        for bucket in buckets:
            for name, tensor in bucket:
                self._manifest.take(name, tensor)
                self._destinations[name].copy_(tensor)
        self._manifest.check_complete()
        self._version = version

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        """`num_samples` responses for each prompt, in the order of the prompts."""
        if self._version < 0:
            raise RuntimeError("PlainEngine has no complete weights; generate after a successful update_weights")
        check_sampling(sampling)
        for prompt in prompts:
            check_prompt(prompt, sampling, self._architecture)
        return [rollout for prompt in prompts for rollout in self._responses(prompt, sampling)]

    def _responses(self, prompt: Prompt, sampling: SamplingParams) -> list[Rollout]:
        """Generate all samples of one prompt together, until the last one has ended."""
        start = len(prompt.token_ids)
        tokens = torch.tensor([prompt.token_ids] * sampling.num_samples, device=device())
        draws = uniform_draws(sampling, [(prompt.index, sample) for sample in range(sampling.num_samples)]).to(tokens.device)
        logprobs: list[Tensor] = []
        for position in range(sampling.max_tokens):
            logits = self._model(tokens).logits[:, -1].float()
            chosen, chosen_logprobs = choose_tokens(logits, draws[:, position], sampling)
            tokens = torch.cat([tokens, chosen[:, None]], dim=1)
            logprobs.append(chosen_logprobs)
            if bool(torch.isin(tokens[:, start:], self._eos_ids).any(1).all()):
                break
        return [
            self._cut(prompt, ids, values)
            for ids, values in zip(tokens[:, start:].tolist(), torch.stack(logprobs, 1).tolist(), strict=True)
        ]

    def _cut(self, prompt: Prompt, ids: list[int], values: list[float]) -> Rollout:
        """A response ends with its first end-of-sequence token."""
        ends = torch.isin(torch.tensor(ids), self._eos_ids.cpu()).nonzero()
        ended = len(ends) > 0
        length = int(ends[0]) + 1 if ended else len(ids)
        return Rollout(prompt, tuple(ids[:length]), tuple(values[:length]), "stop" if ended else "length", self._version)

    def probe(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Rollout]]:
        """Empty, because there is no server whose weights could differ."""
        return []

    def close(self) -> None:
        self._version = -1


# What the planner and the checks of the configuration know of the engine before there is one. It is read without running this
# file, so it must be one call with plain values.
PlainEngine.traits = EngineTraits(is_embedded=True)
