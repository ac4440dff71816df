"""What one full set of weights consists of, so that a wrong one is refused before an engine has taken a byte of it.

SGLang answers 200 to BF16 weights sent into an FP8 model, to names that it does not know and to KV scales that it drops;
the damage shows as garbage text. So every tensor is compared with this list first: name, shape, dtype, finite values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ais_megatron.config import Architecture, RolloutConfig
from ais_megatron.models.family import HEAD, tensors_of
from ais_megatron.quantization.formats import FORMATS
from ais_megatron.quantization.kv_scales import kv_scale_name

TIED_HEAD = HEAD.name
Kind = tuple[tuple[int, ...], torch.dtype]


class Manifest:
    """The tensors an update must hold, and those it may.

    Args:
        required, optional: shape and dtype by Hugging Face name. KV scales are optional, but all or none of them.
    """

    def __init__(self, required: Mapping[str, Kind], optional: Mapping[str, Kind]) -> None:
        self._required, self._optional = dict(required), dict(optional)
        self._arrived: set[str] = set()

    @classmethod
    def of(cls, architecture: Architecture, rollout: RolloutConfig, dtype: torch.dtype) -> Manifest:
        """What an engine of this configuration takes; `dtype` is that of weights which are not quantised."""
        fmt = FORMATS.get(rollout.quantization)
        required: dict[str, Kind] = {}
        for name, shape, quantized in tensors_of(architecture):
            required[name] = (shape, fmt.dtype if fmt and quantized else dtype)
            if fmt and quantized:
                # These also tell FP4 from E4M3, which share a dtype.
                required[name.removesuffix("weight") + "weight_scale_inv"] = (fmt.scales_shape(shape), torch.float32)
        optional = {}
        if architecture.tie_word_embeddings:
            optional[TIED_HEAD] = required.pop(TIED_HEAD)
        if rollout.kv_cache_is_fp8:
            layers = range(architecture.num_hidden_layers)
            optional |= {kv_scale_name(layer, kind): ((), torch.float32) for layer in layers for kind in "kv"}
        return cls(required, optional)

    def begin(self) -> None:
        """A new update: nothing has arrived."""
        self._arrived = set()

    def take(self, name: str, tensor: Tensor) -> None:
        """Note that a tensor arrived.

        Raises:
            ValueError: unknown, twice, of another shape or dtype, or not finite.
        """
        expected = self._required.get(name, self._optional.get(name))
        if expected is None:
            raise ValueError(f"{name}: {_why_unknown(name)}")
        if name in self._arrived:
            raise ValueError(f"{name}: arrived twice in one update")
        shape, dtype = expected
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise ValueError(
                f"{name}: got {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}; "
                "push whole tensors, quantised exactly when rollout.quantization says so"
            )
        if _is_scale(name):
            if not 0.0 < tensor.item() < float("inf"):
                raise ValueError(f"{name}: is {tensor.item()}; a KV scale must be finite and above 0")
        elif dtype.itemsize > 1 and not _is_finite(tensor):  # (quantisation has refused what is not finite)
            raise ValueError(f"{name}: holds NaN or infinity; the update before this sync has diverged")
        self._arrived.add(name)

    def check_complete(self) -> None:
        """ValueError unless every required tensor arrived, and of the KV scales all or none."""
        missing = sorted(self._required.keys() - self._arrived)
        if self.has_scales:
            missing += sorted(name for name in self._optional.keys() - self._arrived if _is_scale(name))
        if missing:
            others = f", as are {len(missing) - 1} others" if len(missing) > 1 else ""
            raise ValueError(f"{missing[0]}: missing from the update{others}; push one full set of weights")

    @property
    def has_scales(self) -> bool:
        """Whether KV scales arrived."""
        return any(_is_scale(name) for name in self._arrived)


def _is_finite(tensor: Tensor) -> bool:
    """A finite sum has finite terms, and is read a hundred times as fast as every term is judged; only an infinite one asks further."""
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())


def _is_scale(name: str) -> bool:
    return name.endswith((".k_scale", ".v_scale"))


def _why_unknown(name: str) -> str:
    if _is_scale(name):
        return "KV scales are of no use here, since the KV cache is not FP8 (rollout.kv_cache) or has no such layer"
    if name.endswith("weight_scale_inv"):
        return "scales of weights are of no use here: rollout.quantization=none, or a layer that is not quantised"
    return "the model has no such tensor"
