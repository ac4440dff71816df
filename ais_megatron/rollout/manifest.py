"""Lists the tensors of a full set of weights, so that wrong weights are refused before an engine gets any of them.

SGLang accepts BF16 weights for an FP8 model with HTTP 200, and also names that it does not know and KV scales that it drops. Only
garbage text shows the damage. So every tensor is first compared with this list: name, shape, dtype and finite values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ais_megatron.config import Architecture, RolloutConfig
from ais_megatron.models.family import HEAD, tensors_of
from ais_megatron.quantization.formats import format_of
from ais_megatron.quantization.kv_scales import kv_scale_name

TIED_HEAD = HEAD.name
Kind = tuple[tuple[int, ...], torch.dtype]


class Manifest:
    """The tensors that an update must contain, and those that it may contain.

    Args:
        required, optional: shape and dtype by Hugging Face name. KV scales are optional, but either all or none must arrive.
        factors: those of LoRA's factors that are sent by themselves. With them either all or none of `required` must arrive.
    """

    def __init__(self, required: Mapping[str, Kind], optional: Mapping[str, Kind], factors: Mapping[str, Kind] | None = None) -> None:
        self._required, self._optional, self._factors = dict(required), dict(optional), dict(factors or {})
        self._arrived: set[str] = set()

    @classmethod
    def of(
        cls, architecture: Architecture, rollout: RolloutConfig, dtype: torch.dtype, factors: Mapping[str, tuple[int, ...]] | None = None
    ) -> Manifest:
        """What an engine with this configuration accepts. `dtype` is that of weights that are not quantised, and of `factors`."""
        fmt = format_of(rollout)
        required: dict[str, Kind] = {}
        for name, shape, quantized in tensors_of(architecture):
            required[name] = (shape, fmt.dtype if fmt and quantized else dtype)
            if fmt and quantized:
                # The shape of the scales also tells FP4 from E4M3, which have the same dtype.
                required[name.removesuffix("weight") + "weight_scale_inv"] = (fmt.scales_shape(shape), torch.float32)
        optional = {}
        if architecture.tie_word_embeddings:
            optional[TIED_HEAD] = required.pop(TIED_HEAD)
        if rollout.kv_cache_is_fp8:
            layers = architecture.attention_layers
            optional |= {kv_scale_name(layer, kind): ((), torch.float32) for layer in layers for kind in "kv"}
        return cls(required, optional, {name: (shape, dtype) for name, shape in (factors or {}).items()})

    def begin(self) -> None:
        """Start a new update, in which nothing has arrived yet."""
        self._arrived = set()

    def take(self, name: str, tensor: Tensor) -> None:
        """Check a tensor and note that it arrived.

        Raises:
            ValueError: the tensor is unknown, arrived before, has another shape or dtype, or is not finite.
        """
        expected = self._required.get(name, self._optional.get(name, self._factors.get(name)))
        if expected is None:
            raise ValueError(f"{name}: {_why_unknown(name)}")
        if name in self._arrived:
            raise ValueError(f"{name}: arrived twice in one update")
        shape, dtype = expected
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name}: got {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}; "
                "push whole tensors, quantised as rollout.quantization says"
            )
        if _is_scale(name):
            if not 0.0 < tensor.item() < float("inf"):
                raise ValueError(f"{name}: is {tensor.item()}; a KV scale must be finite and above 0")
        elif dtype.itemsize > 1 and not _is_finite(tensor):  # (quantisation has already refused values that are not finite)
            raise ValueError(f"{name}: holds NaN or infinity; the update before this sync has diverged")
        self._arrived.add(name)

    def check_complete(self) -> None:
        """Raise ValueError unless every required tensor and every factor arrived, and either all KV scales or none."""
        missing = sorted(self._factors.keys() - self._arrived)
        if self.has_weights or not self._factors:
            missing += sorted(self._required.keys() - self._arrived)
        if self.has_scales:
            missing += sorted(name for name in self._optional.keys() - self._arrived if _is_scale(name))
        if missing:
            others = f", as are {len(missing) - 1} others" if len(missing) > 1 else ""
            raise ValueError(f"{missing[0]}: missing from the update{others}; push one full set of weights")

    @property
    def has_weights(self) -> bool:
        """Whether weights arrived, and not only factors and KV scales."""
        return not self._required.keys().isdisjoint(self._arrived)

    @property
    def has_scales(self) -> bool:
        """Whether KV scales arrived."""
        return any(_is_scale(name) for name in self._arrived)


def _is_finite(tensor: Tensor) -> bool:
    """Whether all values are finite. The sum is a hundred times faster than a test of every value, which is needed only if it is not
    finite."""
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())


def _is_scale(name: str) -> bool:
    return name.endswith((".k_scale", ".v_scale"))


def _why_unknown(name: str) -> str:
    if _is_scale(name):
        return "the engine has no such KV scale, because its KV cache is not FP8 (rollout.kv_cache) or it has no such layer"
    if name.endswith("weight_scale_inv"):
        return "the engine has no such weight scale, because rollout.quantization=none or the layer is not quantised"
    return "the model has no such tensor"
