"""The real Python of Transformer Engine on a machine without its compiled parts: what those compute is written here in torch.

`install` must run before anything imports Transformer Engine or Megatron. The package's classes, parameters, names, arguments
and the code that Megatron wraps around them are the real ones. The forward passes of five modules are replaced, because they
begin where the compiled kernels do, and so are fused RoPE, fused permutation and the optimizer's multi-tensor kernels. Numbers
of the real kernels cannot be seen here. In FP8 too they compute in plain precision, but they note the recipe they were asked for and
check the sizes that FP8 kernels need (`PRODUCTS`).
"""

from __future__ import annotations

import enum
import importlib.machinery
import os
import re
import sys
import types
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ais_megatron.cluster.cuda_environment import BLOCK_SCALES
from tests.virtual_cuda.missing import stand_in_for

VERSION = "2.20.2"
EXTENSION = "transformer_engine_torch"
NOT_NEEDED = ("onnx", "onnxscript", "nvdlfw_inspect")  # imported by modules that nothing here runs

PRODUCTS: Counter[tuple[str, str | None, bool]] = Counter()
"""The forward products of this process, by the layer's class, the FP8 recipe's (None: not in FP8), and whether its scales are float32."""


def install(packages: Path) -> None:
    """packages: the folder in which Transformer Engine's wheel was unpacked; it is on `sys.path`."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it then leaves its C++ library alone
    os.environ[BLOCK_SCALES] = "1"  # as `prepare_cuda` does
    stand_in_for(*NOT_NEEDED)
    sys.modules[EXTENSION] = _extension(packages)
    _answer_versions()
    import transformer_engine.common

    transformer_engine.common.load_framework_extension = lambda framework: None
    import transformer_engine.pytorch as te
    from transformer_engine.pytorch import quantization

    quantization._FP8_BLOCK_SCALING_SUPPORT = (True, "")  # it would ask torch for its CUDA version
    te.Linear.forward = te.LayerNormLinear.forward = _linear
    te.RMSNorm.forward = _rms_norm
    te.DotProductAttention.forward = _attention
    te.GroupedLinear.forward = _grouped_linear


def replace_fused_permutation() -> None:
    """Megatron's names for Transformer Engine's fused permutation, whose kernels are written in Triton."""
    from megatron.core.transformer.moe import moe_utils

    moe_utils.fused_permute = _permute
    moe_utils.fused_permute_with_probs = _permute_with_probs
    moe_utils.fused_unpermute = _unpermute
    moe_utils.fused_sort_chunks_by_index = lambda x, sizes, order: _sorted_chunks(x, sizes, order)
    moe_utils.fused_sort_chunks_by_index_with_probs = lambda x, probs, sizes, order: (
        _sorted_chunks(x, sizes, order),
        _sorted_chunks(probs, sizes, order),
    )


def _answer_versions() -> None:
    version = metadata.version
    metadata.version = lambda name: VERSION if re.fullmatch("transformer[-_]engine.*", name) else version(name)


# ---- the compiled extension ----------------------------------------------------------------------------------------------


class _Extension(types.ModuleType):
    """Kernels that are given are there. Others are names, which the package may pass around but not call."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = _Kernel(name)
        setattr(self, name, value)
        return value


class _Kernel:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> _Kernel:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Kernel(f"{self._name}.{name}")

    def __int__(self) -> int:
        return 0

    __index__ = __int__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{EXTENSION}.{self._name} was called: it runs on a GPU only")


def _extension(packages: Path) -> _Extension:
    module = _Extension(EXTENSION)
    module.__spec__ = importlib.machinery.ModuleSpec(EXTENSION, None)
    constants = (packages / "transformer_engine/pytorch/constants.py").read_text()
    names = dict.fromkeys(re.findall(r"^    (k\w+) = ", constants, re.MULTILINE))
    module.DType = enum.IntEnum("DType", {name: value for value, name in enumerate(names)})
    backends = {"NVTE_No_Backend": -1, "NVTE_F16_arbitrary_seqlen": 1, "NVTE_FP8": 2}
    module.NVTE_Fused_Attn_Backend = enum.IntEnum("NVTE_Fused_Attn_Backend", backends)
    kernels: dict[str, Callable[..., Any]] = {
        "get_cudnn_version": lambda: 92400,
        "get_cublasLt_version": lambda: 130100,
        "get_num_cublas_streams": lambda: 4,
        "multi_tensor_l2norm": _multi_tensor_l2norm,
        "multi_tensor_scale": _multi_tensor_scale,
        "multi_tensor_adam": _multi_tensor_adam,
        "fused_rope_forward": _rope_forward,
        "fused_rope_backward": _rope_backward,
        "fused_multi_row_padding": _pad_rows,
        "fused_multi_row_unpadding": _pad_rows,
    }
    for name, kernel in kernels.items():
        setattr(module, name, kernel)
    return module


def _multi_tensor_l2norm(chunk: int, overflow: Tensor, lists: list[list[Tensor]], per_tensor: bool = False, *_: Any):  # noqa: ANN202
    norms = [tensor.float().norm() for tensor in lists[0]]
    total = torch.stack(norms).norm() if norms else overflow.new_zeros((), dtype=torch.float32)
    return total.view(1), None


