"""FP8 on a CPU for SGLang, as plugins: linear and MoE layers, the KV cache, and the buffer of routed experts.

SGLang's FP8 paths call CUDA kernels, or AMX ones on CPUs that have it. What is replaced here is only that arithmetic, in plain
torch: parameters, loaders, update endpoints and memory pools stay SGLang's own, so tests exercise those.
"""

import multiprocessing

import torch

E4M3_MAX = 448.0


def is_plain_cpu() -> bool:
    """Whether this server runs on the CPU engine without AMX kernels: elsewhere the shim keeps its hands off."""
    from sglang.srt.utils import is_cpu
    from sglang.srt.utils.common import cpu_has_amx_support

    return is_cpu() and not cpu_has_amx_support()


def computes_here() -> bool:
    """Whether this process holds a model on a plain CPU. A server's first process starts those that do."""
    return is_plain_cpu() and multiprocessing.parent_process() is not None


def quantize_activations(x: torch.Tensor, group: int) -> torch.Tensor:
    """Round `x` ``[tokens, features]`` to E4M3 with one scale per token and `group` features; returns it dequantised, float32.

    Stands in for `per_token_group_quant_fp8`.
    """
    tokens, features = x.shape
    groups = x.float().reshape(tokens, -1, group)
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / E4M3_MAX
    rounded = (groups / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (rounded.float() * scale).reshape(tokens, features)


def dequantize_weight(weight: torch.Tensor, scale: torch.Tensor, block: list[int]) -> torch.Tensor:
    """`weight` E4M3 ``[N, K]`` times `scale` ``[ceil(N/block), ceil(K/block)]``; float32."""
    rows, columns = weight.shape
    scale = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * scale
