"""The CRC32 of every item, in a table at the end of each data file, whose own CRC32 is in `.metadata`.

Where a data file is stored in several pieces, its last piece has the table for all of them.

Each item has its CRC32 with it, which finds damage; the tables find what is whole, and lies where another one was
saved. They cost four bytes an item, are written and read with the file, and add one number a file to the commit.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from .arrays import Array
from .dcp import Metadata
from .index_columns import ChunkPlaces
from .indexed_metadata import IndexedMetadata
from .naming import split_piece

CRC_NBYTES = 4

FEW = 16  # times the cost of a pass over all items: files are looked at one by one until it is spent

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
        self._files_of: dict[str, list[str]] = {}  # by table, where there are columns: of each file's items
        self._numbers: dict[str, int] = {}
        self._chunks: ChunkPlaces
        self._offsets: dict[str, Array] = {}  # of files whose items were looked for
        self._order: Array | None = None  # of all items, by file and offset
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
        self._chunks = metadata.places
        self._numbers = {file: number for number, file in enumerate(metadata.file_names)}
        for file, piece in zip(metadata.file_names, metadata.places.file_parts[:, 2].tolist(), strict=True):
            table = split_piece(file)[0] if piece >= 0 else file
            self._pieces[file] = table, piece if piece >= 0 else _LAST
            self._files_of.setdefault(table, []).append(file)
        self._crcs = dict(zip(sorted(self._files_of), crcs, strict=True))

    def _offsets_in(self, file: str) -> Array:
        """Return where in a file its items begin."""
        if file in self._offsets:
            return self._offsets[file]
        number, files, starts = self._numbers[file], self._chunks.files, self._chunks.starts
        if self._order is None and len(self._offsets) * len(files.steps) < FEW * len(files):
            offsets = self._offsets[file] = np.sort(starts.at(files.rows_of(number)))
            return offsets
        if self._order is None:
            self._order = np.lexsort((starts.numbers, files.numbers))
            self._bounds = np.searchsorted(files.numbers[self._order], np.arange(len(self._numbers) + 1))
        return starts.numbers[self._order[self._bounds[number] : self._bounds[number + 1]]]

    def _all_places(self, file: str) -> list[tuple[str, Array]]:
        """Return where the items of a table lie, in its order: by file, their offsets."""
        if self._files_of:
            in_order = sorted(self._files_of[file], key=lambda each: self._pieces[each][1])
            return [(each, self._offsets_in(each)) for each in in_order]
        found: dict[str, list[int]] = {}
        for _, offset, name in sorted(self._places[file]):
            found.setdefault(name, []).append(offset)
        return [(name, np.array(offsets, dtype=np.int64)) for name, offsets in found.items()]

    def file_of(self, file: str) -> str:
        """Return the file at whose end the table is that has the items of `file`: of a data file's pieces the last."""
        return self._pieces[file][0] if file in self._pieces else file

    def nbytes(self, file: str) -> int:
        """Return how many of a file's last bytes are a table; 0 if it has none."""
        if file not in self._crcs:
            return 0
        if self._files_of:
            return CRC_NBYTES * sum(len(self._offsets_in(each)) for each in self._files_of[file])
        return CRC_NBYTES * len(self._places[file])

    def read(self, file: str, table: bytes) -> dict[str, ItemCrcs]:
        """Return the CRC32s of the items of a table, by the file in which they lie.

        Raises:
            ValueError: the table is not the one that was saved.
        """
        if zlib.crc32(table) != self._crcs[file]:
            raise ValueError("CRC32 mismatch in the checksum table at the end of the file")
        places = self._all_places(file)
        all_crcs = np.frombuffer(table, dtype="<u4").astype(np.int64)
        if len(all_crcs) != sum(len(offsets) for _, offsets in places):
            raise ValueError("the checksum table at the end of the file is of another length")
        found: dict[str, ItemCrcs] = {}
        position = 0
        for name, offsets in places:
            found[name] = ItemCrcs(offsets, all_crcs[position : position + len(offsets)])
            position += len(offsets)
        return found


class ItemCrcs(Mapping[int, int]):
    """The CRC32s of the items of one file, by their offsets, which are sorted."""

    def __init__(self, offsets: Array, crcs: Array) -> None:
        self._offsets = offsets
        self._crcs = crcs

    @cached_property
    def _by_offset(self) -> dict[int, int]:
        return dict(zip(self._offsets.tolist(), self._crcs.tolist(), strict=True))

    def __getitem__(self, offset: int) -> int:
        return self._by_offset[offset]

    def __iter__(self) -> Iterator[int]:
        return iter(self._by_offset)

    def __len__(self) -> int:
        return len(self._offsets)

    def of(self, offsets: Array) -> Array:
        """Return those of many items; -1 where there is none."""
        if not len(self._offsets):
            return np.full(len(offsets), -1, dtype=np.int64)
        places = np.minimum(np.searchsorted(self._offsets, offsets), len(self._offsets) - 1)
        return np.where(self._offsets[places] == offsets, self._crcs[places], -1)


def matches_table(crc: int, whole: Callable[[], int], records: Sequence[zipfile.ZipInfo]) -> bool:
    """Whether an archive is the item of a table: that has the CRC32 of a tensor's elements, or else of all of it."""
    return any(crc == each.CRC for each in records if each.filename.endswith("/data/0")) or whole() == crc
