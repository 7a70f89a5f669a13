"""From the caller's tensors into the arena, and each record's checksum into its frame.

The arena is the data file: every frame stands in it already, so staging is a copy to fixed places. All tensors of a
segment are one `torch._foreach_copy_`, which lets go of the GIL once for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._engine.device_copies import DeviceCopies
from .._engine.device_gather import SMALL_NBYTES, Gather, GatherBuffer, Tensors
from .._engine.gc_pause import gc_paused
from .._engine.host_memory import Arena
from .._format.alignment import BLOCK, round_up
from .._format.checksum import Checksum
from .._format.layout import Layout
from .record_copies import plan_copies, put_frames


class Staging:
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
        self.arena = Arena(staging_nbytes(layout, tail_nbytes))
        self.arena.populate()
        put_frames(self.arena.memory, layout, range(len(layout.frames)))
        with gc_paused():
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


def staging_nbytes(layout: Layout, tail_nbytes: int) -> int:
    """Return how many bytes a `Staging` takes."""
    return layout.tail + round_up(max(tail_nbytes, 1), BLOCK)
