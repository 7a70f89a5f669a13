"""From the caller's tensors into the arena, and each record's checksum into its frame.

The arena is the data file: every frame stands in it already, so staging is a copy to fixed places. All tensors of a
segment are one `torch._foreach_copy_`, which lets go of the GIL once for all of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Protocol

import torch

from ._arena import Arena
from ._devices import Crossing
from ._layout import BLOCK, NOT_COPIED, Layout, copyable, round_up
from ._mirror import SMALL_NBYTES, Mirror

CRC = struct.Struct("<I")


class Checksum(Protocol):
    """A CRC32, as zlib's: of some bytes, going on from that of the bytes before them."""

    def __call__(self, data: memoryview, value: int, /) -> int: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Copies:
    """How some records are staged and checksummed.

    Attributes:
        pick: takes their tensors out of the leaves of a state dict.
        targets: where in the arena each of them goes.
        odd: whether some of them can only be copied as bytes.
        payloads: the bytes of every record.
        heads, feet: where in the arena each record's checksum goes.
    """

    pick: Callable[[Sequence[Any]], tuple[torch.Tensor, ...]]
    targets: list[torch.Tensor]
    odd: bool
    payloads: list[memoryview]
    heads: list[int]
    feet: list[int]

    def sources(self, values: Sequence[Any]) -> tuple[torch.Tensor, ...]:
        picked = self.pick(values)
        return tuple(copyable(source) for source in picked) if self.odd else picked

    def checksum(self, memory: memoryview, crc32: Checksum) -> list[int]:
        """Compute the CRC32 of each record, and write it into the two places of its frame; return them."""
        crcs = []
        for payload, head, foot in zip(self.payloads, self.heads, self.feet, strict=True):
            crc = crc32(payload, 0)
            CRC.pack_into(memory, head, crc)
            CRC.pack_into(memory, foot, crc)
            crcs.append(crc)
        return crcs


def plan_copies(arena: Arena, layout: Layout, records: Sequence[int], leaves: Sequence[int], shift: int = 0) -> Copies:
    """Plan the copies of `records`, whose bytes lie in the arena `shift` bytes after their place in the file."""
    places: list[int] = []
    targets: list[torch.Tensor] = []
    payloads: list[memoryview] = []
    odd = False
    heads: list[int] = []
    feet: list[int] = []
    for record in records:
        frame, offset = layout.frames[record], layout.offsets[record] + shift
        start = offset + len(frame.head)
        stop = start + frame.nbytes
        payloads.append(arena.memory[start:stop])
        heads.append(offset + frame.head_crc)
        feet.append(stop + frame.foot_crc)
        places.append(leaves[record])
        targets.append(copyable(arena.tensor[start:stop].view(frame.dtype).view(frame.shape)))
        odd = odd or frame.dtype in NOT_COPIED
    return Copies(pick=picker(places), targets=targets, odd=odd, payloads=payloads, heads=heads, feet=feet)


def put_frames(memory: memoryview, layout: Layout, records: Sequence[int], shift: int = 0) -> None:
    """Write what is around the payloads of `records`, but for their checksums."""
    for record in records:
        frame, offset = layout.frames[record], layout.offsets[record] + shift
        start = offset + len(frame.head)
        memory[offset:start] = frame.head
        memory[start + frame.nbytes : offset + frame.item_nbytes] = frame.foot


