"""The shapes that the model is given its microbatches in. No torch here: `ais-megatron plan` counts with them too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ais_megatron.batch import Batch

CUDA_COLUMNS = 128


@dataclass(frozen=True)
class Shapes:
    """The (rows, columns) that the model may be given.

    On Hopper Transformer Engine prefers cuDNN's fused attention, which builds a graph for every exact shape it meets: it must meet
    few. A CPU has nothing to gain from that, and is given every microbatch as it is.

    columns: rounded up to a multiple of this. (Rotary embeddings are computed for any length, so nothing is too long by that.)
    few_row_counts: rows are 1, 2, 3, 4, 6, 8, 12, …: powers of two and three times powers of two.
    """

    columns: int = 1
    few_row_counts: bool = False

    @staticmethod
    def on(device: str, multiple: int) -> Shapes:
        """Of a device of that type, "cpu" or "cuda". multiple: what columns are a multiple of anyway, for sequence parallelism."""
        return Shapes(math.lcm(CUDA_COLUMNS, multiple), few_row_counts=True) if device == "cuda" else AS_IS

    def width(self, longest: int) -> int:
        """Columns of a microbatch whose longest row has so many tokens."""
        return longest + -longest % self.columns

    def most_rows(self, count: int) -> int:
        """The largest number of rows up to `count`, at least 1."""
        count = max(count, 1)
        return count if not self.few_row_counts else max(n for n in _near_powers(count) if n <= count)

    def rows(self, count: int) -> int:
        """The smallest number of rows from `count` on, at least 1."""
        count = max(count, 1)
        return count if not self.few_row_counts else min(n for n in _near_powers(count) if n >= count)

    def fill(self, rows: Batch) -> Batch:
        """What the model is given: `rows` with columns of padding, and below them idle rows, which have no real token."""
        batch, columns = rows.tokens.shape
        return rows.pad_columns(self.width(columns)).pad_rows(self.rows(batch) - batch)


AS_IS = Shapes()


def _near_powers(count: int) -> tuple[int, ...]:
    """The powers of two around `count`, and what lies half-way between them."""
    power = 1 << (count.bit_length() - 1)
    return (power, 2 * power) if power == 1 else (power, power + power // 2, 2 * power)
