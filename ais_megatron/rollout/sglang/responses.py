"""Builds the request for one response, and reads the server's answer.

Source: SGLang 0.5.23's GenerateReqInput, and `meta_info` as `tokenizer_manager` fills it.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ais_megatron.batch import DROPPED, Prompt, Rollout, routes_dtype
from ais_megatron.config import Architecture
from ais_megatron.rollout.engine import SamplingParams
from ais_megatron.rollout.sampling import response_seed
from ais_megatron.rollout.sglang.api import Refused


class ResponseFormat:
    """Requests and answers of one run.

    Args:
        eos_ids: the tokens that end a response.
        with_routing: whether to ask for the experts of every token (MoE).
        run_id: the run whose weights are accepted.
    """

    def __init__(self, architecture: Architecture, eos_ids: Sequence[int], with_routing: bool, run_id: str) -> None:
        self._architecture, self._eos_ids, self._with_routing, self._run_id = architecture, list(eos_ids), with_routing, run_id

    def request(self, prompt: Prompt, sampling: SamplingParams, sample: int) -> dict[str, Any]:
        """The body of /generate, except for the request's id."""
        return {
            "input_ids": list(prompt.token_ids),
            "sampling_params": {
                "max_new_tokens": sampling.max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or -1,
                "stop_token_ids": self._eos_ids,
                "sampling_seed": response_seed(sampling, prompt.index, sample),  # used only with --enable-deterministic-inference
            },
            "return_logprob": True,
            "logprob_start_len": -1,
            "return_routed_experts": self._with_routing,
        }

    def name(self, version: int) -> str:
        """The name of the weights with this version."""
        return f"{self._run_id}-{version}"

    def version(self, name: str) -> int | None:
        """The version of the weights with this name, or None if they are not this run's."""
        run, _, number = name.rpartition("-")
        return int(number) if run == self._run_id else None

    def rollout(self, prompt: Prompt, answer: dict[str, Any], adapter: str | None = None) -> Rollout | None:
        """The response, or None if any part was sampled with other weights than this run's.

        adapter: the one that the request named. It then decides the version, although the server may have got a newer one meanwhile.

        If a token has no finite log-probability, the response is `DROPPED`.

        Raises:
            Refused: the server aborted the response.
        """
        meta = answer["meta_info"]
        reason = (meta.get("finish_reason") or {}).get("type")
        if reason == "abort":
            raise Refused(503, f"aborted by the server: {meta['finish_reason'].get('message')}")
        spans = [(self.version(span["version"]), span["end"] - span["start"]) for span in meta.get("weight_versions") or []]
        spans = spans or [(self.version(meta["weight_version"]), len(answer["output_ids"]))]
        known = [(version, count) for version, count in spans if version is not None]
        if len(known) < len(spans):
            return None
        tokens = tuple(answer["output_ids"])
        if adapter is not None and (version := self.version(adapter)) is not None:
            known = [(version, len(tokens))]
        logprobs = tuple(entry[0] for entry in meta.get("output_token_logprobs") or ())
        versions = tuple(span for span in known if span[1])
        # (If one value is not finite, the sum is not finite. Finite log-probabilities never add up to infinity.)
        if not tokens or len(logprobs) != len(tokens) or None in logprobs or not math.isfinite(sum(logprobs)):
            stand_in, version = prompt.token_ids[-1:], min(version for version, _ in known)
            return Rollout(prompt, stand_in, (0.0,), DROPPED, version, self._routing(None, len(prompt.token_ids)))
        routed = self._routing(meta.get("routed_experts"), len(prompt.token_ids) + len(tokens) - 1)
        # A response that ends with an end-of-sequence token has stopped, even if that was also the last token allowed. The server may know
        # more of these tokens from the model's own files.
        finish = "stop" if tokens[-1] in self._eos_ids or reason == "stop" else "length"
        return Rollout(prompt, tokens, logprobs, finish, min(version for version, _ in versions), routed, versions)

    def _routing(self, text: str | None, rows: int) -> Tensor | None:
        """Decode SGLang's base64 int32 ``[rows, num_layers, experts_per_token]`` to a smaller dtype. -1 everywhere if there is no
        routing."""
        if not self._with_routing:
            return None
        shape = (rows, self._architecture.num_hidden_layers, self._architecture.num_experts_per_tok)
        dtype = routes_dtype(self._architecture.num_experts)
        if text is None:
            return torch.full(shape, -1, dtype=dtype)
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.int32).view(shape).to(dtype)
