"""Root-mean-square norms of the policy outside Transformer Engine, on a CPU one chunk of tokens at a time.

torch has no fused kernel for it on a CPU. It is a chain of small operations, and over all tokens of a microbatch each of them would read
and write main memory. Over a chunk that stays in a core's cache the chain and its backward pass take about 60 % of the time. The
forward pass gives the same bits as `torch.nn.functional.rms_norm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

CHUNK_VALUES = 1 << 17
"""Number of values in a chunk. In float32 they take 512 KB."""


class RMSNorm(nn.Module):
    """Root-mean-square norm. Megatron's `WrappedTorchNorm` refuses sequence parallelism. This norm marks its weight, so that
    `finalize_model_grads` sums its gradient over the tensor-parallel group."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        weight: Any = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        weight.sequence_parallel = config.sequence_parallel  # an attribute that Megatron reads; torch's type does not have it
        self.weight: nn.Parameter = weight
        self.eps = eps
        self.rounds_first = False
        """Round the normed values to their dtype before they are multiplied by the weight, as transformers' models do."""

    def forward(self, x: Tensor) -> Tensor:
        if self.rounds_first:
            return F.rms_norm(x, self.weight.shape, None, self.eps) * self.weight
        if x.device.type == "cpu":
            return chunked_rms_norm(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class ZeroCenteredRMSNorm(RMSNorm):
    """An `RMSNorm` that multiplies by 1 + weight, in float32, and rounds once."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__(config, hidden_size, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        weight = 1.0 + self.weight.float()
        if x.device.type == "cpu":
            return chunked_rms_norm(x, weight, self.eps)
        return F.rms_norm(x.float(), self.weight.shape, weight, self.eps).to(x.dtype)


def chunked_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension of x, ``[..., hidden]``, in float32 and rounded once to x's dtype."""
    result: Tensor = _RMSNorm.apply(x, weight, eps)
    return result


class _RMSNorm(torch.autograd.Function):
    """With n = x r, r = 1 / sqrt(mean(x^2) + eps) and g = dy weight:   dx = r (g - n mean(g n)),   dweight = sum over tokens of dy n."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        result, inverse = torch.empty_like(flat), torch.empty(len(flat), 1, dtype=torch.float32, device=x.device)
        wide = weight.float()
        for rows in _chunks(flat):
            values = flat[rows].float()
            inverse[rows] = values.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            result[rows] = (values * inverse[rows]).mul_(wide)
        ctx.save_for_backward(flat, weight, inverse)
        return result.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        flat, weight, inverse = ctx.saved_tensors
        upstream = grads[0].reshape(flat.shape)
        result, wide = torch.empty_like(flat), weight.float()
        of_weight = torch.zeros_like(wide)
        for rows in _chunks(flat):
            normed, grad = flat[rows].float() * inverse[rows], upstream[rows].float()
            of_weight += (grad * normed).sum(0)
            grad = grad * wide
            mean = (grad * normed).mean(-1, keepdim=True)
            result[rows] = grad.sub_(normed.mul_(mean)).mul_(inverse[rows])
        return result.view(grads[0].shape), of_weight.to(weight.dtype), None


def _chunks(x: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK_VALUES // x.shape[1])
    return (slice(start, start + size) for start in range(0, len(x), size))
