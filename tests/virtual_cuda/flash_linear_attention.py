"""A stand-in for FLA (flash-linear-attention), whose kernels are written in Triton: its gated delta rule, token by token.

The signature and what is refused are those of FLA 0.5.2 (fla/ops/gated_delta_rule/chunk.py). Numbers of the real kernels cannot be seen
here.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from tests.virtual_cuda.devices import OneKernel

CALLS: Counter[tuple[int, int, torch.dtype]] = Counter()
"""Calls in this process, by the number of heads of q and k, of v, and their dtype."""

_MODULES = ("fla", "fla.ops", "fla.ops.gated_delta_rule")


def install() -> None:
    """Let this process import the stand-in, and find it as an installed package."""
    for name in _MODULES:
        module: Any = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        module.__path__ = []
        sys.modules[name] = module
    module.chunk_gated_delta_rule = chunk_gated_delta_rule


def chunk_gated_delta_rule(  # noqa: PLR0913 - FLA's own arguments
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_cpu: Tensor | None = None,
    chunk_indices: Tensor | None = None,
    cp_context: object | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """q, k: ``[batch, seq, heads, key_dim]``. v: ``[batch, seq, value_heads, value_dim]``. g, beta: ``[batch, seq, value_heads]``."""
    unused = (scale, initial_state, cu_seqlens, cu_seqlens_cpu, chunk_indices, cp_context)
    switches = (output_final_state, use_qk_l2norm_in_kernel, use_beta_sigmoid_in_kernel, allow_neg_eigval, state_v_first)
    assert all(x is None for x in unused) and not any(switches) and not kwargs, "the stand-in does not have this option"
    heads, value_heads = q.shape[2], v.shape[2]
    if heads != k.shape[2] or value_heads % heads:
        raise ValueError(f"{heads} heads of q, {k.shape[2]} of k and {value_heads} of v do not fit together")
    assert g.shape == beta.shape == v.shape[:3] and q.dtype == k.dtype == v.dtype and g.dtype == torch.float32
    CALLS[heads, value_heads, q.dtype] += 1
    return OneKernel.apply(_token_by_token, q, k, v, g, beta), None


def _token_by_token(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    value_heads, scale = v.shape[2], k.shape[-1] ** -0.5
    queries, keys = (x.float().repeat_interleave(value_heads // q.shape[2], 2) for x in (q, k))
    state, outputs = q.new_zeros(len(q), value_heads, k.shape[-1], v.shape[-1], dtype=torch.float32), []
    for t in range(q.shape[1]):
        state = g[:, t, :, None, None].exp() * state
        error = v[:, t].float() - torch.einsum("bhkv,bhk->bhv", state, keys[:, t])
        state = state + torch.einsum("bh,bhk,bhv->bhkv", beta[:, t].float(), keys[:, t], error)
        outputs.append(scale * torch.einsum("bhkv,bhk->bhv", state, queries[:, t]))
    return torch.stack(outputs, 1).to(q.dtype)
