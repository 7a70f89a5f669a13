"""Where every byte of a data file lies. Pure: no files, no clock, no tensors.

A data file is a row of items, each a zip archive as `torch.save` writes it, with nothing between them but padding:

    | segment 0                                       | segment 1       | ... | tail                        |
    | header payload trailer . header payload trailer | header payload  |     | frozen values, back to back |

A segment is what is staged, checksummed and written as one; it begins on a block, so that segments are independent.
Where a store takes files whole, each segment is stored as a file of its own, a piece; the last one with the tail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .alignment import ALIGNMENT, BLOCK, round_up
from .archive_writer import Frame, frame_tensor

# Bytes. The first segment is small so that the disk starts soon; each may be twice the one before. Every segment costs
# some fifteen turns at the GIL: a save of 1 GiB has twelve.
FIRST_SEGMENT_NBYTES = 16 << 20

LAST_SEGMENT_NBYTES = 128 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Records `first` to `stop_record`, which lie in the file from byte `start` to `stop` (a multiple of `BLOCK`)."""

    first: int
    stop_record: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A data file: its tensor records in order, and where the tail of frozen values begins.

    Attributes:
        frames: one a record.
        offsets: bytes, where each record's item begins.
        segments: in order, without gaps.
        tail: bytes, where the tail begins: a multiple of `BLOCK`.
        in_pieces: whether segments are stored as files of their own.
    """

    frames: tuple[Frame, ...]
    offsets: tuple[int, ...]
    segments: tuple[Segment, ...]
    tail: int
    in_pieces: bool = False

    @property
    def pieces(self) -> int:
        """How many segments are files of their own, besides the last, which has the data file's name and the tail."""
        return max(len(self.segments) - 1, 0) if self.in_pieces else 0

    @property
    def last_piece(self) -> int:
        """Byte at which the file begins that has the tail."""
        return self.segments[-1].start if self.pieces else 0


def lay_out(records: Sequence[tuple[torch.dtype, tuple[int, ...]]], piece_nbytes: int | None = None) -> Layout:
    """Place one record after the other, each a (dtype, shape).

    Args:
        records: the tensors.
        piece_nbytes: of a segment that is stored as a file of its own, at most, but for a larger record and for what
            frames add; None if all are one file.
    """
    frames, offsets, segments = [], [], []
    position = first = start = 0
    largest = LAST_SEGMENT_NBYTES if piece_nbytes is None else piece_nbytes + BLOCK
    limit = min(FIRST_SEGMENT_NBYTES, largest)
    for number, (dtype, shape) in enumerate(records):
        frame = frame_tensor(dtype, shape)
        if position > start and position + frame.item_nbytes - start > limit:
            position = round_up(position, BLOCK)
            segments.append(Segment(first=first, stop_record=number, start=start, stop=position))
            first, start, limit = number, position, min(2 * limit, largest)
        frames.append(frame)
        offsets.append(position)
        position = round_up(position + frame.item_nbytes, ALIGNMENT)
    if frames:
        position = round_up(position, BLOCK)
        segments.append(Segment(first=first, stop_record=len(frames), start=start, stop=position))
    return Layout(
        frames=tuple(frames),
        offsets=tuple(offsets),
        segments=tuple(segments),
        tail=position,
        in_pieces=piece_nbytes is not None,
    )
