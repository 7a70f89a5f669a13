"""`aiodcp verify`: whether a checkpoint is whole."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import BinaryIO

import torch

from .._format.chunks import is_whole
from .._format.dcp import Metadata, MetadataIndex, StorageInfo, TensorStorageMetadata
from .._format.item_tables import ItemTables, is_the_item
from .._format.naming import METADATA_NAME
from .._load.decode import check_records
from ..errors import CorruptError, UnsafeError
from ..storage.file_access import open_inside
from .reading import read
from .text_tables import plural

MISSING = "the file is missing"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is wrong with a value, or with a file if `fqn` is empty."""

    fqn: str
    file: str
    problem: str


def verify(checkpoint_id: str, advance: Callable[[int], None], total: Callable[[int], None]) -> list[Problem]:
    """Read all of a checkpoint and return all that is wrong with it.

    Checked are: that the chunks of every tensor make it up, and are stored; that every item lies in its file, is an
    archive of `torch.save`, has the payload that it should have, and that every record has its CRC32.

    Args:
        checkpoint_id: the directory.
        advance: called with bytes that have been read.
        total: called before, with how many there are.

    Raises:
        NotACheckpointError: there is none.
        UnsafeError: it leads out of its directory.
        PermissionError: it may not be read.
    """
    try:
        metadata, seal = read(checkpoint_id)
        tables = ItemTables(metadata, seal.tables)
    except CorruptError as error:
        return [Problem(fqn="", file=METADATA_NAME, problem=error.problem)]
    except ValueError:
        return [Problem(fqn="", file=METADATA_NAME, problem="it names more or fewer files than were written")]
    problems = list(_uncovered(metadata))
    crcs: dict[str, dict[int, int]] = {}
    for file in sorted({info.relative_path for info in metadata.storage_data.values()}):
        crcs[file], problem = _table(checkpoint_id, file, tables)
        problems += [Problem(fqn="", file=file, problem=problem)] if problem else []
    items = sorted(metadata.storage_data.items(), key=lambda item: (item[1].relative_path, item[1].offset))
    total(sum(info.length for _, info in items))

    def check(item: tuple[MetadataIndex, StorageInfo]) -> Problem | None:
        index, info = item
        crc = crcs[info.relative_path].get(info.offset)
        problem = _damage(checkpoint_id, info, _payload_nbytes(metadata, index), crc)
        advance(info.length)
        return Problem(fqn=index.fqn, file=info.relative_path, problem=problem) if problem else None

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # a CRC32 of much data lets go of the GIL
        problems += [problem for problem in pool.map(check, items) if problem is not None]
    return _by_file(problems)


def _by_file(problems: Sequence[Problem]) -> list[Problem]:
    """Tell once of a file what would be told of every value in it."""
    values = Counter(problem.file for problem in problems if problem.problem == MISSING)
    told = [
        Problem(fqn="", file=file, problem=f"{MISSING}, and with it {plural(count, 'value')}")
        for file, count in values.items()
    ]
    return [*told, *(problem for problem in problems if problem.problem != MISSING)]


def _uncovered(metadata: Metadata) -> Iterator[Problem]:
    stored = {(index.fqn, index.offset) for index in metadata.storage_data}
    for fqn, entry in metadata.state_dict_metadata.items():
        offsets: list[torch.Size | None] = [None]
        if isinstance(entry, TensorStorageMetadata):
            offsets = [chunk.offsets for chunk in entry.chunks]
            if not is_whole(entry):
                problem = f"its {len(offsets)} chunks do not make up its shape {tuple(entry.size)}"
                yield Problem(fqn=fqn, file="", problem=problem)
        for offset in offsets:
            if (fqn, offset) not in stored:
                where = "it" if offset is None else f"its chunk at {tuple(offset)}"
                yield Problem(fqn=fqn, file="", problem=f"the metadata does not say where {where} is stored")


def _payload_nbytes(metadata: Metadata, index: MetadataIndex) -> int | None:
    """Return how many bytes a tensor's item must hold at least; None if it is no tensor's."""
    entry = metadata.state_dict_metadata.get(index.fqn)
    if not isinstance(entry, TensorStorageMetadata):
        return None
    for chunk in entry.chunks:
        if chunk.offsets == index.offset:
            return prod(chunk.sizes) * entry.properties.dtype.itemsize
    return None


def _table(checkpoint_id: str, file: str, tables: ItemTables) -> tuple[dict[int, int], str]:
    """Return a file's table of its items, or what is wrong with it; neither, if the file tells by itself."""
    nbytes = tables.nbytes(file)
    if not nbytes:
        return {}, ""
    try:
        with open_inside(checkpoint_id, file) as opened:
            opened.seek(max(0, os.fstat(opened.fileno()).st_size - nbytes))
            return tables.read(file, opened.read()), ""
    except ValueError as error:
        return {}, str(error)
    except (PermissionError, UnsafeError):
        raise
    except OSError:
        return {}, ""


def _damage(checkpoint_id: str, info: StorageInfo, payload_nbytes: int | None, crc: int | None) -> str:
    """Say what is wrong with an item; empty if nothing is."""
    if getattr(info, "transform_descriptors", None):
        return f"is stored through the extensions {info.transform_descriptors}, which this reader has not"
    try:
        with open_inside(checkpoint_id, info.relative_path) as file:
            nbytes = os.fstat(file.fileno()).st_size
            if info.offset + info.length > nbytes:
                return f"the file has {nbytes} bytes, the value ends at {info.offset + info.length}"
            window = _Window(file, info.offset, info.length)
            with zipfile.ZipFile(window) as archive:
                check_records(archive.infolist(), info.length)
                damaged = archive.testzip()
                if damaged is not None:
                    return f"the CRC32 of {damaged} is not the one it was saved with"
                if crc is not None and not is_the_item(crc, lambda: _crc_of(window), archive.infolist()):
                    return "is whole, and is not what was saved there"
                sizes = {each.filename.partition("/")[2]: each.file_size for each in archive.infolist()}
    except FileNotFoundError:
        return MISSING
    except (PermissionError, UnsafeError):  # no damage, for all that is known
        raise
    except OSError as error:
        return f"cannot be read: {error}"
    except Exception as error:  # a damaged archive can raise almost anything
        return f"is not an archive of torch.save: {error!r}"
    if "data.pkl" not in sizes:
        return "is an archive without data.pkl, which torch.save writes"
    held = sum(nbytes for name, nbytes in sizes.items() if name.startswith("data/"))
    if payload_nbytes is not None and held < payload_nbytes:
        return f"holds {held} bytes, its shape and dtype ask for {payload_nbytes}"
    return ""


def _crc_of(window: _Window) -> int:
    window.seek(0)
    return zlib.crc32(window.read())


class _Window(io.RawIOBase):
    """A stretch of a file, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, nbytes: int) -> None:
        self._file = file
        self._start = start
        self._nbytes = nbytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._nbytes}[whence]
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._nbytes - self._position)
        self._file.seek(self._start + self._position)
        data = self._file.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data
