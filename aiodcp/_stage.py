"""From the caller's tensors into the arena, and each record's checksum into its frame.

The arena is the data file: every frame stands in it already, so staging is a copy to fixed places. All tensors of a
segment are one `torch._foreach_copy_`, which lets go of the GIL once for all of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ._arena import Arena
from ._device_gather import SMALL_NBYTES, Gather, GatherBuffer, Tensors, picker
from ._devices import DeviceCopies
from ._layout import BLOCK, NOT_COPIED, Layout, copyable, round_up

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
        self._buffer: tuple[torch.device, GatherBuffer] | None = None
        self._gathers: dict[int, Gather] = {}  # by segment, of those that consist of small tensors

    @property
    def borders(self) -> list[int]:
        """Where in the arena copies end and begin: none crosses one."""
        return [segment.start for segment in self.layout.segments]

    def copy(self, number: int, values: Sequence[Any], device_copies: DeviceCopies) -> list[torch.Event]:
        """Copy segment `number` from the leaves of a state dict. Blocks; releases the GIL while bytes move.

        Returns:
            What to wait for, if bytes come from a device.
        """
        copies = self._copies[number]
        sources = copies.sources(values)
        if device_copies and self._is_small(number):
            gather = self._gather(number, sources, device_copies)
            if gather is not None:
                return device_copies.gather(gather, sources)
        return device_copies.copy(copies.targets, sources)

    def _is_small(self, number: int) -> bool:
        segment = self.layout.segments[number]
        return segment.stop - segment.start < SMALL_NBYTES * (segment.stop_record - segment.first)

    def _gather(self, number: int, sources: Tensors, device_copies: DeviceCopies) -> Gather | None:
        """Return how a segment's tensors are gathered; None if there cannot be a gather buffer."""
        device = device_copies.device
        if device is None:
            return None
        if self._buffer is None or self._buffer[0] != device:
            small = [s.stop - s.start for n, s in enumerate(self.layout.segments) if self._is_small(n)]
            self._buffer = device, device_copies.gather_buffer(max(small))
            self._gathers.clear()
        memory = self._buffer[1].memory
        if memory is None:
            return None
        known = self._gathers.get(number)
        if known is None or not known.fits(sources):
            segment = self.layout.segments[number]
            stretch = self.arena.tensor[segment.start : segment.stop]
            self._gathers[number] = known = Gather(memory, stretch, self._copies[number].targets, sources)
        return known

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


def default_checksum() -> Checksum:
    """Return isal's CRC32 if the extra `fast` is installed (four times as quick), else zlib's: the same values."""
    try:
        from isal.isal_zlib import crc32
    except ImportError:
        from zlib import crc32
    return crc32