def _multi_tensor_scale(chunk: int, overflow: Tensor, lists: list[list[Tensor]], scale: float, *_: Any) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


def _multi_tensor_adam(  # noqa: PLR0913 - the kernel's own arguments
    chunk: int, overflow: Tensor, lists: list[list[Tensor]], lr: float, beta1: float, beta2: float, eps: float, step: int, mode: int,
    bias_correction: int, weight_decay: float, *_: Any,
) -> None:  # fmt: skip
    for grad, parameter, mean, square in zip(*lists, strict=True):
        mean.mul_(beta1).add_(grad.float(), alpha=1 - beta1)
        square.mul_(beta2).addcmul_(grad.float(), grad.float(), value=1 - beta2)
        update = (mean / (1 - beta1**step)) / ((square / (1 - beta2**step)).sqrt() + eps)
        parameter.add_(-lr * (update + weight_decay * parameter))


def _pad_rows(x: Tensor, out: Tensor, sizes: list[int], new_sizes: list[int]) -> None:
    """Copies each block of rows to its place among larger or smaller blocks."""
    out.zero_()
    for source, target in zip(x.split(sizes), out.split(new_sizes), strict=True):
        rows = min(len(source), len(target))
        target[:rows].copy_(source[:rows])


def _rotated(x: Tensor, freqs: Tensor, sign: float) -> Tensor:
    """x ``[seq, batch, heads, dim]``, freqs ``[seq or more, 1, 1, rotated]``: half of the first columns against their other half."""
    freqs = freqs[: x.shape[0]].float()
    x, rest = x[..., : freqs.shape[-1]], x[..., freqs.shape[-1] :]
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1) * sign
    return torch.cat([(x.float() * freqs.cos() + turned * freqs.sin()).to(x.dtype), rest], dim=-1)


def _rope_forward(x: Tensor, freqs: Tensor, *others: Any) -> Tensor:
    return _rotated_rows(x, freqs, 1.0, *others)


def _rope_backward(grad: Tensor, freqs: Tensor, *others: Any) -> Tensor:
    return _rotated_rows(grad, freqs, -1.0, *others)


def _rotated_rows(  # noqa: PLR0913 - the kernel's own arguments
    x: Tensor, freqs: Tensor, sign: float, starts: None, kind: Any, interleaved: bool, limits: Tensor | None, ranks: int, rank: int
) -> Tensor:
    """With limits x is ``[tokens, heads, dim]`` of packed rows, which all begin with the first angle."""
    if limits is None:
        return _rotated(x, freqs, sign)
    positions = torch.cat([positions_on_rank(end - start, ranks, rank, x.device) for start, end in _rows_of(limits)])
    assert len(positions) == len(x), "the rows of all ranks are not the tokens of this rank"
    return _rotated(x[:, None], freqs[positions], sign)[:, 0]


def _rows_of(limits: Tensor) -> list[tuple[int, int]]:
    return list(zip(limits.tolist()[:-1], limits.tolist()[1:], strict=True))


def positions_on_rank(length: int, ranks: int, rank: int, device: torch.device) -> Tensor:
    """Of the tokens of a row that a context-parallel rank has, as the kernels count on it."""
    assert ranks == 1 or length % (2 * ranks) == 0, f"a row of {length} tokens cannot be cut into {2 * ranks} chunks"
    chunks = torch.arange(length, device=device).chunk(2 * ranks) if ranks > 1 else [torch.arange(length, device=device)]
    return torch.cat([chunks[rank], chunks[2 * ranks - 1 - rank]]) if ranks > 1 else chunks[0]


# ---- modules -------------------------------------------------------------------------------------------------------------


class _AccumulatingLinear(torch.autograd.Function):
    """x W^T, whose backward pass adds W's gradient to Megatron's FP32 buffer itself, and leaves a dummy for autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.weight = weight
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        ctx.weight.main_grad.add_(grad.flatten(0, -2).float().t() @ x.flatten(0, -2).float())
        ctx.weight.grad_added_to_main_grad = True
        return grad @ weight, torch.zeros_like(weight)


def _note(module: Any, x: Tensor, weight: Tensor) -> None:
    """Add the product to `PRODUCTS`."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager
    from transformer_engine.pytorch.utils import assert_dim_for_fp8_exec

    recipe = FP8GlobalStateManager.get_fp8_recipe() if FP8GlobalStateManager.is_fp8_enabled() else None
    if recipe is not None:
        assert_dim_for_fp8_exec(x, weight)
    in_float32 = recipe is not None and not (recipe.fp8_quant_fwd_inp.power_2_scale or recipe.fp8_quant_fwd_weight.power_2_scale)
    PRODUCTS[type(module).__name__, type(recipe).__name__ if recipe is not None else None, in_float32] += 1


def _product(module: Any, x: Tensor, weight: Tensor) -> Tensor:
    _note(module, x, weight)
    accumulates = module.fuse_wgrad_accumulation and torch.is_grad_enabled() and hasattr(weight, "main_grad")
    return _AccumulatingLinear.apply(x, weight) if accumulates else F.linear(x, weight)


