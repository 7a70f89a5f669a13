"""Bytes in sections, each deflated, one behind the other."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from .arrays import Array

LENGTH = struct.Struct("<Q")

LARGEST_NBYTES = 1 << 34
"""Of one section: what a damaged or hostile file could otherwise ask for."""


def pack_section(data: bytes) -> bytes:
    packed = zlib.compress(data, 1)
    return LENGTH.pack(len(packed)) + packed


def pack_column(column: Array) -> bytes:
    """Return a section of numbers, as differences: of equal steps nothing remains."""
    return pack_section(np.diff(column, prepend=0).astype("<i8").tobytes())


class SectionReader:
    """Reads sections in their order.

    Its methods raise ValueError, struct.error or zlib.error where there is something else.
    """

    def __init__(self, text: bytes | memoryview) -> None:
        self._text = memoryview(text)
        self._position = 0

    def section(self, most: int = LARGEST_NBYTES) -> bytes:
        """Return the next section, which has at most so many bytes."""
        (length,) = LENGTH.unpack_from(self._text, self._position)
        start = self._position + LENGTH.size
        self._position = start + length
        if self._position > len(self._text):
            raise ValueError("truncated")
        inflate = zlib.decompressobj()
        data = inflate.decompress(self._text[start : self._position], most)
        if not inflate.eof:
            raise ValueError("more than there should be")
        return data

    def column(self, count: int) -> Array:
        """Return the next section, which has so many numbers."""
        if type(count) is not int or not 0 <= count <= LARGEST_NBYTES // 8:
            raise ValueError("a length that is none")
        steps = np.frombuffer(self.section(8 * count + 1), dtype="<i8")
        if len(steps) != count:
            raise ValueError("a column of another length")
        return np.cumsum(steps, dtype=np.int64)

    def rest(self, nbytes: int | None = None) -> bytes:
        """Return the next bytes as they are: so many, or all."""
        start = self._position
        self._position = len(self._text) if nbytes is None else start + nbytes
        return bytes(self._text[start : self._position])
