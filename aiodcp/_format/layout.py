"""Where every byte of a data file lies. Pure: no files, no clock, no tensors.

A data file is a row of items, each a zip archive as `torch.save` writes it, with nothing between them but padding:

    | segment 0                                       | segment 1       | ... | tail                        |
    | header payload trailer . header payload trailer | header payload  |     | frozen values, back to back |

A segment is what is staged, checksummed and written as one; it begins on a block, so that segments are independent.
Where a store takes files whole, each segment is stored as a file of its own, a piece; the last one with the tail.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from .alignment import ALIGNMENT, BLOCK, round_up
from .archive_writer import Frame, frame_tensor

# Bytes. The first segment is small so that the disk starts soon; each may be twice the one before. Every segment costs
# some fifteen turns at the GIL: a save of 1 GiB has twelve.
FIRST_SEGMENT_NBYTES = 16 << 20

LAST_SEGMENT_NBYTES = 128 << 20

MANY_FILES = 16  # from which on they are placed side by side


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


def place_all(
    nbytes: npt.NDArray[np.int64], bounds: npt.NDArray[np.int64], piece_nbytes: int | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Place the records of many files, as `lay_out` places those of one, given the bytes of their items.

    Args:
        nbytes: of all items, file by file.
        bounds: by file, where its items begin; and the end.
        piece_nbytes: see `lay_out`.

    Returns:
        Where each item begins: in its piece, if files are in pieces; the number of its segment; and by file how many
        segments there are, but for the last.
    """
    counts = np.diff(bounds)
    offsets, segments = np.zeros(len(nbytes), dtype=np.int64), np.zeros(len(nbytes), dtype=np.int64)
    more = np.zeros(len(counts), dtype=np.int64)
    largest = LAST_SEGMENT_NBYTES if piece_nbytes is None else piece_nbytes + BLOCK
    if len(counts) < MANY_FILES:
        for file, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
            placed = _place_one(nbytes[begin:end].tolist(), min(FIRST_SEGMENT_NBYTES, largest), largest)
            offsets[begin:end], segments[begin:end], starts = placed
            more[file] = len(starts) - 1
            if piece_nbytes is not None:
                offsets[begin:end] -= np.array(starts, dtype=np.int64)[segments[begin:end]]
        return offsets, segments, more
    by_count = np.argsort(-counts, kind="stable")  # the files that have an item of some number come first
    position, start, number, limit = (np.zeros(len(counts), dtype=np.int64) for _ in range(4))
    limit[:] = min(FIRST_SEGMENT_NBYTES, largest)
    firsts, sorted_counts = bounds[:-1][by_count], counts[by_count]
    for item in range(int(counts.max(initial=0))):
        files = int(np.searchsorted(-sorted_counts, -item))  # that have more than `item` items
        where = firsts[:files] + item
        size, here, begun = nbytes[where], position[:files], start[:files]
        is_full = (here > begun) & (here + size - begun > limit[:files])
        if is_full.any():
            here = np.where(is_full, _rounded(here, BLOCK), here)
            begun[is_full] = here[is_full]
            number[:files] += is_full
            limit[:files] = np.where(is_full, np.minimum(2 * limit[:files], largest), limit[:files])
        offsets[where] = here if piece_nbytes is None else here - begun
        segments[where] = number[:files]
        position[:files] = _rounded(here + size, ALIGNMENT)
    more[by_count] = number
    return offsets, segments, more


def _place_one(sizes: Sequence[int], limit: int, largest: int) -> tuple[array[int], array[int], list[int]]:
    """Return where each item of a file begins, in which segment it is, and where the segments begin."""
    offsets, segments = array("q"), array("q")  # to copy a long list into an array holds the GIL
    starts = [0]
    position = 0
    for nbytes in sizes:
        if position > starts[-1] and position + nbytes - starts[-1] > limit:
            position = round_up(position, BLOCK)
            starts.append(position)
            limit = min(2 * limit, largest)
        offsets.append(position)
        segments.append(len(starts) - 1)
        position = round_up(position + nbytes, ALIGNMENT)
    return offsets, segments, starts


def _rounded(numbers: npt.NDArray[np.int64], multiple: int) -> npt.NDArray[np.int64]:
    return -(-numbers // multiple) * multiple
