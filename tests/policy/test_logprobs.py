"""Vocabulary-parallel log-probabilities and entropy against plain log_softmax, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ais_megatron.policy.logprobs import vocab_parallel_logprobs
from tests.helpers.ranks import RankPool

VOCAB, TOKENS = 13, 10


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 5 * torch.randn(TOKENS, VOCAB, generator=generator, dtype=dtype), torch.randint(0, VOCAB, (TOKENS,), generator=generator)


def plain(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logp = (logits.float() / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(-1)


def with_gradients(logits: Tensor, function) -> list[Tensor]:
    """Values and the gradient of a mixture of both outputs."""
    leaf = logits.clone().requires_grad_()
    logprobs, entropy = function(leaf)
    weights = torch.linspace(-1, 1, TOKENS)
    ((logprobs * weights).sum() + (entropy * weights.square()).sum()).backward()
    return [logprobs.detach(), entropy.detach(), leaf.grad]


def sharded(rank: int, temperature: float, chunk: int) -> list[Tensor]:
    """On each rank: its columns of logits padded to 16, whose padding would win every softmax if it were counted."""
    import torch.distributed as dist

    world = dist.get_world_size()
    logits, targets = inputs()
    padded = torch.nn.functional.pad(logits, (0, 16 - VOCAB), value=99.0)
    mine = padded.chunk(world, dim=1)[rank].contiguous()

    def function(leaf: Tensor) -> tuple[Tensor, Tensor]:
        return vocab_parallel_logprobs(
            leaf, targets, vocab_size=VOCAB, temperature=temperature, group=dist.group.WORLD, chunk_tokens=chunk
        )[:2]

    return with_gradients(mine, function)


def test_no_tokens_at_all() -> None:
    """A microbatch without a scored token, with and without a sketch of its scores."""
    for columns in (0, 3):
        result = vocab_parallel_logprobs(
            torch.zeros(0, VOCAB), torch.zeros(0, dtype=torch.int64), vocab_size=VOCAB, signs=torch.ones(VOCAB, columns)
        )
        assert [tuple(x.shape) for x in result] == [(0,), (0,), (0, columns)]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(("temperature", "chunk"), [(1.0, 100), (0.7, 3), (1.5, 1)])
def test_equals_plain_softmax(ranks: RankPool, world: int, temperature: float, chunk: int) -> None:
    logits, targets = inputs()
    expected = with_gradients(logits, lambda leaf: plain(leaf, targets, temperature))
    results = ranks.run(world, sharded, temperature=temperature, chunk=chunk)
    for logprobs, entropy, _ in results:
        torch.testing.assert_close(logprobs, expected[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(entropy, expected[1], rtol=1e-4, atol=1e-5)
    gradient = torch.cat([gradient for _, _, gradient in results], dim=1)
    torch.testing.assert_close(gradient[:, :VOCAB], expected[2], rtol=1e-4, atol=1e-6)
    assert torch.equal(gradient[:, VOCAB:], torch.zeros(TOKENS, 16 - VOCAB, dtype=gradient.dtype)), "padding gets no gradient"


def test_float32_exists_for_one_chunk_only() -> None:
    """No float32 tensor of [tokens, vocab] is ever allocated: the largest has one chunk's rows."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.dtype in (torch.float32, torch.float64):
                largest = max(largest, out.numel())
            return out

    logits = torch.randn(512, 64, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 64, (512,))
    with Watch():
        logprobs, entropy, _ = vocab_parallel_logprobs(logits, targets, vocab_size=64, chunk_tokens=32)
        (logprobs.sum() + entropy.sum()).backward()
    assert logits.grad.dtype is torch.bfloat16
    assert largest <= 32 * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_without_the_gradient_of_the_entropy_the_rest_is_the_same(dtype: torch.dtype, temperature: float) -> None:
    logits, targets = inputs(dtype)
    original, results = logits.clone(), []
    for entropy_gradient in (True, False):
        leaf = logits.clone().requires_grad_()
        logprobs, entropy, _ = vocab_parallel_logprobs(
            leaf, targets, vocab_size=VOCAB, temperature=temperature, chunk_tokens=3, entropy_gradient=entropy_gradient
        )
        assert entropy.requires_grad == entropy_gradient
        (logprobs * torch.linspace(-1, 1, TOKENS)).sum().backward()
        assert torch.equal(leaf.detach(), original), "the logits themselves are never changed"
        results.append((logprobs.detach(), entropy.detach(), leaf.grad))
    for with_it, without in zip(*results, strict=True):
        assert torch.equal(with_it, without)
