"""Where a rank stands when many meet: in which block, and whether as its first. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import Self

import torch

ONE_BLOCK = 32  # ranks up to which all meet in one block


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A rank's place. Blocks are counted from the root on, which is the first of the first one.

    Attributes:
        size: how many ranks there are.
        root: which is the root.
        block: the ranks of this one's block, in order; this one is among them.
        firsts: the first ranks of all blocks, in order.
        is_first: whether this rank is one of them.
        block_size: how many ranks a block has; the last one may have fewer.
    """

    size: int
    root: int
    block: list[int]
    firsts: list[int]
    is_first: bool
    block_size: int

    @classmethod
    def of(cls, rank: int, size: int, root: int) -> Self:
        """Find it."""
        block_size = size if size <= ONE_BLOCK else isqrt(size - 1) + 1
        position = (rank - root) % size
        start = position - position % block_size
        return cls(
            size=size,
            root=root,
            block=[(root + each) % size for each in range(start, min(start + block_size, size))],
            firsts=[(root + each) % size for each in range(0, size, block_size)],
            is_first=position == start,
            block_size=block_size,
        )

    def by_rank(self, table: torch.Tensor) -> torch.Tensor:
        """Return rows by rank, of rows in the order of the blocks: [size, ...] of [blocks * block_size, ...]."""
        return table[: self.size].roll(self.root, 0)

    def by_position(self, table: torch.Tensor) -> torch.Tensor:
        """Return rows in the order of the blocks, of rows by rank: the other way round."""
        rows = torch.zeros(len(self.firsts) * self.block_size, *table.shape[1:], dtype=table.dtype)
        rows[: self.size] = table.roll(-self.root, 0)
        return rows
