"""Stands in for `sgl_kernel`, SGLang's compiled kernels, whose CPU build needs AMX and is not on the package index.

SGLang on a CPU imports many names from it and, with the torch_native attention backend, calls two: `assign_req_to_token_pool_cpu`
and the operator `murmur_hash32_cpu`. These are here in torch; every other name can be imported and raises when called. SGLang
takes the absent operator `convert_weight_packed` as the sign that there is no AMX, so the stand-in is chosen on AMX machines too.
"""

import torch
from torch import library

__version__ = "0.4.10"

_UINT32 = 0xFFFFFFFF


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start_offset, end_offset, out_cache_loc, pool_len):
    """Write each request's newly allocated cache slots into its row of the table.

    req_pool_indices, start_offset, end_offset: ``[num_requests]``; request i fills ``start_offset[i]:end_offset[i]``.
    req_to_token: ``[num_rows, pool_len]``, written in place. out_cache_loc: ``[sum of lengths]``, in the requests' order.
    """
    taken = 0
    for row, start, end in zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True):
        length = end - start
        req_to_token[row, start:end] = out_cache_loc[taken : taken + length].to(req_to_token.dtype)
        taken += length


def murmur_hash32(seed, positions, col_indices):
    """MurmurHash3 (32 bits) of (seed's two halves, position, column): the random numbers of seeded sampling.

    seed, positions: integers ``[batch]``. col_indices: ``[vocab]``. Returns uint32 ``[batch, vocab]``.
    Computed in int64 and cut to 32 bits after every step: torch has no uint32 arithmetic.
    """
    seed = seed.to(torch.int64)
    state = _absorb(torch.zeros_like(seed), seed & _UINT32)
    state = _absorb(state, (seed >> 32) & _UINT32)
    state = _absorb(state, positions.to(torch.int64) & _UINT32)
    state = _absorb(state[:, None], (col_indices.to(torch.int64) & _UINT32)[None, :])
    state = state ^ 16  # bytes absorbed
    state = _multiply(state ^ (state >> 16), 0x85EBCA6B)
    state = _multiply(state ^ (state >> 13), 0xC2B2AE35)
    return (state ^ (state >> 16)).to(torch.uint32)


def _multiply(a, c):
    """(a * c) mod 2**32 without leaving int64: the upper half of `a` first."""
    return ((((a >> 16) * c & _UINT32) << 16) + (a & 0xFFFF) * c) & _UINT32


def _rotate(x, bits):
    return ((x << bits) | (x >> (32 - bits))) & _UINT32


def _absorb(state, word):
    state = state ^ _multiply(_rotate(_multiply(word, 0xCC9E2D51), 15), 0x1B873593)
    return (_rotate(state, 13) * 5 + 0xE6546B64) & _UINT32


_library = library.Library("sgl_kernel", "FRAGMENT")
_library.define("murmur_hash32_cpu(Tensor seed, Tensor positions, Tensor col_indices) -> Tensor")
_library.impl("murmur_hash32_cpu", murmur_hash32, "CPU")


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"sgl_kernel.{name}: not in the CPU stand-in of the tests (tests/sglang/shim)")

    missing.__name__ = name
    return missing
