"""Large tensors that cannot be read straight into their place, a window at a time: on devices, or not contiguous.

A window is read into scratch memory, checksummed and copied on, so that a load takes a few windows of host memory
however large the tensors are. Windows of one tensor are checksummed in order: a CRC32 goes on from the bytes before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import torch
from anyio import Event

from .._engine.device_copies import DeviceCopies
from .._engine.host_memory import Arena
from .._format.archive_reader import StoredTensor
from .._format.dtypes import copyable
from .._state.element_views import element_views
from .._state.plain_tensors import PLAIN_TENSORS
from .coalesce import SPAN_NBYTES
from .decode import ItemDecoder
from .plan import TensorRead


@dataclass(frozen=True, slots=True)
class _Piece:
    """Elements of a window, and where they go."""

    into: torch.Tensor
    at: int  # bytes, in the window
    strides: tuple[int, ...]


@dataclass(slots=True)
class Window:
    """Bytes `start` to `stop` of a file.

    Attributes:
        payload: from which byte of the window to which it holds some of the tensor's elements.
        checked: set when its checksum is taken.
    """

    start: int
    stop: int
    payload: tuple[int, int]
    pieces: list[_Piece]
    checked: Event = field(default_factory=Event)

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


class LargeRead:
    """One tensor, in windows."""

    def __init__(self, read: TensorRead, windows: list[Window], crc_place: int | None, crc: int | None = None) -> None:
        """Begin.

        Args:
            read: what is wanted.
            windows: in the order of the file.
            crc_place: where in the first window the payload's CRC32 is stored, if it is there.
            crc: that CRC32, if it is known.
        """
        self.read = read
        self.windows = windows
        self._crc_place = crc_place
        self._stored = crc
        self._crc = 0

    @property
    def is_compared(self) -> bool:
        return self._crc_place is not None or self._stored is not None

    def fill(self, number: int, arena: Arena, decoder: ItemDecoder, device_copies: DeviceCopies) -> None:
        """Checksum window `number`, which has been read into `arena`, and copy it on. In order, if `is_compared`.

        Raises:
            CorruptError: with the last window: the bytes are not those that were saved.
        """
        window, read = self.windows[number], self.read
        if self.is_compared and decoder.crc32 is not None:
            if self._crc_place is not None and number == 0:
                self._stored = int.from_bytes(arena.memory[self._crc_place : self._crc_place + 4], "little")
            self._crc = decoder.crc32(arena.memory[slice(*window.payload)], self._crc)
            if number == len(self.windows) - 1 and self._stored is not None:
                decoder.compare(read.fqn, read.file, self._crc, self._stored, read.crc)
        targets, sources = [], []
        typed = arena.typed(read.dtype)
        for piece in window.pieces:
            source = typed.as_strided(piece.into.shape, piece.strides, piece.at // read.dtype.itemsize)
            targets.append(copyable(piece.into))
            sources.append(copyable(source))
        if not targets:
            return
        try:
            device_copies.wait_for(device_copies.copy(targets, sources))
        except BaseException:
            device_copies.drain(arena, read.into)
            raise


def takes_windows(into: torch.Tensor) -> bool:
    """Whether a tensor can be filled a window at a time."""
    return type(into) in PLAIN_TENSORS and into.layout is torch.strided and not into.is_conj() and not into.is_neg()


def in_windows(read: TensorRead, stored: StoredTensor | None = None, nbytes: int = SPAN_NBYTES) -> LargeRead | None:
    """Cut up what is to be read; None if that cannot be done, or is not worth while.

    Args:
        read: what is wanted.
        stored: where the elements lie, if it is an archive of `torch.save`.
        nbytes: of a window, at most.
    """
    if read.nbytes <= nbytes or not takes_windows(read.into):
        return None
    if read.frame is None:
        return _archive(read, stored, nbytes) if stored is not None else None
    header = 0 if read.bare else len(read.frame.header)
    if read.part is None:
        return LargeRead(read, [*_flat(read, read.offset, header, read.frame.nbytes, nbytes)], read.frame.header_crc)
    if not read.bare:
        return None
    windows = list(_rows(read, read.part[1], read.frame.strides, nbytes))
    return LargeRead(read, windows, None) if windows else None


def _archive(read: TensorRead, stored: StoredTensor, nbytes: int) -> LargeRead | None:
    expected = prod(read.sizes) * read.dtype.itemsize
    is_plain = (
        read.part is None
        and read.crc is None  # else it is of the whole item
        and stored.dtype is read.dtype
        and stored.sizes == tuple(read.sizes)
        and stored.offset == 0
        and stored.stop - stored.start == expected
        and stored.strides == torch.empty(0).new_empty(read.sizes, device="meta").stride()
    )
    if not is_plain:
        return None
    windows = list(_flat(read, read.offset + stored.start, 0, expected, nbytes))
    return LargeRead(read, windows, None, stored.crc if stored.has_checksums else None)


def _flat(read: TensorRead, start: int, header: int, payload: int, nbytes: int) -> Iterator[Window]:
    """Cut a tensor, all of which is wanted, at elements; with the `header` bytes before it."""
    itemsize, position = read.dtype.itemsize, 0
    while position < payload:
        before = header if position == 0 else 0
        stop = min(payload, position + (nbytes - before) // itemsize * itemsize)
        at, pieces = before, []
        for strip in element_views(read.into.detach(), position // itemsize, stop // itemsize):
            pieces.append(_Piece(strip, at, _row_major(strip.shape)))
            at += strip.numel() * itemsize
        first = start + header + position - before
        yield Window(first, first + before + stop - position, (before, before + stop - position), pieces)
        position = stop


def _rows(read: TensorRead, lengths: torch.Size, strides: tuple[int, ...], nbytes: int) -> Iterator[Window]:
    """Cut a part of a tensor, of which only its extent is read, at its first dimension; none if a row is too large."""
    itemsize = read.dtype.itemsize
    step = strides[0] * itemsize
    row = (1 + sum((size - 1) * stride for size, stride in zip(lengths[1:], strides[1:], strict=True))) * itemsize
    if row > nbytes:
        return
    rows = max(1, (nbytes - row) // max(step, 1) + 1)
    for first in range(0, lengths[0], rows):
        count = min(rows, lengths[0] - first)
        start = read.offset + first * step
        stop = start + (count - 1) * step + row
        piece = _Piece(read.into.detach()[first : first + count], 0, strides)
        yield Window(start, stop, (0, stop - start), [piece])


def _row_major(shape: torch.Size) -> tuple[int, ...]:
    return tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
