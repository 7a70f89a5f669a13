"""Staging through a few windows, over and over, where host memory is not to hold the whole file: `max_host_bytes`.

Windows cut the file into stretches that fit a slot of the arena. A record lies whole within one, unless it is larger
than a slot: then its parts fill one window after the other, and since its header carries the checksum of all of them,
the header's block is held back and written last. Windows end where a record ends, blocks do not: the bytes of the block
that two windows share are carried over.

    file     | r0 | r1 |   r2 ............................. | r3 | r4 |
    windows  | 0             | 1           | 2              . 3       |
                     held back: r2's header                 ^ carried over from 2 to 3
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .._engine.device_copies import DeviceCopies
from .._engine.host_memory import Arena
from .._format.alignment import BLOCK, round_up
from .._format.checksum import Checksum
from .._format.dtypes import copyable
from .._format.layout import LAST_SEGMENT_NBYTES, Layout
from .._state.element_views import element_views
from .record_copies import CRC, RecordCopies, plan_copies, put_frames
from .window_plan import Part, Window, plan_windows, windows_of_segments

SLOTS = 4  # one is filled, one is written, and neither has to wait for the other's jitter

MIN_NBYTES = 1 << 20

TAIL_ROOM = 64 << 10  # bytes of a slot for frozen values behind the last piece

_HELD_BLOCKS = 2  # the four bytes of a checksum may lie across the border of two

FileRange = tuple[int, memoryview]


def _slot_nbytes(max_nbytes: int) -> int:
    return (max_nbytes // SLOTS - 2 * _HELD_BLOCKS * BLOCK) // BLOCK * BLOCK


def largest_piece(max_nbytes: int) -> int:
    """Return how many bytes of tensors a piece may have at most that fits a slot, with what is around them."""
    return min(LAST_SEGMENT_NBYTES, _slot_nbytes(max_nbytes)) - 2 * BLOCK - TAIL_ROOM


class BoundedStaging:
    """An arena of a few slots, and the copies that fill them."""

    def __init__(
        self, layout: Layout, leaves: Sequence[int], max_nbytes: int, *, largest: int = LAST_SEGMENT_NBYTES
    ) -> None:
        """Take memory, at most `max_nbytes` (at least `MIN_NBYTES`).

        Args:
            layout: the tensor records.
            leaves: of each record, which leaf of the state dict it comes from.
            max_nbytes: of host memory.
            largest: bytes of a slot at most; what is over makes more slots.

        Raises:
            StageError: there is not that much host memory, or a slot is too small for a file that is stored whole.
        """
        held = _HELD_BLOCKS * BLOCK
        self.layout = layout
        if layout.in_pieces:
            largest = max((segment.stop - segment.start for segment in layout.segments), default=0) + TAIL_ROOM
        self.slot_nbytes = min(largest, _slot_nbytes(max_nbytes))
        self.slots = max_nbytes // (self.slot_nbytes + 2 * held)
        self.arena = Arena(self.slots * (self.slot_nbytes + 2 * held))
        self.arena.populate()
        self._leaves = leaves
        plan = windows_of_segments if layout.in_pieces else plan_windows
        self._windows = plan(layout, self.slot_nbytes)
        self._copies = [self._plan(number) for number in range(len(self._windows))]
        first = self.slots * self.slot_nbytes
        self._spare = [self.arena.memory[start : start + held] for start in range(first, self.arena.nbytes, held)]
        self._free = list(self._spare)
        self._held: tuple[int, int, memoryview] | None = None  # from where to where in the file, and the blocks
        self._lent: dict[int, list[memoryview]] = {}  # blocks that were held back, by the window that writes them
        self._carried = b""
        self._crc = 0
        self.crcs: list[int] = [0] * len(layout.frames)

    def __len__(self) -> int:
        return len(self._windows)

    @property
    def borders(self) -> list[int]:
        """Where in the arena copies end and begin: none crosses one."""
        return [number * self.slot_nbytes for number in range(self.slots)]

    def _shift(self, number: int) -> int:
        return number % self.slots * self.slot_nbytes - self._windows[number].start

    def _plan(self, number: int) -> RecordCopies:
        return plan_copies(self.arena, self.layout, self._windows[number].whole, self._leaves, self._shift(number))

    def nbytes(self, number: int) -> int:
        """Return how much of the file a window brings."""
        return self._windows[number].stop - self._windows[number].first

    def copy(self, number: int, values: Sequence[Any], device_copies: DeviceCopies) -> list[torch.Event]:
        """Copy window `number` from the leaves of a state dict into its slot, which must be free. Blocks.

        Returns:
            What to wait for, if bytes come from a device.
        """
        copies = self._copies[number]
        targets, sources = list(copies.targets), list(copies.sources(values))
        for part in self._windows[number].parts:
            for target, source in self._strips(part, values[self._leaves[part.record]], self._shift(number)):
                targets.append(target)
                sources.append(source)
        return device_copies.copy(targets, sources) if targets else []

    def _strips(self, part: Part, source: torch.Tensor, shift: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        frame, offset = self.layout.frames[part.record], self.layout.offsets[part.record]
        header, itemsize = len(frame.header), frame.dtype.itemsize
        # A border between windows is a multiple of 64 bytes from where the payload begins: no element is cut.
        start, stop = (min(max(edge - header, 0), frame.nbytes) // itemsize for edge in (part.start, part.stop))
        position = offset + header + start * itemsize + shift
        for strip in element_views(source.detach(), start, stop):
            memory = self.arena.tensor[position : position + strip.numel() * itemsize]
            yield copyable(memory.view(frame.dtype).view(strip.shape)), copyable(strip)
            position += strip.numel() * itemsize

    def seal(self, number: int, crc32: Checksum) -> list[FileRange]:
        """Complete a window that has been copied, with frames and checksums; return what can be written of it.

        Windows are sealed in order. What is returned lies in memory that `release` gives back.
        """
        window, shift, memory = self._windows[number], self._shift(number), self.arena.memory
        if number == 0:  # the save before may have failed halfway
            self._carried, self._held, self._free = b"", None, list(self._spare)
        self._lent[number] = []
        memory[window.start + shift : window.first + shift] = self._carried
        self._blank_gaps(window, shift)
        put_frames(memory, self.layout, window.whole, shift)
        for record, crc in zip(window.whole, self._copies[number].checksum(memory, crc32), strict=True):
            self.crcs[record] = crc
        ranges: list[FileRange] = []
        hole = (window.stop, window.stop)
        for part in window.parts:
            if part.start == 0:
                hole = self._begin_record(part, shift)
            ranges += self._go_on(part, number, shift, crc32)
        last = number == len(self._windows) - 1
        stop = window.stop if last else window.stop // BLOCK * BLOCK
        self._carried = bytes(memory[stop + shift : window.stop + shift])
        for start, end in ((window.start, min(hole[0], stop)), (hole[1], stop)):
            if start < end:
                ranges.append((start, memory[start + shift : end + shift]))
        return ranges

    def _blank_gaps(self, window: Window, shift: int) -> None:
        """Put zeros where no item lies: there are bytes of an earlier window."""
        layout, position = self.layout, window.first
        items = [
            (layout.offsets[each], layout.offsets[each] + layout.frames[each].item_nbytes) for each in window.whole
        ]
        items += [(layout.offsets[p.record] + p.start, layout.offsets[p.record] + p.stop) for p in window.parts]
        for start, stop in [*sorted(items), (window.stop, window.stop)]:
            self.arena.memory[position + shift : start + shift] = bytes(start - position)
            position = stop

    def _begin_record(self, part: Part, shift: int) -> tuple[int, int]:
        """Put the header of a large record, and hold back the blocks with its checksum; return where they are."""
        frame, offset = self.layout.frames[part.record], self.layout.offsets[part.record]
        memory = self.arena.memory
        memory[offset + shift : offset + len(frame.header) + shift] = frame.header
        start = (offset + frame.header_crc) // BLOCK * BLOCK
        stop = round_up(offset + frame.header_crc + CRC.size, BLOCK)
        blocks = self._free.pop()
        blocks[: stop - start] = memory[start + shift : stop + shift]
        self._held = start, stop, blocks
        self._crc = 0
        return start, stop

    def _go_on(self, part: Part, number: int, shift: int, crc32: Checksum) -> list[FileRange]:
        """Checksum a part of a large record; if that was the last of its payload, return the blocks held back."""
        frame, offset = self.layout.frames[part.record], self.layout.offsets[part.record]
        memory, header = self.arena.memory, len(frame.header)
        start, stop = (min(max(edge, header), header + frame.nbytes) for edge in (part.start, part.stop))
        if start < stop:
            self._crc = crc32(memory[offset + start + shift : offset + stop + shift], self._crc)
        if part.stop < header + frame.nbytes:
            return []
        self.crcs[part.record] = self._crc
        trailer = bytearray(frame.trailer)
        CRC.pack_into(trailer, frame.trailer_crc, self._crc)
        begin = max(part.start, header + frame.nbytes)
        memory[offset + begin + shift : offset + part.stop + shift] = trailer[
            begin - header - frame.nbytes : part.stop - header - frame.nbytes
        ]
        if self._held is None:  # the trailer alone went on into this window
            return []
        start, end, blocks = self._held
        self._held = None
        CRC.pack_into(blocks, offset + frame.header_crc - start, self._crc)
        self._lent[number].append(blocks)
        return [(start, blocks[: end - start])]

    def release(self, number: int) -> None:
        """Take back the memory of a window that has been written."""
        self._free += self._lent.pop(number)

    def holds(self, tail_nbytes: int) -> bool:
        """Whether a tail of so many bytes fits: it takes the slots as windows do."""
        return True

    def append(self, number: int, memory: memoryview, data: bytes) -> memoryview:
        """Return the last piece with the tail behind it: in its slot, if there is room, else in memory of its own."""
        start = number % self.slots * self.slot_nbytes
        stop = start + len(memory) + len(data)
        if len(memory) + len(data) > self.slot_nbytes:
            return memoryview(b"".join((memory, data)))
        self.arena.memory[start + len(memory) : stop] = data
        return self.arena.memory[start:stop]

    def put(self, number: int, data: bytes) -> memoryview:
        """Lay bytes that are no tensors' into the slot of window `number`; return them, filled up to a whole block."""
        start = number % self.slots * self.slot_nbytes
        memory = self.arena.memory[start : start + round_up(len(data), BLOCK)]
        memory[:] = data.ljust(len(memory), b"\0")
        return memory
