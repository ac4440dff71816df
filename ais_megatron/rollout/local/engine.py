"""The embedded rollout engine: transformers' model in the trainer's process, in float32, BF16, or emulated FP8 or FP4.

It accepts the same tensors under the same names as an SGLang server, and computes what the server's FP8 kernels compute: weights in
blocks of 128x128, activations in blocks of 1x128, and an E4M3 KV cache with scales per layer. So rollout and training policy differ
for the same reasons, on any machine. It also emulates formats that SGLang does not have (`formats`). It is not made for speed on a
GPU, where it has not been run.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
import transformers
from torch import Tensor, nn

from ais_megatron.batch import Bucket, Prompt, Rollout
from ais_megatron.config import Architecture, RolloutConfig
from ais_megatron.config.hf_config import layer_types, rope_parameters
from ais_megatron.models.family import names_of_twin
from ais_megatron.quantization.formats import format_of
from ais_megatron.quantization.kv_scales import kv_scale_name
from ais_megatron.rollout.engine import SamplingParams
from ais_megatron.rollout.local.decoding import Model, Responses, SampleId, decode_wave, plan_waves
from ais_megatron.rollout.local.diffusion import BIDIRECTIONAL, diffuse_wave
from ais_megatron.rollout.local.experts import QuantizedExperts, RoutingRecord, named_expert_tensors, replace_experts
from ais_megatron.rollout.local.kv_cache import ATTENTION, set_kv_scales
from ais_megatron.rollout.local.quantized_linear import InputQuantizer, QuantizedLinear, replace_linears
from ais_megatron.rollout.manifest import TIED_HEAD, Manifest
from ais_megatron.rollout.sampling import check_prompt, check_sampling

logger = logging.getLogger(__name__)


class LocalEngine:
    """A `RolloutEngine`, which documents the methods.

    Args:
        architecture: of the model. No weights are loaded; all of them arrive through `update_weights`.
        rollout: its quantization, kv_cache, max_batch and return_routed_experts are used.
        eos_ids: the tokens that end a response. The one that was sampled stays in the response.
        pad_id: any valid token. It pads prompts that are shorter than others in the wave, and no token attends to it.
        dtype: bfloat16 or float32, for activations and for weights that are not quantised.
    Raises:
        ValueError: routed experts are requested from a dense model.
    """

    takes_updates_while_generating = False

    def __init__(
        self,
        architecture: Architecture,
        rollout: RolloutConfig,
        *,
        eos_ids: Sequence[int],
        pad_id: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        if rollout.return_routed_experts and not architecture.is_moe:
            raise ValueError(
                f"rollout.return_routed_experts=true: model_type={architecture.model_type} has no experts to return; set it to false"
            )
        device = torch.device(device)
        self._architecture = architecture
        self._max_batch = rollout.max_batch
        self._version = -1
        self._closed = False
        self._warned_about_scales = False
        self._kv_scales = torch.ones(architecture.num_hidden_layers, 2, device=device)  # of k and v; 1.0 changes nothing
        self._kv_is_fp8 = rollout.kv_cache_is_fp8
        causal_lm, self._quantizer, routing = _build(architecture, rollout, device, dtype)
        scales = self._kv_scales if self._kv_is_fp8 else None
        self._model = Model(causal_lm, architecture, scales, dtype, device, torch.tensor(eos_ids, device=device), pad_id, routing)
        weights, optional = self._tensors()
        self._destinations = weights | optional
        self._manifest = Manifest(*({name: (tuple(t.shape), t.dtype) for name, t in part.items()} for part in (weights, optional)))

    @property
    def version(self) -> int:
        """Version of the current weights; -1 before the first update, during an update, and after an update that failed."""
        return self._version

    def probe(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[list[Rollout]]:
        return []

    def close(self) -> None:
        if not self._closed:
            self._closed, self._version = True, -1
            del self._model, self._destinations, self._quantizer

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[Rollout]:
        if self._closed or self._version < 0:
            state = "is closed" if self._closed else "has no complete weights: none were pushed, or the last update failed"
            raise RuntimeError(f"the local rollout engine {state}; call update_weights before generate")
        check_sampling(sampling)
        for prompt in prompts:
            check_prompt(prompt, sampling, self._architecture)
        rollouts: dict[SampleId, Rollout] = {}
        mask_id = self._architecture.mask_token_id
        for wave in plan_waves(prompts, sampling.num_samples, self._max_batch):
            if mask_id is not None:
                rollouts.update(zip(wave, diffuse_wave(self._model, prompts, wave, sampling, mask_id, self._version), strict=True))
                continue
            rollouts.update(self._collect(prompts, wave, decode_wave(self._model, prompts, wave, sampling)))
        if self._quantizer is not None:
            self._quantizer.forget()
        return [rollouts[i, sample] for i in range(len(prompts)) for sample in range(sampling.num_samples)]

    def _collect(self, prompts: Sequence[Prompt], wave: Sequence[SampleId], responses: Responses) -> dict[SampleId, Rollout]:
        """Cut each row after its first end-of-sequence token, and its routing also before its prompt."""
        tokens, logprobs, routed = responses.tokens, responses.logprobs, responses.routed_experts
        is_end = torch.isin(tokens, self._model.eos_ids.cpu())
        stopped = is_end.any(-1)
        lengths = torch.where(stopped, is_end.int().argmax(-1) + 1, tokens.shape[1])
        bad = ~torch.isfinite(logprobs) & (torch.arange(tokens.shape[1]) < lengths[:, None])
        if bad.any():
            row, position = bad.nonzero()[0].tolist()
            raise RuntimeError(
                f"prompt {prompts[wave[row][0]].index}: the logits at response token {position} are not finite (weight version "
                f"{self._version}); the weights or KV scales are corrupt, so push them again before generating"
            )
        rollouts = {}
        columns = (lengths.tolist(), stopped.tolist(), tokens.tolist(), logprobs.tolist())
        for number, (row, count, stop, ids, values) in enumerate(zip(wave, *columns, strict=True)):
            prompt, reason, experts = prompts[row[0]], "stop" if stop else "length", None
            if routed is not None:
                start = routed.shape[1] + 1 - tokens.shape[1]  # the first response token's column
                # A copy, because a view would keep the routing of the whole wave in memory.
                experts = routed[number, start - len(prompt.token_ids) : start + count - 1].clone()
            rollouts[row] = Rollout(prompt, tuple(ids[:count]), tuple(values[:count]), reason, self._version, experts)
        return rollouts

    @torch.no_grad()
    def update_weights(self, buckets: Iterable[Bucket], version: int) -> None:
        """See `RolloutEngine.update_weights`. Tensors are copied in place. After a failure the engine refuses to generate until the next
        complete update.

        Either all KV scales arrive or none. Without them an FP8 cache has scale 1.0, and one warning says so.
        """
        if self._closed:
            raise RuntimeError("the local rollout engine is closed")
        if version < 0:
            raise ValueError(f"version={version}: must be 0 or more; -1 means that there are no weights")
        self._version = -1
        self._kv_scales.fill_(1.0)
        self._manifest.begin()
        for bucket in buckets:
            for name, tensor in bucket:
                self._manifest.take(name, tensor)
                self._destinations[name].copy_(tensor)
        self._manifest.check_complete()
        if self._kv_is_fp8 and not self._manifest.has_scales and not self._warned_about_scales:
            self._warned_about_scales = True
            logger.warning(
                "FP8 KV cache without pushed scales: k_scale and v_scale are 1.0 in every layer (calibration.mode=off does that)"
            )
        for module in self._model.causal_lm.modules():
            if isinstance(module, QuantizedLinear | QuantizedExperts):
                module.refresh()
        set_kv_scales(self._model.causal_lm, self._kv_scales)
        self._version = version

    def state_tensors(self) -> dict[str, Tensor]:
        """The engine's tensors as views of its own memory, under the names with which they were pushed.

        With an FP8 KV cache its current scales are among them, even if none were pushed.
        """
        return {
            name: tensor for name, tensor in self._destinations.items() if name != TIED_HEAD or not self._architecture.tie_word_embeddings
        }

    def _tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The destination of every tensor by name: first those that must arrive, then those that may."""
        names, suffix = names_of_twin(self._architecture), "_scale_inv"
        state = dict(self._model.causal_lm.state_dict()) | dict(named_expert_tensors(self._model.causal_lm))
        weights = {names[name.removesuffix(suffix)] + suffix * name.endswith(suffix): tensor for name, tensor in state.items()}
        optional = {}
        if self._architecture.tie_word_embeddings:
            optional[TIED_HEAD] = weights.pop(TIED_HEAD)  # the same memory as the embedding; both names have the same values
        if self._kv_is_fp8:
            for layer in self._architecture.attention_layers:
                kinds = self._kv_scales[layer]
                optional |= {kv_scale_name(layer, kind): scale for kind, scale in zip("kv", kinds, strict=True)}
        return weights, optional


