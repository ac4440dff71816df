"""Log-probabilities and entropy from vocabulary-parallel logits, at the sampling temperature.

    log p(y) = z_y - log sum_v exp z_v,   H = log sum_v exp z_v - sum_v p_v z_v,   z = logits / temperature

Each tensor-parallel rank has logits ``[tokens, vocab/tp]`` and reduces its own columns to four numbers per token. One all-gather of
``[4, tokens]`` joins them, so logits are never communicated. A sketch of the scores, see `algorithm.gradients`, adds a few numbers per
token to it. Both passes use float32 for only one chunk of tokens at a time. Only the
logits themselves are saved for the backward pass. Columns that pad the vocabulary are left out.

On a CPU a chunk is so small that it stays in the cache of a core, because both passes read it several times and compute little.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ais_megatron.shapes import logprob_chunk


class TokenLogprobs(NamedTuple):
    """Of each target, equal on all ranks of the group."""

    logprobs: Tensor
    """float32 ``[...]``, differentiable."""
    entropy: Tensor
    """float32 ``[...]``, of the distribution, differentiable if asked for."""
    scores: Tensor
    """float32 ``[..., a]``, signs^T (e_y - p), without grad; a = 0 without `signs`."""


def vocab_parallel_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 2048,
    entropy_gradient: bool = True,
    signs: Tensor | None = None,
) -> TokenLogprobs:
    """Log-probability of each target, and entropy of each distribution, in nats.

    Args:
        logits: ``[..., vocab/tp]`` in any float dtype, this rank's columns of the padded vocabulary.
        targets: int64 ``[...]``, token ids in [0, vocab_size).
        vocab_size: size of the vocabulary without padding.
        group: the tensor-parallel group; None for a single rank.
        chunk_tokens: most tokens of a chunk. On a CPU it is smaller, see `logprob_chunk`.
        entropy_gradient: whether the entropy is differentiable too.
        signs: float32 ``[vocab_size, a]``, the columns on which scores are projected; None for no scores.
    """
    shard = logits.shape[-1]
    offset = (dist.get_rank(group) if group is not None else 0) * shard
    flat = logits.reshape(-1, shard)
    chunk_tokens = logprob_chunk(chunk_tokens, shard, flat.device.type)
    num_valid = min(shard, max(0, vocab_size - offset))
    signs = flat.new_zeros(vocab_size, 0, dtype=torch.float32) if signs is None else signs
    logprobs, entropy, scores = _VocabParallelLogprobs.apply(
        flat, targets.reshape(-1), offset, num_valid, temperature, group, chunk_tokens, entropy_gradient, signs
    )
    return TokenLogprobs(logprobs.view(targets.shape), entropy.view(targets.shape), scores.view(*targets.shape, signs.shape[1]))


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        offset: int,
        num_valid: int,
        temperature: float,
        group: dist.ProcessGroup | None,
        chunk_tokens: int,
        entropy_gradient: bool,
        signs: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # Rows: max, sum exp(z - max), sum z exp(z - max), z of the target (0 if another rank has it), sum signs exp(z - max).
        local = torch.zeros(4 + signs.shape[1], logits.shape[0], dtype=torch.float32, device=logits.device)
        own_signs = signs[offset : offset + num_valid]
        local_targets = targets - offset
        owned = (local_targets >= 0) & (local_targets < num_valid)
        local_targets = local_targets.clamp(0, max(num_valid - 1, 0))
        if num_valid == 0:
            local[0] = -float("inf")
        for rows in _chunks(logits.shape[0], chunk_tokens) if num_valid else ():
            z = _scaled(logits[rows, :num_valid], temperature)
            largest = z.amax(-1)
            exp = (z - largest[:, None]).exp_()
            local[0, rows], local[1, rows] = largest, exp.sum(-1)
            local[2, rows] = torch.linalg.vecdot(exp, z)
            local[3, rows] = z.gather(1, local_targets[rows, None]).squeeze(1) * owned[rows]
            if signs.shape[1]:
                local[4:, rows] = (exp @ own_signs).t()
        log_sum, mean_z, target_z, mean_signs = _join(local, group)
        entropy = log_sum - mean_z
        ctx.save_for_backward(logits, local_targets, owned, log_sum, entropy)
        ctx.constants = num_valid, temperature, chunk_tokens, entropy_gradient
        scores = signs[targets] - mean_signs.t()
        ctx.mark_non_differentiable(scores, *([] if entropy_gradient else [entropy]))
        return target_z - log_sum, entropy, scores

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_logprobs, grad_entropy, _ = grads
        logits, local_targets, owned, log_sum, entropy = ctx.saved_tensors
        num_valid, temperature, chunk_tokens, entropy_gradient = ctx.constants
        grad = torch.zeros_like(logits) if num_valid < logits.shape[1] else torch.empty_like(logits)
        for rows in _chunks(logits.shape[0], chunk_tokens):
            # dlogp_y/dz = 1[y] - p,  dH/dz = -p (log p + H),  dz/dlogits = 1 / temperature
            g = grad_logprobs[rows, None] / temperature
            logp = _scaled(logits[rows, :num_valid], temperature) - log_sum[rows, None]
            if entropy_gradient:
                p = logp.exp()
                slope = logp.add_(entropy[rows, None]).mul_(grad_entropy[rows, None] / temperature).add_(g)
                dz = p.mul_(slope).neg_()
            else:
                dz = logp.exp_().mul_(-g)
            dz.scatter_add_(1, local_targets[rows, None], g * owned[rows, None])
            grad[rows, :num_valid] = dz
        return grad, *[None] * 8


def _chunks(num_tokens: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """One chunk in float32, divided by the temperature. It may share memory with `logits`, so it must not be changed."""
    return logits.float() if temperature == 1.0 else logits.float() / temperature


def _join(local: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log sum exp z, E[z], z of the target, E[signs] ``[a, tokens]``) over the whole vocabulary, from the rows of each rank."""
    if group is None or dist.get_world_size(group) == 1:
        parts = local[None]
    else:
        gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, local, group=group)
        parts = torch.stack(gathered)
    largest = parts[:, 0].amax(0)
    shares = (parts[:, 0] - largest).exp()
    total = (parts[:, 1] * shares).sum(0)
    mean_z = (parts[:, 2] * shares).sum(0) / total
    mean_signs = (parts[:, 4:] * shares[:, None]).sum(0) / total
    return largest + total.log(), mean_z, parts[:, 3].sum(0), mean_signs
