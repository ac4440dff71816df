"""Block-FP8 linear and MoE layers in torch: stands in for the DeepGEMM, CUTLASS and Triton kernels of both."""

import torch
import torch.nn.functional as F

from sglang_cpu_shim import computes_here, dequantize_weight, quantize_activations


def install() -> None:
    """Plugin: put the arithmetic in place in this process, before a model is built."""
    if not computes_here():
        return
    from sglang.srt.layers.quantization import fp8

    # SGLang's CPU path repacks weights for AMX. The one for GPUs keeps Parameters with their loaders, which updates need.
    fp8._is_cpu = False
    fp8.dispatch_w8a8_block_fp8_linear = lambda *args, **kwargs: block_fp8_linear
    fp8.Fp8MoEMethod.apply = moe_apply


def block_fp8_linear(input, weight, block_size, weight_scale, input_scale=None, bias=None, **kwargs):
    """``input @ weight.T + bias``, rounding `input` per token and 128 features; the result has input's dtype."""
    x = quantize_activations(input.reshape(-1, input.shape[-1]), block_size[1])
    out = F.linear(x, dequantize_weight(weight, weight_scale, block_size)).to(input.dtype)
    if bias is not None:
        out = out + bias
    return out.reshape(*input.shape[:-1], weight.shape[0])


def moe_apply(self, layer, dispatch_output):
    """`Fp8MoEMethod.apply`: SwiGLU experts one after the other, their outputs weighted by the router and summed.

    Activations enter both matrix products rounded to E4M3 and leave them in the model's dtype, as in the fused kernels.
    """
    from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput

    x, (weights, experts, *_) = dispatch_output.hidden_states, dispatch_output.topk_output  # [tokens, hidden], 2 x [tokens, topk]
    block = self.quant_config.weight_block_size
    rounded = quantize_activations(x, block[1])
    out = torch.zeros_like(x, dtype=torch.float32)
    for expert in experts.unique().tolist():
        if expert < 0:  # padding, or an expert on another rank
            continue
        rows, slots = (experts == expert).nonzero(as_tuple=True)
        hidden = rounded[rows] @ dequantize_weight(layer.w13_weight[expert], layer.w13_weight_scale_inv[expert], block).t()
        gate, up = hidden.to(x.dtype).float().chunk(2, -1)
        activated = quantize_activations((F.silu(gate) * up).to(x.dtype), block[1])
        down = activated @ dequantize_weight(layer.w2_weight[expert], layer.w2_weight_scale_inv[expert], block).t()
        out.index_add_(0, rows, down.to(x.dtype).float() * weights[rows, slots, None].float())
    scale = self.moe_runner_config.routed_scaling_factor
    return StandardCombineInput(hidden_states=(out * (1.0 if scale is None else scale)).to(x.dtype))
