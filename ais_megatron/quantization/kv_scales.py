"""Scales of an FP8 KV cache, from the largest |K|, |V| and |Q| that calibration saw in each layer.

A cache with scale s stores round_E4M3(k / s), and readers multiply by s. With s = amax * margin / 448 the measured range fits.
Without such scales engines silently use 1.0. Then a K beyond 448 saturates, and a V of 1e-3 is a subnormal number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ais_megatron.quantization.fp8 import E4M3_MAX


def kv_scale_name(layer: int, kind: str) -> str:
    """The name of a scale in SGLang's model and in weight syncs; `kind` is "k" or "v"."""
    return f"model.layers.{layer}.self_attn.attn.{kind}_scale"


@dataclass(frozen=True)
class KVScales:
    """The largest absolute values of K, V and Q that calibration measured, and the scales that follow from them.

    The amaxes are float32 ``[num_layers]``, over all heads and tokens. K and Q are measured after their norm and RoPE. Layers are
    numbered over the whole model, not within a pipeline stage. An amax of 0 means that nothing was seen; the scale is then 1.0.

    Raises:
        ValueError: amaxes have different shapes, are negative or not finite, or the margin is below 1.
    """

    k_amax: Tensor
    v_amax: Tensor
    q_amax: Tensor
    margin: float = 1.0
    """Factor on the amax, 1 or more."""

    def __post_init__(self) -> None:
        for name in ("k_amax", "v_amax", "q_amax"):
            amax = getattr(self, name)
            if amax.dim() != 1 or amax.shape != self.k_amax.shape or amax.dtype != torch.float32:
                raise ValueError(f"{name} is {amax.dtype} {list(amax.shape)}; all three amaxes must be float32 [num_layers]")
            bad = (~(torch.isfinite(amax) & (amax >= 0))).nonzero().flatten().tolist()
            if bad:
                raise ValueError(
                    f"{name} of layer {bad[0]} is {amax[bad[0]].item()}; an amax must be finite and not negative (NaN means that "
                    "activations were NaN in the calibration pass)"
                )
        if not self.margin >= 1.0:
            raise ValueError(f"margin={self.margin}: below 1 even the measured values would saturate; use 1.0 or more")

    @classmethod
    def unit(cls, num_layers: int) -> KVScales:
        """All scales are exactly 1.0, which is also what an engine uses without calibration."""
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

    def named_tensors(self, layers: Iterable[int] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name in the engine, float32 scalar on the CPU) for k_scale and v_scale of these layers; None: of every layer."""
        k_scale, v_scale = self.k_scale.cpu(), self.v_scale.cpu()
        for layer in range(self.num_layers) if layers is None else layers:
            yield kv_scale_name(layer, "k"), k_scale[layer].clone()
            yield kv_scale_name(layer, "v"), v_scale[layer].clone()

    def q_overflow_layers(self) -> list[int]:
        """Layers in which Q exceeds 448. FlashAttention-3 casts Q to FP8 without a scale, so Q saturates there."""
        return (self.q_amax > E4M3_MAX).nonzero().flatten().tolist()
