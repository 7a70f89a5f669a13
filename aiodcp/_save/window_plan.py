"""How a file is cut into windows that fit a slot of host memory. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from .._format.alignment import BLOCK
from .._format.layout import Layout
from ..errors import StageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Bytes `start` to `stop` of an item that is larger than a slot."""

    record: int
    start: int
    stop: int


@dataclass(slots=True, kw_only=True)
class Window:
    """Bytes `first` to `stop` of the file, in a slot that begins with byte `start`: a multiple of `BLOCK`.

    Attributes:
        parts: of large records, at most one at the beginning and one at the end.
        whole: the records that lie within it, in order.
    """

    start: int
    first: int
    stop: int = 0
    parts: list[Part] = field(default_factory=list)
    whole: list[int] = field(default_factory=list)


def windows_of_segments(layout: Layout, slot_nbytes: int) -> list[Window]:
    """Make a window of each segment, where each is stored as a file of its own.

    Raises:
        StageError: one is larger than a slot.
    """
    for segment in layout.segments:
        if segment.stop - segment.start > slot_nbytes:
            problem = (
                f"a tensor of {segment.stop - segment.start} bytes cannot be cut, and is larger than a fourth of "
                "max_host_bytes"
            )
            raise StageError(segment.stop - segment.start, problem)
    return [
        Window(
            start=segment.start,
            first=segment.start,
            stop=segment.stop,
            whole=list(range(segment.first, segment.stop_record)),
        )
        for segment in layout.segments
    ]


def plan_windows(layout: Layout, slot_nbytes: int) -> list[Window]:
    """Cut a file into windows of at most `slot_nbytes`, a multiple of `BLOCK`. Pure."""
    windows: list[Window] = []
    window = Window(start=0, first=0)

    def close(stop: int) -> Window:
        window.stop = stop
        windows.append(window)
        return Window(start=stop // BLOCK * BLOCK, first=stop)

    for record, (frame, offset) in enumerate(zip(layout.frames, layout.offsets, strict=True)):
        end = offset + frame.item_nbytes
        if end > window.start + slot_nbytes and frame.item_nbytes <= slot_nbytes:
            window = close(offset)
        if end <= window.start + slot_nbytes:
            window.whole.append(record)
            continue
        if offset + len(frame.header) + BLOCK > window.start + slot_nbytes:  # its first block with payload must fit
            window = close(offset)
        position = offset
        while position < end:
            stop = min(end, window.start + slot_nbytes)
            window.parts.append(Part(record=record, start=position - offset, stop=stop - offset))
            position = stop
            if position < end:
                window = close(position)
    if layout.frames:
        close(layout.tail)
    return windows
