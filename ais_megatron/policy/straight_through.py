"""Gradients that pass straight through a rounding (arXiv 1308.3432)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, original: Tensor, quantized: Tensor) -> Tensor:
        ctx.dtype = original.dtype
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].to(ctx.dtype), None


class _AlsoFor(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, other: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0]


def straight_through(original: Tensor, quantized: Tensor) -> Tensor:
    """The values of `quantized`, with the gradient of `original`."""
    result: Tensor = _StraightThrough.apply(original, quantized)
    return result


def also_for(result: Tensor, other: Tensor) -> Tensor:
    """The values of `result`. Its gradient goes to `other` too, which has the same shape and dtype, and whose values are not used."""
    same: Tensor = _AlsoFor.apply(result, other)
    return same
