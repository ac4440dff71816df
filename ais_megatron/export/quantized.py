"""How the projections of a quantised model are written, so that other engines load exactly the trained values.

    fp8_e4m3   ``X.weight`` E4M3 and ``X.weight_scale_inv``, one float32 scale per block. This is DeepSeek's and Qwen's layout, which
               transformers, SGLang and vLLM read (``quant_method: fp8``).
    int4       ``X.weight_packed`` int32 ``[N, K / 8]``, ``X.weight_scale`` float32 ``[N, K / 128]`` and ``X.weight_shape``. This is
               ``pack-quantized`` of compressed-tensors, which transformers, vLLM and SGLang read. An int32 holds eight columns, the first
               one in its lowest four bits, each as its value plus 8.

Source: compressed-tensors 0.20, `pack_to_int32` and `PackedQuantizationCompressor`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ais_megatron.config import Architecture, Config
from ais_megatron.config.hf_config import fp8_config, int4_config
from ais_megatron.export.hf_folder import FLOAT32, Kind, Projections
from ais_megatron.models.family import tensors_of
from ais_megatron.quantization.formats import FP8_E4M3, INT4, Format, format_of
from ais_megatron.quantization.fp8 import quantize_bucket

_PER_WORD = 8  # four-bit values in an int32
_OFFSET = 8  # makes them unsigned


def projections_of(config: Config) -> Projections | None:
    """The layout in which this run's model is exported. None: projections are written like all other weights.

    That is so if the trained model is not quantised, or if its format has no layout that engines read: E5M2, FP4, and INT4 where the
    columns of a projection are no multiple of 128."""
    fmt = format_of(config.rollout) if config.policy.is_aligned else None
    if fmt is None:
        return None
    if fmt.name == FP8_E4M3.name:
        return BlockFP8(fmt)
    columns = [tensor.shape[1] for tensor in tensors_of(config.architecture) if tensor.quantized]
    return PackedInt4() if fmt.name == INT4.name and all(k % INT4.weight_block[1] == 0 for k in columns) else None


class BlockFP8:
    def __init__(self, fmt: Format) -> None:
        self._fmt = fmt

    def kinds(self, name: str, shape: tuple[int, ...]) -> dict[str, Kind]:
        scales = self._fmt.scales_shape(shape)
        return {name: Kind(shape, "F8_E4M3", torch.float8_e4m3fn), _of(name, "weight_scale_inv"): Kind(scales, *FLOAT32)}

    def tensors(self, name: str, weight: Tensor) -> list[tuple[str, Tensor]]:
        return quantize_bucket([(name, weight)], self._fmt)

    def config(self, architecture: Architecture) -> dict[str, object]:
        return fp8_config(self._fmt.weight_block[0], architecture)


class PackedInt4:
    def kinds(self, name: str, shape: tuple[int, ...]) -> dict[str, Kind]:
        rows, columns = shape
        return {
            _of(name, "weight_packed"): Kind((rows, columns // _PER_WORD), "I32", torch.int32),
            _of(name, "weight_scale"): Kind(INT4.scales_shape(shape), *FLOAT32),
            _of(name, "weight_shape"): Kind((2,), "I64", torch.int64),
        }

    def tensors(self, name: str, weight: Tensor) -> list[tuple[str, Tensor]]:
        (_, q), (_, scale) = quantize_bucket([(name, weight)], INT4)
        return [
            (_of(name, "weight_packed"), pack(q)),
            (_of(name, "weight_scale"), scale),
            (_of(name, "weight_shape"), torch.tensor(q.shape)),
        ]

    def config(self, architecture: Architecture) -> dict[str, object]:
        return int4_config(INT4.weight_block[1], architecture)


def pack(values: Tensor) -> Tensor:
    """Integers from -8 to 7, int8 ``[N, K]`` with K a multiple of 8, as int32 ``[N, K / 8]``."""
    nibbles = (values.to(torch.int32) + _OFFSET).view(len(values), -1, _PER_WORD)
    return (nibbles << torch.arange(0, 32, 4, dtype=torch.int32)).sum(2, dtype=torch.int32)


def _of(weight: str, part: str) -> str:
    return weight.removesuffix("weight") + part
