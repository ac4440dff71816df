"""Qwen3.5's layers on a CPU: stands in for the AMX kernels of the gated delta rule, its convolution, its norms and gates.

SGLang keeps two states for each request: the inputs that the convolution still sees, and one matrix per value head. Pools hold them by
slot, ``conv_states [slots, channels, width - 1]`` and ``states [slots, value heads, value dim, key dim]``, and are written in place.
Everything is computed in float32 and rounded to the dtype of the inputs.
"""

import torch
import torch.nn.functional as F
from torch import library

from sglang_cpu_shim import computes_here

OPERATORS = library.Library("sgl_kernel", "FRAGMENT")


def install() -> None:
    """Plugin: let the norm after the rule call our operator instead of a Triton kernel."""
    if not computes_here():
        return
    import sglang.kernels.ops.attention.fla.layernorm_gated as layernorm_gated

    layernorm_gated._use_cpu = True


def operator(signature):
    """Register a function as the operator ``sgl_kernel::<its name><signature>``. SGLang looks it up when its modules are imported."""

    def register(function):
        OPERATORS.define(function.__name__ + signature)
        OPERATORS.impl(function.__name__, function, "CPU")
        return function

    return register


# ---- the convolution ----------------------------------------------------------------------------------------------------------


def convolve(x, weight, bias, activation, state):
    """One request: `x` ``[channels, tokens]`` after the inputs in `state`, which then holds the last ones. Returns x's shape."""
    seen = torch.cat([state.to(x.dtype), x], 1)
    out = F.conv1d(seen.float()[None], weight.float()[:, None], None if bias is None else bias.float(), groups=len(x))[0]
    state.copy_(seen[:, x.shape[1] :])
    return (F.silu(out) if activation in ("silu", "swish") else out).to(x.dtype)


def causal_conv1d_fn_cpu(
    x, weight, bias, *, conv_states, query_start_loc, cache_indices, has_initial_state, activation=None, seq_lens_cpu=None
):
    """Prefill of several requests. x: ``[channels, tokens]``, cut at `query_start_loc`. A request that begins has a state of zeros."""
    out, cuts = torch.empty_like(x), query_start_loc.tolist()
    for start, end, slot, continues in zip(cuts, cuts[1:], cache_indices.tolist(), has_initial_state.tolist(), strict=False):
        state = conv_states[slot]
        if not continues:
            state.zero_()
        out[:, start:end] = convolve(x[:, start:end], weight, bias, activation, state)
    return out


def causal_conv1d_update_cpu(x, conv_states, weight, bias=None, activation=None, *, conv_state_indices):
    """One token of each request. x: ``[requests, channels]``."""
    rows = [
        convolve(row[:, None], weight, bias, activation, conv_states[slot])[:, 0]
        for row, slot in zip(x, conv_state_indices.tolist(), strict=True)
    ]
    return torch.stack(rows)


# ---- the rule -----------------------------------------------------------------------------------------------------------------


def delta_rule(q, k, v, g, beta, state):
    """One request, token by token. q, k: ``[tokens, key heads, key dim]``; v: ``[tokens, value heads, value dim]``; g (the logarithm of
    the decay) and beta: ``[tokens, value heads]``; state: ``[value heads, value dim, key dim]``, changed in place. Returns v's shape."""
    repeats = v.shape[1] // k.shape[1]
    q, k = (F.normalize(t.float(), dim=-1, eps=1e-6).repeat_interleave(repeats, 1) for t in (q, k))
    q, decay, now, out = q * q.shape[-1] ** -0.5, g.float().exp(), state.float(), []
    for token in range(len(v)):
        now = now * decay[token, :, None, None]
        error = (v[token].float() - torch.einsum("hvk,hk->hv", now, k[token])) * beta[token].float()[:, None]
        now = now + error[:, :, None] * k[token][:, None, :]
        out.append(torch.einsum("hvk,hk->hv", now, q[token]))
    state.copy_(now)
    return torch.stack(out).to(v.dtype)


def chunk_gated_delta_rule_cpu(
    q, k, v, g, beta, initial_state, cu_seqlens, initial_state_indices, head_first=False, use_qk_l2norm_in_kernel=True
):
    """Prefill of several requests. q, k, v, g, beta: as in `delta_rule` after a dimension of 1, cut at `cu_seqlens`.

    Returns v's shape, and None for two things that SGLang's CPU path does not use."""
    assert use_qk_l2norm_in_kernel and not head_first
    out, cuts = torch.empty_like(v), cu_seqlens.tolist()
    for start, end, slot in zip(cuts, cuts[1:], initial_state_indices.tolist(), strict=False):
        if end > start:
            part = slice(start, end)
            out[0, part] = delta_rule(q[0, part], k[0, part], v[0, part], g[0, part], beta[0, part], initial_state[slot])
    return out, None, None


