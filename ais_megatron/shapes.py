"""The shapes of the microbatches that the model gets. No torch here, because `ais-megatron plan` uses them too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ais_megatron.batch import Batch

CUDA_COLUMNS = 128
CPU_CHUNK_BYTES = 1 << 20  # float32 logits that a CPU works on at a time, so that they stay in the cache of a core


def logprob_chunk(wanted: int, vocabulary: int, device: str) -> int:
    """Number of tokens whose log-probabilities are computed at a time.

    wanted: `train.logprob_chunk_tokens`. vocabulary: columns of the logits on this rank. device: "cpu" or "cuda"."""
    return wanted if device == "cuda" else min(wanted, max(1, CPU_CHUNK_BYTES // (4 * vocabulary)))


@dataclass(frozen=True)
class Shapes:
    """The allowed numbers of rows and columns of a microbatch.

    On Hopper Transformer Engine prefers cuDNN's fused attention. It builds a graph for every exact shape, so there should be few shapes. A
    CPU would not gain from this, so there microbatches keep their shape.
    """

    columns: int = 1
    """The number of columns is padded to a multiple of this. (Rotary embeddings work for any length, so padding never makes a row too
    long.)"""
    few_row_counts: bool = False
    """The number of rows is 1, 2, 3, 4, 6, 8, 12, …: powers of two, and three times powers of two."""

    @staticmethod
    def on(device: str, multiple: int, ranks: int = 1) -> Shapes:
        """The shapes for a type of device, "cpu" or "cuda".

        multiple: the number of columns must be a multiple of this in any case, for sequence parallelism.
        ranks: how many ranks share the columns."""
        return Shapes(math.lcm(CUDA_COLUMNS * ranks, multiple), few_row_counts=True) if device == "cuda" else AS_IS

    def width(self, longest: int) -> int:
        """The columns of a microbatch whose longest row has `longest` tokens."""
        return longest + -longest % self.columns

    def most_rows(self, count: int) -> int:
        """The largest allowed number of rows up to `count`, at least 1."""
        count = max(count, 1)
        return count if not self.few_row_counts else max(n for n in _near_powers(count) if n <= count)

    def rows(self, count: int) -> int:
        """The smallest allowed number of rows from `count` on, at least 1."""
        count = max(count, 1)
        return count if not self.few_row_counts else min(n for n in _near_powers(count) if n >= count)

    def fill(self, rows: Batch) -> Batch:
        """`rows` padded to an allowed shape, with columns of padding, and rows of padding that have no real token."""
        batch, columns = rows.tokens.shape
        return rows.pad_columns(self.width(columns)).pad_rows(self.rows(batch) - batch)


AS_IS = Shapes()


def _near_powers(count: int) -> tuple[int, ...]:
    """The powers of two around `count`, and the numbers half-way between them."""
    power = 1 << (count.bit_length() - 1)
    return (power, 2 * power) if power == 1 else (power, power + power // 2, 2 * power)