def _build(
    architecture: Architecture, rollout: RolloutConfig, device: torch.device, dtype: torch.dtype
) -> tuple[nn.Module, InputQuantizer | None, RoutingRecord | None]:
    """The model with uninitialised weights, the quantiser that its layers share, and the record of the chosen experts."""
    model_class = getattr(transformers, architecture.family.transformers_class)
    fmt = format_of(rollout)
    computed = {
        "model_type",
        "rope_theta",
        "rope_scaling",
        "partial_rotary_factor",
        "initializer_range",
        "full_attention_interval",
        "mask_token_id",
    }
    config = model_class.config_class(
        **architecture.model_dump(exclude=computed),
        **layer_types(architecture),
        rope_parameters=rope_parameters(architecture),
        attn_implementation=BIDIRECTIONAL if architecture.family.is_diffusion else ATTENTION,
    )
    with torch.device("meta"):
        causal_lm = model_class(config).to(dtype)
        quantizer = replace_linears(causal_lm, fmt) if fmt else None
        routing = replace_experts(causal_lm, architecture, dtype, fmt, rollout.return_routed_experts) if architecture.is_moe else None
    causal_lm = causal_lm.to_empty(device=device).eval().requires_grad_(False)
    # RoPE's frequencies are not pushed. They are computed again on the model's device, in float32.
    causal_lm.model.rotary_emb = type(causal_lm.model.rotary_emb)(config).to(device)
    causal_lm.tie_weights()
    set_kv_scales(causal_lm, torch.ones(architecture.num_hidden_layers, 2))
    return causal_lm, quantizer, routing
