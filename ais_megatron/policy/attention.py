"""Attention of the policy outside Transformer Engine: torch chooses the kernel, and the scores are not stored."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from ais_megatron.policy.packing import Packed


class SDPAttention(nn.Module):
    """Attention over ``[seq, batch, heads/tp, head_dim]`` through torch's scaled_dot_product_attention.

    It is causal, unless its layer was built with `AttnMaskType.padding`. Rows are padded on the right, so with the causal mask no real
    token attends to padding. Otherwise `attention_mask`, bool ``[batch, 1, 1, seq]``, says where padding is. With `packed_seq_params` there
    is one sequence, and attention is within the rows that are packed in it.
    """

    def __init__(self, config: TransformerConfig, layer_number: int, softmax_scale: float | None = None, **_: object) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale  # None: 1 / sqrt(head_dim)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        packed_seq_params: Packed | None = None,
        **_: object,
    ) -> Tensor:
        """Returns ``[seq, batch, heads/tp * head_dim]``."""
        # torch's CPU kernel computes in float32 anyway, and its backward pass is up to 4 times faster with float32 inputs.
        kernel_dtype = torch.float32 if query.device.type == "cpu" else query.dtype
        q, k, v = (x.to(kernel_dtype) for x in (query, key, value))
        if packed_seq_params is not None:
            return packed_seq_params.attend(self._attend, q[:, 0], k[:, 0], v[:, 0]).to(query.dtype)[:, None]
        mask = None
        if attn_mask_type == AttnMaskType.padding:
            assert attention_mask is not None
            mask = torch.zeros(attention_mask.shape, device=query.device).masked_fill_(attention_mask, -torch.inf)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        context = self._attend(q, k, v, mask)
        return context.to(query.dtype).permute(2, 0, 1, 3).flatten(2)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """``[batch, heads, seq, head_dim]`` each; without a mask it is causal."""
        mask = None if mask is None else mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale, enable_gqa=True)