class Stage:
    """An arena in which one layout's frames stand, and the copies that fill it.

    Attributes:
        arena: the memory.
        layout: what lies where in it.
    """

    def __init__(self, layout: Layout, leaves: Sequence[int], tail_nbytes: int) -> None:
        """Take memory for `layout`, with room for a tail of frozen values.

        Args:
            layout: the tensor records.
            leaves: of each record, which leaf of the state dict it comes from.
            tail_nbytes: room after the last segment, in bytes.

        Raises:
            StageError: there is not enough host memory.
        """
        self.layout = layout
        self.arena = Arena(stage_nbytes(layout, tail_nbytes))
        self.arena.populate()
        put_frames(self.arena.memory, layout, range(len(layout.frames)))
        self._copies = [
            plan_copies(self.arena, layout, range(segment.first, segment.stop_record), leaves)
            for segment in layout.segments
        ]
        self._mirror: tuple[torch.device, Mirror] | None = None
        self._mirrored: dict[int, list[torch.Tensor]] = {}  # by segment, where in the mirror its tensors are gathered

    def copy(self, number: int, values: Sequence[Any], crossing: Crossing) -> list[torch.Event]:
        """Copy segment `number` from the leaves of a state dict. Blocks; releases the GIL while bytes move.

        Returns:
            What to wait for, if bytes come from a device.
        """
        copies = self._copies[number]
        sources = copies.sources(values)
        places = self._places(number, crossing) if crossing and self._is_small(number) else []
        if not places or self._mirror is None or self._mirror[1].memory is None:
            return crossing.copy(copies.targets, sources)
        return crossing.copy_through(self._mirror[1].memory, places, self._stretch(number), copies.targets, sources)

    def _is_small(self, number: int) -> bool:
        segment = self.layout.segments[number]
        return segment.stop - segment.start < SMALL_NBYTES * (segment.stop_record - segment.first)

    def _stretch(self, number: int) -> torch.Tensor:
        segment = self.layout.segments[number]
        return self.arena.tensor[segment.start : segment.stop]

    def _places(self, number: int, crossing: Crossing) -> list[torch.Tensor]:
        """Return where in the mirror a segment's tensors are gathered; none if there cannot be a mirror."""
        device = crossing.device
        if device is None:
            return []
        if self._mirror is None or self._mirror[0] != device:
            small = [s.stop - s.start for n, s in enumerate(self.layout.segments) if self._is_small(n)]
            self._mirror = device, crossing.mirror(max(small))
            self._mirrored.clear()
        mirror = self._mirror[1]
        if number not in self._mirrored and mirror.memory is not None:
            self._mirrored[number] = mirror.places(self._stretch(number), self._copies[number].targets)
        return self._mirrored.get(number, [])

    def checksum(self, number: int, crc32: Checksum) -> list[int]:
        """Compute the CRC32 of each record of a segment, and write it into the two places of its frame; return them."""
        return self._copies[number].checksum(self.arena.memory, crc32)

    def put_tail(self, tail: bytes) -> None:
        """Lay the file's last blocks behind the last segment."""
        self.arena.memory[self.layout.tail : self.layout.tail + len(tail)] = tail

    def holds(self, tail_nbytes: int) -> bool:
        """Whether a tail of so many bytes fits."""
        return self.arena.nbytes - self.layout.tail >= tail_nbytes

    def file_range(self, number: int) -> tuple[int, memoryview]:
        """Return where segment `number` begins in the file, and its bytes."""
        segment = self.layout.segments[number]
        return segment.start, self.arena.memory[segment.start : segment.stop]

    def tail_range(self, nbytes: int) -> tuple[int, memoryview]:
        """Return where the tail begins in the file, and its bytes."""
        start = self.layout.tail
        return start, self.arena.memory[start : start + nbytes]


def stage_nbytes(layout: Layout, tail_nbytes: int) -> int:
    """Return how many bytes a `Stage` takes."""
    return layout.tail + round_up(max(tail_nbytes, 1), BLOCK)


def picker(places: list[int]) -> Callable[[Sequence[Any]], tuple[torch.Tensor, ...]]:
    if not places:
        return lambda values: ()
    if len(places) == 1:
        [place] = places
        return lambda values: (values[place],)
    return itemgetter(*places)


def default_checksum() -> Checksum:
    """Return isal's CRC32 if the extra `fast` is installed (four times as quick), else zlib's: the same values."""
    try:
        from isal.isal_zlib import crc32
    except ImportError:
        from zlib import crc32
    return crc32