@operator("(Tensor A_log, Tensor a, Tensor b, Tensor dt_bias) -> (Tensor, Tensor)")
def fused_gdn_gating_cpu(A_log, a, b, dt_bias):
    """g and beta ``[1, tokens, value heads]`` of `a` and `b` ``[tokens, value heads]``; g in float32."""
    g = -A_log.float().exp() * F.softplus(a.float() + dt_bias.float())
    return g[None], b.float().sigmoid().to(b.dtype)[None]


@operator(
    "(Tensor A_log, Tensor dt_bias, Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor(a!) initial_state_source, "
    "Tensor initial_state_indices, Tensor cu_seqlens, bool use_qk_l2norm_in_kernel, float softplus_beta, float softplus_threshold) "
    "-> Tensor"
)
def fused_sigmoid_gating_delta_rule_update_cpu(
    A_log,
    dt_bias,
    q,
    k,
    v,
    a,
    b,
    initial_state_source,
    initial_state_indices,
    cu_seqlens,
    use_qk_l2norm_in_kernel,
    softplus_beta,
    softplus_threshold,
):
    """Decoding: one token of each request, with the gates."""
    assert (softplus_beta, softplus_threshold) == (1.0, 20.0)  # torch's own
    g, beta = fused_gdn_gating_cpu(A_log, a, b, dt_bias)
    return chunk_gated_delta_rule_cpu(q, k, v, g, beta, initial_state_source, cu_seqlens, initial_state_indices)[0]


# ---- around the rule and around attention -------------------------------------------------------------------------------------


@operator("(Tensor qkvz, Tensor ba, int num_k_heads, int num_v_heads, int head_k_dim, int head_v_dim) -> (Tensor, Tensor, Tensor, Tensor)")
def fused_qkvzba_split_reshape_cat_contiguous_cpu(qkvz, ba, num_k_heads, num_v_heads, head_k_dim, head_v_dim):
    """[q k v], z ``[tokens, value heads, value dim]``, b and a of the two input projections."""
    values = num_v_heads * head_v_dim
    qkv, z = qkvz.split([2 * num_k_heads * head_k_dim + values, values], -1)
    b, a = ba.chunk(2, -1)
    return qkv.clone(), z.reshape(-1, num_v_heads, head_v_dim).clone(), b.clone(), a.clone()


def normed(x, weight, eps):
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


@operator("(Tensor x, Tensor weight, Tensor z, float eps) -> Tensor")
def fused_rmsnorm_gated_cpu(x, weight, z, eps):
    """The norm after the rule, times silu(z)."""
    return (normed(x, weight.float(), eps) * F.silu(z.float())).to(x.dtype)


@operator("(Tensor q_gate, Tensor k, Tensor q_weight, Tensor k_weight, float eps, int head_dim, int num_heads) -> (Tensor, Tensor, Tensor)")
def fused_qk_gemma_rmsnorm_with_gate_cpu(q_gate, k, q_weight, k_weight, eps, head_dim, num_heads):
    """q and k of attention with their norms, whose weights are zero-centred, and the gate, which stands beside q in every head."""
    q, gate = q_gate.unflatten(-1, (num_heads, 2, head_dim)).unbind(-2)
    keys = k.unflatten(-1, (-1, head_dim))
    q, keys = (normed(t, 1 + w.float(), eps).to(k.dtype).flatten(-2) for t, w in ((q, q_weight), (keys, k_weight)))
    return q, keys, gate.flatten(-2).clone()


@operator("(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps, int head_dim) -> (Tensor, Tensor)")
def fused_qk_gemma_rmsnorm_cpu(q, k, q_weight, k_weight, eps, head_dim):
    """The same without a gate."""
    q, k = (normed(t.reshape(-1, head_dim), 1 + w.float(), eps).to(t.dtype) for t, w in ((q, q_weight), (k, k_weight)))
    return q, k


@operator("(Tensor(a!) x, Tensor gate) -> ()")
def fused_sigmoid_mul_cpu(x, gate):
    """x times sigmoid(gate), in place."""
    x.copy_((x.float() * gate.float().reshape(x.shape).sigmoid()).to(x.dtype))
