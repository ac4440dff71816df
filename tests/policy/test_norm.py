"""The chunked norm against torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ais_megatron.policy import norm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_values", [1, 40, 1 << 17])  # a token at a time, a last chunk that is shorter, and all at once
def test_chunks_do_not_change_the_norm_or_its_gradients(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk_values: int) -> None:
    monkeypatch.setattr(norm, "CHUNK_VALUES", chunk_values)
    generator = torch.Generator().manual_seed(0)
    # Heads of a larger tensor, as Q and K are, so that the input is not contiguous.
    x = torch.randn(7, 1, 3, 16, generator=generator).to(dtype)[..., :8].requires_grad_()
    weight = (1 + 0.1 * torch.randn(8, generator=generator)).to(dtype).requires_grad_()
    upstream = torch.randn(x.shape, generator=generator).to(dtype)
    results = norm.chunked_rms_norm(x, weight, 1e-6), F.rms_norm(x, weight.shape, weight, 1e-6)
    assert torch.equal(*results)
    ours, theirs = (torch.autograd.grad(result, (x, weight), upstream) for result in results)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference)