def _linear(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """`Linear` and `LayerNormLinear`, with the communication of tensor and sequence parallelism done by Megatron's functions."""
    from megatron.core.tensor_parallel import mappings

    if hasattr(self, "layer_norm_weight"):
        x = _normed(x, self.layer_norm_weight, self.eps, self.zero_centered_gamma)
    normed = x
    tp, mode = self.tp_size > 1, self.parallel_mode
    if tp and mode == "column":
        x = mappings.gather_from_sequence_parallel_region(x) if self.sequence_parallel else mappings.copy_to_tensor_model_parallel_region(x)
    y = _product(self, x, self.weight)
    if tp and mode == "row":
        reduce = mappings.reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else None
        y = (reduce or mappings.reduce_from_tensor_model_parallel_region)(y)
    bias = self.bias if self.use_bias else None
    returned = [y, bias] if self.return_bias else [y if bias is None else y + bias]
    if getattr(self, "return_layernorm_output", False):
        returned.append(normed)
    return tuple(returned) if len(returned) > 1 else returned[0]


def _rms_norm(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _normed(x, self.weight, self.eps, self.zero_centered_gamma)


def _normed(x: Tensor, weight: Tensor, eps: float, zero_centered: bool) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), 1.0 + weight if zero_centered else weight, eps)


def _attention(self: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
    kind = kwargs.get("attn_mask_type") or self.attn_mask_type
    if kind == "padding":
        return _bidirectional(query, key, value, mask)
    assert "causal" in kind, "padding on the right needs no other mask than the causal one"
    from megatron.core.tensor_parallel import mappings

    ranks, rank = (self.cp_group.size(), self.cp_group.rank()) if self.cp_group is not None else (1, 0)
    packed = kwargs.get("qkv_format") == "thd"
    if packed:
        limits = kwargs["cu_seqlens_q"]
        assert limits.dtype == torch.int32 and torch.equal(limits, kwargs["cu_seqlens_kv"])
        rows = _rows_of(limits)
        assert kwargs["max_seqlen_q"] >= max(end - start for start, end in rows) and kwargs["max_seqlen_q"] % (2 * ranks) == 0
        query, key, value = (x[:, None] for x in (query, key, value))
    else:
        rows = [(0, ranks * len(query))]
    assert rows[-1][1] == ranks * len(query)
    if ranks > 1:  # the ring, all at once
        both = mappings.gather_from_sequence_parallel_region(torch.stack([key, value], 1), group=self.cp_group)
        key, value = both.unbind(1)
    keys, values = (x.unflatten(0, (ranks, -1)) for x in (key, value))
    contexts = []
    for start, end in rows:
        part = slice(start // ranks, end // ranks)
        own = positions_on_rank(end - start, ranks, rank, query.device)
        places = torch.cat([positions_on_rank(end - start, ranks, other, query.device) for other in range(ranks)])
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query[part], keys[:, part].flatten(0, 1), values[:, part].flatten(0, 1)))
        mask = places <= own[:, None]
        contexts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).permute(2, 0, 1, 3).flatten(2))
    context = torch.cat(contexts)
    return context[:, 0] if packed else context


def _bidirectional(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """``[seq, batch, heads, dim]`` each; mask: bool ``[batch, 1, 1, seq]``, True in padding."""
    assert mask is not None and mask.dtype == torch.bool and mask.shape == (query.shape[1], 1, 1, len(key))
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=~mask, enable_gqa=True).permute(2, 0, 1, 3).flatten(2)


def _grouped_linear(self: Any, x: Tensor, m_splits: Any, *args: Any, **kwargs: Any) -> Any:
    parts = torch.split(x, [int(size) for size in m_splits])
    y = torch.cat([_product(self, part, getattr(self, f"weight{i}")) for i, part in enumerate(parts)])
    return (y, None) if self.return_bias else y


# ---- permutation of tokens to experts ------------------------------------------------------------------------------------


def _permute(x: Tensor, routing_map: Tensor, num_out_tokens: int = -1, **_: Any) -> tuple[Tensor, Tensor]:
    """x ``[tokens, hidden]``, routing_map bool ``[tokens, experts]``; expert by expert, each in the order of tokens."""
    expert, token = routing_map.bool().t().nonzero(as_tuple=True)
    return x.index_select(0, token), token


def _permute_with_probs(x: Tensor, probs: Tensor, routing_map: Tensor, num_out_tokens: int = -1, **_: Any):  # noqa: ANN202
    permuted, token = _permute(x, routing_map)
    return permuted, probs.t().masked_select(routing_map.bool().t()), token


def _unpermute(x: Tensor, row_id_map: Tensor, merging_probs: Tensor | None = None, restore_shape: Any = None, **_: Any) -> Tensor:
    assert merging_probs is None, "Megatron multiplies by the probabilities in the experts"
    return x.new_zeros(restore_shape).index_add(0, row_id_map, x)


def _sorted_chunks(x: Tensor, sizes: Tensor, order: Tensor) -> Tensor:
    parts = torch.split(x, sizes.tolist())
    return torch.cat([parts[i] for i in order.tolist()])
