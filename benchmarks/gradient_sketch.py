"""Sketches of gradients, from which inner products follow: 4 MB for a gradient of any size.

All parameters are cut into pieces of at most `size` numbers. Every number gets a fixed random sign, every piece is rotated by a fixed
random distance, and the pieces are added up. Products of different parameters cancel on average, so for two gradients x and y

    E <sketch x, sketch y> = <x, y>,      with variance at most (|x|^2 |y|^2 + <x, y>^2) / size

The variance is that of a count sketch (arXiv 0902.2206), because two numbers meet with probability 1 / size, and never if they lie in the
same piece. Unlike a count sketch it needs no index of a bucket per parameter, only additions of long rows. If all parameters fit, every
one has a place of its own, and products are exact.

A sketch is linear. So the products of sums and differences of gradients are those of sums and differences of their sketches: averaging over
batches lowers the error of a sketch together with the noise that it is relative to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PRODUCT_CHUNK = 2**14  # columns whose products are summed in float32 before they are added up in float64


class Sketcher:
    """Sketches gradients of one model.

    Args:
        sizes: number of elements of each parameter.
        size: of a sketch. It is smaller if there are fewer parameters.
        seed: of signs and rotations.
    """

    def __init__(self, sizes: Sequence[int], size: int, seed: int = 0) -> None:
        self.sizes, self.is_exact, self.size = list(sizes), sum(sizes) <= size, min(size, sum(sizes))
        generator = torch.Generator().manual_seed(seed)
        self._signs: list[Tensor] = []
        self._starts: list[list[int]] = []
        """For each parameter, where in the sketch each of its pieces begins."""
        if self.is_exact:
            self._starts = [[sum(self.sizes[:number])] for number in range(len(self.sizes))]
            return
        for count in self.sizes:
            self._signs.append(torch.randint(0, 2, (count,), generator=generator, dtype=torch.int8).mul_(2).sub_(1))
            self._starts.append(torch.randint(0, self.size, (-(-count // self.size),), generator=generator).tolist())

    def __call__(self, gradients: Iterable[Tensor]) -> Tensor:
        """float32 ``[size]`` on the CPU. gradients: of every parameter, in the order of `sizes`, in any shape. One is read at a time."""
        sketch = torch.zeros(self.size)
        for number, gradient in enumerate(gradients):
            flat = gradient.detach().reshape(-1)
            for piece, start in enumerate(self._starts[number]):
                part = slice(piece * self.size, (piece + 1) * self.size)
                values = flat[part].float().cpu()
                if not self.is_exact:
                    values = values * self._signs[number][part]
                before_the_end = min(len(values), self.size - start)
                sketch[start : start + before_the_end] += values[:before_the_end]
                sketch[: len(values) - before_the_end] += values[before_the_end:]
        return sketch


def products(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of the rows of x ``[n, size]`` and y ``[m, size]``, float64 ``[n, m]``."""
    result = torch.zeros(len(x), len(y), dtype=torch.float64)
    for a, b in zip(x.split(PRODUCT_CHUNK, 1), y.split(PRODUCT_CHUNK, 1), strict=True):
        result += (a @ b.T).double()
    return result


class GramMatrix:
    """Keeps the sketches of `batches` times `vectors` gradients, and all their inner products."""

    def __init__(self, batches: int, vectors: int, size: int) -> None:
        self._sketches = torch.empty(batches, vectors, size)
        self._products = torch.zeros(batches, vectors, batches, vectors, dtype=torch.float64)
        self._count = 0

    def add(self, sketches: Tensor) -> None:
        """The next batch's sketches, ``[vectors, size]``."""
        new = self._count
        self._sketches[new] = sketches
        self._count += 1
        block = products(sketches, self._sketches[: self._count].flatten(0, 1)).unflatten(1, (self._count, -1))
        self._products[new, :, : self._count] = block
        self._products[: self._count, :, new] = block.permute(1, 2, 0)

    @property
    def values(self) -> Tensor:
        """float64 ``[batches, vectors, batches, vectors]`` of the batches so far."""
        return self._products[: self._count, :, : self._count].clone()
