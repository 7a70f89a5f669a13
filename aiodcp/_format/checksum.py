"""CRC32, isal's or zlib's."""

from __future__ import annotations

from typing import Protocol


class Checksum(Protocol):
    """A CRC32, as zlib's: of some bytes, going on from that of the bytes before them."""

    def __call__(self, data: memoryview, value: int, /) -> int: ...


def default_checksum() -> Checksum:
    """Return isal's CRC32 if the extra `fast` is installed (four times as quick), else zlib's: the same values."""
    try:
        from isal.isal_zlib import crc32
    except ImportError:
        from zlib import crc32
    return crc32
