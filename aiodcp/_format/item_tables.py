"""The CRC32 of every item, in a table at the end of each data file, whose own CRC32 is in `.metadata`.

Where a data file is stored in several pieces, its last piece has the table for all of them.

Each item has its CRC32 with it, which finds damage; the tables find what is whole, and lies where another one was
saved. They cost four bytes an item, are written and read with the file, and add one number a file to the commit.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence

import numpy as np

from .arrays import Array
from .dcp import Metadata
from .indexed_metadata import IndexedMetadata
from .naming import split_piece

CRC_NBYTES = 4

_LAST = 1 << 62  # of pieces: it has the data file's own name, and no number


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
        self._places: dict[str, list[tuple[int, int, str]]] = {}  # number of the piece, offset and name, by table
        self._pieces: dict[str, tuple[str, int]] = {}  # table, and number of the piece, by file
        self._columns: dict[str, Array] = {}  # offsets of items, by file, where there are columns
        self._files_of: dict[str, list[str]] = {}  # and files, by table
        if not crcs:
            self._crcs: dict[str, int] = {}
            return
        if isinstance(metadata, IndexedMetadata):
            self._take_columns(metadata, crcs)
            return
        for info in metadata.storage_data.values():
            file = info.relative_path
            if file not in self._pieces:
                table, number = split_piece(file)
                self._pieces[file] = table, _LAST if number is None else number
            table, order = self._pieces[file]
            self._places.setdefault(table, []).append((order, info.offset, file))
        self._crcs = dict(zip(sorted(self._places), crcs, strict=True))

    def _take_columns(self, metadata: IndexedMetadata, crcs: Sequence[int]) -> None:
        files, starts = metadata.places.files, metadata.places.starts
        order = np.lexsort((starts, files))
        bounds = np.searchsorted(files[order], np.arange(len(metadata.file_names) + 1)).tolist()
        for number, file in enumerate(metadata.file_names):
            table, piece = split_piece(file)
            self._pieces[file] = table, _LAST if piece is None else piece
            if bounds[number] < bounds[number + 1]:
                self._columns[file] = starts[order[bounds[number] : bounds[number + 1]]]
                self._files_of.setdefault(table, []).append(file)
        self._crcs = dict(zip(sorted(self._files_of), crcs, strict=True))

    def _all_places(self, file: str) -> list[tuple[str, list[int]]]:
        """Return where the items of a table lie, in its order: by file, their offsets."""
        if self._files_of:
            in_order = sorted(self._files_of[file], key=lambda each: self._pieces[each][1])
            return [(each, self._columns[each].tolist()) for each in in_order]
        found: dict[str, list[int]] = {}
        for _, offset, name in sorted(self._places[file]):
            found.setdefault(name, []).append(offset)
        return list(found.items())

    def file_of(self, file: str) -> str:
        """Return the file at whose end the table is that has the items of `file`: of a data file's pieces the last."""
        return self._pieces[file][0] if file in self._pieces else file

    def nbytes(self, file: str) -> int:
        """Return how many of a file's last bytes are a table; 0 if it has none."""
        if file not in self._crcs:
            return 0
        if self._files_of:
            return CRC_NBYTES * sum(len(self._columns[each]) for each in self._files_of[file])
        return CRC_NBYTES * len(self._places[file])

    def read(self, file: str, table: bytes) -> dict[str, dict[int, int]]:
        """Return the CRC32 of each item of a table, by the file in which it lies, and its offset there.

        Raises:
            ValueError: the table is not the one that was saved.
        """
        if zlib.crc32(table) != self._crcs[file]:
            raise ValueError("CRC32 mismatch in the checksum table at the end of the file")
        places = self._all_places(file)
        all_crcs = [crc for (crc,) in struct.iter_unpack("<I", table)]
        if len(all_crcs) != sum(len(offsets) for _, offsets in places):
            raise ValueError("the checksum table at the end of the file is of another length")
        found: dict[str, dict[int, int]] = {}
        position = 0
        for name, offsets in places:
            found[name] = dict(zip(offsets, all_crcs[position : position + len(offsets)], strict=True))
            position += len(offsets)
        return found


def matches_table(crc: int, whole: Callable[[], int], records: Sequence[zipfile.ZipInfo]) -> bool:
    """Whether an archive is the item of a table: that has the CRC32 of a tensor's elements, or else of all of it."""
    return any(crc == each.CRC for each in records if each.filename.endswith("/data/0")) or whole() == crc
