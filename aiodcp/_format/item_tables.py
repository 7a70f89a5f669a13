"""The CRC32 of every item, in a table at the end of each data file, whose own CRC32 is in `.metadata`.

Each item has its CRC32 with it, which finds damage; the tables find what is whole, and lies where another one was
saved. They cost four bytes an item, are written and read with the file, and add one number a file to the commit.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence

from .dcp import Metadata

CRC_NBYTES = 4


def pack_table(crcs: Sequence[int]) -> bytes:
    """Return a table: the items' CRC32s, in the order of their places in the file."""
    return struct.pack(f"<{len(crcs)}I", *crcs)


class ItemTables:
    """What `.metadata` says of the tables of a checkpoint."""

    def __init__(self, metadata: Metadata, crcs: Sequence[int]) -> None:
        """Read what is said.

        Args:
            metadata: of the checkpoint.
            crcs: of the tables, in the order of the names of their files; empty if there are no tables.

        Raises:
            ValueError: there are more or fewer of them than files.
        """
        self._offsets: dict[str, list[int]] = {}
        if not crcs:
            self._crcs: dict[str, int] = {}
            return
        for info in metadata.storage_data.values():
            self._offsets.setdefault(info.relative_path, []).append(info.offset)
        self._crcs = dict(zip(sorted(self._offsets), crcs, strict=True))

    def nbytes(self, file: str) -> int:
        """Return how many of a file's last bytes are its table; 0 if it has none."""
        return CRC_NBYTES * len(self._offsets[file]) if file in self._crcs else 0

    def read(self, file: str, table: bytes) -> dict[int, int]:
        """Return the CRC32 of each item of a file by its offset.

        Raises:
            ValueError: the table is not the one that was saved.
        """
        if zlib.crc32(table) != self._crcs[file]:
            raise ValueError("CRC32 mismatch in the checksum table at the end of the file")
        crcs = [each for (each,) in struct.iter_unpack("<I", table)]
        return dict(zip(sorted(self._offsets[file]), crcs, strict=True))


def matches_table(crc: int, whole: Callable[[], int], records: Sequence[zipfile.ZipInfo]) -> bool:
    """Whether an archive is the item of a table: that has the CRC32 of a tensor's elements, or else of all of it."""
    return any(crc == each.CRC for each in records if each.filename.endswith("/data/0")) or whole() == crc
