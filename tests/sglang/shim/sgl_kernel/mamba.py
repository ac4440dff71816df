"""The kernels of `sgl_kernel.mamba` that SGLang calls on a CPU: the convolution and the gated delta rule of Qwen3.5, in torch."""

from sglang_cpu_shim.gated_delta_net import causal_conv1d_fn_cpu, causal_conv1d_update_cpu, chunk_gated_delta_rule_cpu

__all__ = ["causal_conv1d_fn_cpu", "causal_conv1d_update_cpu", "chunk_gated_delta_rule_cpu"]
