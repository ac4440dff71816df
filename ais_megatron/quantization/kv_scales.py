"""Scales of an FP8 KV cache, from the largest |K|, |V| and |Q| that calibration saw in each layer.

A cache of scale s stores round_E4M3(k / s) and is read as that times s; with s = amax * margin / 448 the measured range just
fits. Without such scales engines use 1.0 and say nothing: a K beyond 448 saturates, a V of 1e-3 falls into the subnormals.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ais_megatron.quantization.fp8 import E4M3_MAX


def kv_scale_name(layer: int, kind: str) -> str:
    """Where the scale lives in SGLang's model, and its name on the way there (see rollout/sglang/client.py); `kind` is "k" or "v"."""
    return f"model.layers.{layer}.self_attn.attn.{kind}_scale"


@dataclass(frozen=True)
class KVScales:
    """What calibration measured.

    k_amax, v_amax, q_amax: float32 ``[num_layers]``, over all heads and tokens, K and Q after their norm and RoPE; indexed
        by the model's own layer numbers, not by a pipeline stage's. 0: nothing was seen, the scale stays 1.0.
    margin: head-room on the amax, 1 or more.

    Raises:
        ValueError: amaxes of different shapes, negative or not finite, or a margin below 1.
    """

    k_amax: Tensor
    v_amax: Tensor
    q_amax: Tensor
    margin: float = 1.0

    def __post_init__(self) -> None:
        for name in ("k_amax", "v_amax", "q_amax"):
            amax = getattr(self, name)
            if amax.dim() != 1 or amax.shape != self.k_amax.shape or amax.dtype != torch.float32:
                raise ValueError(f"{name} is {amax.dtype} {list(amax.shape)}; all three amaxes must be float32 [num_layers]")
            bad = (~(torch.isfinite(amax) & (amax >= 0))).nonzero().flatten().tolist()
            if bad:
                raise ValueError(
                    f"{name} of layer {bad[0]} is {amax[bad[0]].item()}; an amax is finite and not negative (NaN here means that "
                    "the calibration pass met NaN activations)"
                )
        if not self.margin >= 1.0:
            raise ValueError(f"margin={self.margin}: below 1 the measured amax itself would saturate; use 1.0 or more")

    @classmethod
    def unit(cls, num_layers: int) -> KVScales:
        """All scales exactly 1.0: the engine's behaviour without calibration, said aloud."""
        return cls(k_amax=torch.zeros(num_layers), v_amax=torch.zeros(num_layers), q_amax=torch.zeros(num_layers))

    @property
    def num_layers(self) -> int:
        return self.k_amax.shape[0]

    @property
    def k_scale(self) -> Tensor:
        """float32 ``[num_layers]``."""
        return self._scale(self.k_amax)

    @property
    def v_scale(self) -> Tensor:
        """float32 ``[num_layers]``."""
        return self._scale(self.v_amax)

    def _scale(self, amax: Tensor) -> Tensor:
        scale = amax * (self.margin / E4M3_MAX)
        return torch.where(scale > 0, scale, torch.ones_like(scale))

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(engine's name, float32 scalar on the CPU) of every layer's k_scale and v_scale."""
        k_scale, v_scale = self.k_scale.cpu(), self.v_scale.cpu()
        for layer in range(self.num_layers):
            yield kv_scale_name(layer, "k"), k_scale[layer].clone()
            yield kv_scale_name(layer, "v"), v_scale[layer].clone()

    def q_overflow_layers(self) -> list[int]:
        """Layers whose Q exceeds 448: FlashAttention-3 casts Q to FP8 without a scale, so it saturates there."""
        return (self.q_amax > E4M3_MAX).nonzero().flatten().tolist()
