"""From the caller's tensors into the arena, and each record's checksum into its frame.

The arena is the data file: every frame stands in it already, so staging is a copy to fixed places. All tensors of a
segment are one `torch._foreach_copy_`, which lets go of the GIL once for all of them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import torch

from ._arena import Arena
from ._layout import BLOCK, NOT_COPIED, Layout, Segment, copyable, round_up

_CRC = struct.Struct("<I")

Checksum = Callable[[memoryview], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Copies:
    """How one segment is staged and checksummed.

    Attributes:
        pick: takes the segment's tensors out of the leaves of a state dict.
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
        self.arena = Arena(layout.tail + round_up(max(tail_nbytes, 1), BLOCK))
        self.arena.populate()
        memory = self.arena.memory
        for frame, offset in zip(layout.frames, layout.offsets, strict=True):
            start = offset + len(frame.head)
            memory[offset:start] = frame.head
            memory[start + frame.nbytes : offset + frame.item_nbytes] = frame.foot
        self._copies = [self._plan_copies(segment, leaves) for segment in layout.segments]

    def _plan_copies(self, segment: Segment, leaves: Sequence[int]) -> _Copies:
        places: list[int] = []
        targets: list[torch.Tensor] = []
        payloads: list[memoryview] = []
        odd = False
        heads: list[int] = []
        feet: list[int] = []
        for record in range(segment.first, segment.stop_record):
            frame, offset = self.layout.frames[record], self.layout.offsets[record]
            start = offset + len(frame.head)
            stop = start + frame.nbytes
            payloads.append(self.arena.memory[start:stop])
            heads.append(offset + frame.head_crc)
            feet.append(stop + frame.foot_crc)
            places.append(leaves[record])
            targets.append(copyable(self.arena.tensor[start:stop].view(frame.dtype).view(frame.shape)))
            odd = odd or frame.dtype in NOT_COPIED
        return _Copies(
            pick=_picker(places),
            targets=targets,
            odd=odd,
            payloads=payloads,
            heads=heads,
            feet=feet,
        )

    def copy(self, number: int, values: Sequence[Any]) -> None:
        """Copy segment `number` from the leaves of a state dict. Blocks; releases the GIL while bytes move."""
        copies = self._copies[number]
        with torch.no_grad():
            sources = copies.pick(values)
            if copies.odd:
                sources = tuple(copyable(source) for source in sources)
            torch._foreach_copy_(copies.targets, sources)

    def checksum(self, number: int, crc32: Checksum) -> None:
        """Compute the CRC32 of each record of a segment, and write it into the two places of its frame."""
        copies = self._copies[number]
        memory = self.arena.memory
        for payload, head, foot in zip(copies.payloads, copies.heads, copies.feet, strict=True):
            crc = crc32(payload)
            _CRC.pack_into(memory, head, crc)
            _CRC.pack_into(memory, foot, crc)

    def put_tail(self, tail: bytes) -> None:
        """Lay the frozen values behind the last segment; they are complete with their checksums."""
        filled = tail.ljust(round_up(len(tail), BLOCK), b"\0")  # nothing of an earlier save behind it
        self.arena.memory[self.layout.tail : self.layout.tail + len(filled)] = filled

    def room(self) -> int:
        """Return how many bytes of tail fit."""
        return self.arena.nbytes - self.layout.tail

    def file_range(self, number: int) -> tuple[int, memoryview]:
        """Return where segment `number` begins in the file, and its bytes."""
        segment = self.layout.segments[number]
        return segment.start, self.arena.memory[segment.start : segment.stop]

    def tail_range(self, nbytes: int) -> tuple[int, memoryview]:
        """Return where the tail begins in the file, and its bytes, filled up to a whole block."""
        start = self.layout.tail
        return start, self.arena.memory[start : start + round_up(nbytes, BLOCK)]


def mark_streams(values: Sequence[Any]) -> list[torch.cuda.Event]:
    """Mark on every CUDA device among `values` how far the caller's stream has come.

    A thread that waits for the marks sees what the caller had computed, on whatever stream, when it set them.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return []
    devices = {value.device for value in values if isinstance(value, torch.Tensor) and value.is_cuda}
    marks = []
    for device in sorted(devices, key=str):
        mark = torch.cuda.Event()  # type: ignore[no-untyped-call]
        mark.record(torch.cuda.current_stream(device))
        marks.append(mark)
    return marks


def wait_for_marks(marks: Sequence[torch.cuda.Event]) -> None:
    """Block until every device has come as far as its mark."""
    for mark in marks:
        mark.synchronize()


def _picker(places: list[int]) -> Callable[[Sequence[Any]], tuple[torch.Tensor, ...]]:
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
