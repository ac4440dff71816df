"""An FP8-E4M3 KV cache for the torch_native attention backend, which by itself ignores k_scale and v_scale.

K and V are stored divided by their layer's scale and read back times it, so that attention sees what the CUDA backends see.
"""

import torch

from sglang_cpu_shim import computes_here


def install() -> None:
    """Plugin: let the CPU server have an FP8 cache, and the attention backend read it with scales."""
    if not computes_here():
        return
    import sglang.srt.mem_cache.kv_cache_configurator as configurator
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    # The configurator allows an FP8 cache on CPUs for the AMX backend only; it is told what it wants to hear.
    configurator.cpu_has_amx_support = lambda: True
    configurator.attention_backends = lambda: ["intel_amx"]
    TorchNativeAttnBackend.forward_extend = with_scales(TorchNativeAttnBackend.forward_extend)
    TorchNativeAttnBackend.forward_decode = with_scales(TorchNativeAttnBackend.forward_decode)


def with_scales(forward):
    """`forward` of the backend, seeing a `ScaledPool` for the time of the call if the cache is FP8."""

    def wrapped(self, q, k, v, layer, *args, **kwargs):
        pool = self.token_to_kv_pool
        if getattr(pool, "dtype", None) != torch.float8_e4m3fn:
            return forward(self, q, k, v, layer, *args, **kwargs)
        self.token_to_kv_pool = ScaledPool(pool, layer, q.dtype)
        try:
            return forward(self, q, k, v, layer, *args, **kwargs)
        finally:
            self.token_to_kv_pool = pool

    return wrapped


class ScaledPool:
    """One layer's view of the KV pool: FP8 with scales inside, `dtype` outside."""

    def __init__(self, pool, layer, dtype: torch.dtype):
        self.pool, self.layer, self.dtype = pool, layer, dtype

    def set_kv_buffer(self, layer, loc, k, v, *args):
        return self.pool.set_kv_buffer(layer, loc, k, v, self.layer.k_scale_float, self.layer.v_scale_float)

    def get_key_buffer(self, layer_id):
        return ScaledBuffer(self.pool.get_key_buffer(layer_id), self.layer.k_scale_float or 1.0, self.dtype)

    def get_value_buffer(self, layer_id):
        return ScaledBuffer(self.pool.get_value_buffer(layer_id), self.layer.v_scale_float or 1.0, self.dtype)


class ScaledBuffer:
    """``[tokens, heads, head_dim]`` of the pool, dequantised when the backend takes a request's tokens from it.

    The pool has room for the model's whole context times the requests that may run: 524,288 tokens for SmolLM2. Dequantising all of it in
    every layer took tens of seconds per decoding step.
    """

    def __init__(self, stored: torch.Tensor, scale: float, dtype: torch.dtype):
        self.stored, self.scale, self.dtype = stored, scale, dtype

    def __getitem__(self, tokens: torch.Tensor) -> torch.Tensor:
        return (self.stored[tokens].float() * self.scale).to(self.dtype)
