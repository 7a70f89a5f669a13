"""What lies behind the tensors in a data file: frozen values, and the table of checksums."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from .._format.alignment import ALIGNMENT, BLOCK, round_up
from .._format.item_tables import CRC_NBYTES, pack_table
from .._state.capture import Capture
from .manifest import ByteRange
from .plan_cache import CachedPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Tail:
    """What lies behind the tensors in a data file: frozen values, and the table of all items' CRC32s.

    Attributes:
        data: the values, each complete with its checksums.
        crcs: of each of them.
        items: of the file, tensors and values.
    """

    data: bytes
    crcs: Sequence[int]
    items: int

    @property
    def nbytes(self) -> int:
        """Of whole blocks: 0 if there is no item."""
        return round_up(len(self.data) + CRC_NBYTES * self.items, BLOCK)

    def render(self, crcs: Sequence[int]) -> tuple[bytes, int]:
        """Return its bytes, given the CRC32s of the tensors, and the CRC32 of the table, which is at their end."""
        table = pack_table([*crcs, *self.crcs])
        return self.data.ljust(self.nbytes - len(table), b"\0") + table, zlib.crc32(table)


def lay_tail(cached: CachedPlan, captured: Capture) -> tuple[Tail, list[ByteRange]]:
    """Join the frozen values; return them, and where in the file each lies."""
    pieces: list[bytes] = []
    crcs: list[int] = []
    items: list[ByteRange] = []
    start = cached.layout.tail - cached.layout.last_piece
    position = 0
    for index in cached.plan.frozen:
        data = captured.frozen[index].archive()
        items.append(ByteRange(offset=start + position, nbytes=len(data)))
        crcs.append(zlib.crc32(data))
        filled = round_up(len(data), ALIGNMENT)
        pieces.append(data.ljust(filled, b"\0"))
        position += filled
    return Tail(data=b"".join(pieces), crcs=crcs, items=len(cached.layout.frames) + len(items)), items
