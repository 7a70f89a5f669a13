"""Whether a checkpoint is whole: all of it is read."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import IO, Any

import anyio
import anyio.from_thread
import anyio.to_thread
import torch

from .._engine.sync_bridge import sync_function
from .._engine.task_groups import single_error
from .._engine.threads import Threads
from .._foreign.find import complete, find_metadata, folder_of, read_found
from .._foreign.torch_file import looks_like_torch_file
from .._format.archive_reader import check_records
from .._format.chunks import is_whole
from .._format.custom_metadata import decode_custom_metadata
from .._format.dcp import Metadata, MetadataIndex, StorageInfo, TensorStorageMetadata
from .._format.extension import INLINE, foreign_layout
from .._format.index_reader import MAGIC as INDEX_MAGIC
from .._format.index_reader import read_index, without_pickle
from .._format.item_tables import ItemCrcs, ItemTables, matches_table
from .._format.naming import METADATA_NAME
from .._format.outline import outline_of
from .._format.seal import SealError
from .._telemetry.progress_bar import Bar, NoBar
from ..checkpointer.arguments import CheckpointId
from ..errors import CorruptError
from ..storage.auto import locate
from ..storage.base import Reader, Storage

MISSING = "the file is missing"

WHOLE_NBYTES = 16 << 20  # up to which an item is read in one go
BUFFER_NBYTES = 8 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What is wrong with a value, or with a file if `fqn` is empty."""

    fqn: str
    file: str
    problem: str


async def verify(
    checkpoint_id: CheckpointId, *, storage: Storage | None = None, bar: Bar | None = None
) -> list[Problem]:
    """Read all of a checkpoint and return all that is wrong with it.

        problems = await aiodcp.verify("run/step-100")

    Checked are: that the chunks of every tensor make it up, and are stored; that every item lies in its file, is an
    archive of `torch.save`, has the payload that it should have, and that every record has its CRC32. Of a file of
    `torch.save` the CRC32s of its records; safetensors have none, and only their headers are compared with their files.

    Args:
        checkpoint_id: which; as for `aiodcp.open`.
        storage: where; by default where the id says.
        bar: told how many bytes there are, by `total`, and have been read, by `advance`.

    Raises:
        NotACheckpointError: there is none.
        FormatError: there is one of a format that is not read.
        UnsafeError: it leads out of its directory.
        PermissionError: it may not be read.

    Cancellation: takes effect when the reads under way are done.
    """
    storage, path = locate(os.fsdecode(checkpoint_id), storage)
    bar = bar or NoBar()
    threads = Threads(copy_threads=1, compute_threads=1, io_threads=1)
    try:
        data = await find_metadata(storage, path, threads, weights_only=True, whole=True)
        metadata, seal = read_found(data, storage.describe(path, METADATA_NAME))
        decode_custom_metadata(seal.custom_metadata)
        await complete(storage, path, metadata, 0)
        tables = ItemTables(metadata, seal.tables)
    except CorruptError as error:
        return [Problem(fqn=error.fqn, file=_file_of(error.path), problem=error.problem)]
    except SealError as error:
        return [Problem(fqn="", file=METADATA_NAME, problem=str(error))]
    except ValueError:
        return [
            Problem(fqn="", file=METADATA_NAME, problem="the number of data files is not the number of checksum tables")
        ]
    finally:
        threads.close()
    if contradiction := _contradiction(data, metadata):
        return [Problem(fqn="", file=METADATA_NAME, problem=contradiction)]
    layout = foreign_layout(metadata)
    if layout is not None:
        return await _verify_foreign(storage, folder_of(path, metadata), metadata, bar)
    return await _verify_items(storage, path, metadata, tables, bar)


def _contradiction(data: bytes, metadata: Metadata) -> str:
    """Return how the index behind the pickle differs from what the pickle says; empty if it does not."""
    tail = without_pickle(data)
    if not tail.startswith(INDEX_MAGIC):
        return ""
    try:
        indexed, _ = read_index(tail, METADATA_NAME)
    except CorruptError as error:
        return error.problem
    is_same = (
        _places(indexed) == _places(metadata)
        and indexed.planner_data == metadata.planner_data
        and outline_of(indexed) == outline_of(metadata)
    )
    return "" if is_same else "its index contradicts its metadata"


def _places(metadata: Metadata) -> dict[tuple[str, torch.Size | None], tuple[str, int, int]]:
    """Return where everything lies, without the objects, which are of classes of their own in what is read."""
    return {
        (index.fqn, index.offset): (info.relative_path, info.offset, info.length)
        for index, info in metadata.storage_data.items()
    }


async def _verify_foreign(storage: Storage, folder: str, metadata: Metadata, bar: Bar) -> list[Problem]:
    """Check the files of another format, whose headers are known to be right."""
    problems = list(_uncovered(metadata))
    for file in sorted({info.relative_path for info in metadata.storage_data.values()} - {INLINE}):
        async with storage.open(folder, file) as reader:
            bar.total(reader.nbytes)
            start = bytearray(min(4, reader.nbytes))
            await reader.read_into(0, [memoryview(start)])
            if looks_like_torch_file(bytes(start)):
                window = io.BufferedReader(_Window(reader, 0, reader.nbytes), BUFFER_NBYTES)
                if problem := await anyio.to_thread.run_sync(_damaged_record, window):
                    problems.append(Problem(fqn="", file=file, problem=problem))
            bar.advance(reader.nbytes)
    return problems


def _damaged_record(file: IO[bytes]) -> str:
    with zipfile.ZipFile(file) as archive:
        if not any(record.CRC for record in archive.infolist()):  # torch can be set to write none
            return ""
        damaged = archive.testzip()
    return f"CRC32 mismatch in record {damaged}" if damaged is not None else ""


async def _verify_items(
    storage: Storage, checkpoint_id: str, metadata: Metadata, tables: ItemTables, bar: Bar
) -> list[Problem]:
    items: dict[str, list[_Item]] = {}
    for index, info in metadata.storage_data.items():
        item = _Item(fqn=index.fqn, info=info, payload_nbytes=_payload_nbytes(metadata, index))
        items.setdefault(info.relative_path, []).append(item)
    bar.total(sum(each.info.length for of_file in items.values() for each in of_file))
    problems = list(_uncovered(metadata))
    limiter = anyio.CapacityLimiter(min(4, os.cpu_count() or 1))
    crcs, damaged = await _read_tables(storage, checkpoint_id, [*items], tables)
    problems += damaged
    for file, of_file in sorted(items.items()):
        of_file.sort(key=lambda each: each.info.offset)
        problems += await _check_file(storage, checkpoint_id, file, of_file, crcs.get(file, {}), limiter, bar.advance)
    return _by_file(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Item:
    """An item of a data file; `payload_nbytes` is how many bytes of a tensor it must hold at least."""

    fqn: str
    info: StorageInfo
    payload_nbytes: int | None


async def _check_file(
    storage: Storage,
    checkpoint_id: str,
    file: str,
    items: Sequence[_Item],
    crcs: Mapping[int, int],
    limiter: anyio.CapacityLimiter,
    advance: Callable[[int], None],
) -> list[Problem]:
    """Read all items of a file, some of them at once, and return what is wrong with them."""
    problems: list[Problem] = []
    try:
        async with storage.open(checkpoint_id, file) as reader:

            async def check(item: _Item) -> None:
                async with limiter:
                    problem = await _check_item(reader, item, crcs.get(item.info.offset))
                if problem:
                    problems.append(Problem(fqn=item.fqn, file=file, problem=problem))
                advance(item.info.length)

            with single_error():
                async with anyio.create_task_group() as group:
                    for item in items:
                        group.start_soon(check, item)
    except FileNotFoundError:
        return [Problem(fqn=each.fqn, file=file, problem=MISSING) for each in items]
    except PermissionError:  # not known to be damage
        raise
    except OSError as error:
        return [Problem(fqn="", file=file, problem=f"cannot be read: {error}")]
    order = {item.fqn: number for number, item in enumerate(items)}
    return sorted(problems, key=lambda each: order.get(each.fqn, -1))


def _by_file(problems: Sequence[Problem]) -> list[Problem]:
    """Report once of a file what would be reported of every value in it."""
    values = Counter(problem.file for problem in problems if problem.problem == MISSING)
    missing = [
        Problem(fqn="", file=file, problem=f"{MISSING} ({count} {'value' if count == 1 else 'values'} lost)")
        for file, count in values.items()
    ]
    return [*missing, *(problem for problem in problems if problem.problem != MISSING)]


def _uncovered(metadata: Metadata) -> Iterator[Problem]:
    stored = {(index.fqn, index.offset) for index in metadata.storage_data}
    for fqn, entry in metadata.state_dict_metadata.items():
        offsets: list[torch.Size | None] = [None]
        if isinstance(entry, TensorStorageMetadata):
            offsets = [chunk.offsets for chunk in entry.chunks]
            if not is_whole(entry):
                problem = f"its {len(offsets)} chunks do not cover its shape exactly: {tuple(entry.size)}"
                yield Problem(fqn=fqn, file="", problem=problem)
        for offset in offsets:
            if (fqn, offset) not in stored:
                where = "it" if offset is None else f"its chunk at {tuple(offset)}"
                yield Problem(fqn=fqn, file="", problem=f"the metadata has no storage location for {where}")


def _payload_nbytes(metadata: Metadata, index: MetadataIndex) -> int | None:
    """Return how many bytes a tensor's item must hold at least; None if it is no tensor's."""
    entry = metadata.state_dict_metadata.get(index.fqn)
    if not isinstance(entry, TensorStorageMetadata):
        return None
    for chunk in entry.chunks:
        if chunk.offsets == index.offset:
            return prod(chunk.sizes) * entry.properties.dtype.itemsize
    return None


async def _read_tables(
    storage: Storage, checkpoint_id: str, files: Sequence[str], tables: ItemTables
) -> tuple[dict[str, ItemCrcs], list[Problem]]:
    """Return the CRC32s of items by file, as the tables have them, and what is wrong with tables."""
    crcs: dict[str, ItemCrcs] = {}
    problems: list[Problem] = []
    for file in sorted({tables.file_of(each) for each in files}):
        nbytes = tables.nbytes(file)
        problem = ""
        try:
            async with storage.open(checkpoint_id, file) as reader:
                if 0 < nbytes <= reader.nbytes:  # else its items are reported
                    table = bytearray(nbytes)
                    await reader.read_into(reader.nbytes - nbytes, [memoryview(table)])
                    crcs.update(tables.read(file, bytes(table)))
        except FileNotFoundError:
            problem = "" if file in files else "the file is missing: it has the checksum table of its pieces"
        except PermissionError:
            raise
        except OSError as error:
            problem = "" if file in files else f"cannot be read: {error}"
        except ValueError as error:
            problem = str(error)
        if problem:
            problems.append(Problem(fqn="", file=file, problem=problem))
    return crcs, problems


async def _check_item(reader: Reader, item: _Item, crc: int | None) -> str:
    """Return what is wrong with an item; empty if nothing is."""
    info = item.info
    if getattr(info, "transform_descriptors", None):
        return f"is stored with the extensions {info.transform_descriptors}, which aiodcp does not support"
    if info.offset + info.length > reader.nbytes:
        return f"truncated: {reader.nbytes} bytes, the value ends at {info.offset + info.length}"
    try:
        if info.length <= WHOLE_NBYTES:
            data = bytearray(info.length)
            await reader.read_into(info.offset, [memoryview(data)])
            file: IO[bytes] = io.BytesIO(data)
        else:
            file = io.BufferedReader(_Window(reader, info.offset, info.length), BUFFER_NBYTES)
        return await anyio.to_thread.run_sync(_damage, file, item, crc)  # a CRC32 of much data releases the GIL
    except OSError as error:
        return f"cannot be read: {error}"


def _damage(file: IO[bytes], item: _Item, crc: int | None) -> str:
    """Return what is wrong with an archive; empty if nothing is. In a worker thread."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            check_records(records, item.info.length)
            damaged = archive.testzip()
    except OSError:
        raise
    except Exception as error:  # a damaged archive can raise almost anything
        return f"is not an archive of torch.save: {error!r}"
    if damaged is not None:
        return f"CRC32 mismatch in record {damaged}"
    if crc is not None and not matches_table(crc, lambda: _crc_of(file), records):
        return "is intact, but is not the item that was saved here"
    sizes = {each.filename.partition("/")[2]: each.file_size for each in records}
    if "data.pkl" not in sizes:
        return "the archive has no data.pkl"
    held = sum(nbytes for name, nbytes in sizes.items() if name.startswith("data/"))
    if item.payload_nbytes is not None and held < item.payload_nbytes:
        return f"holds {held} bytes, but its shape and dtype require {item.payload_nbytes}"
    return ""


def _crc_of(file: IO[bytes]) -> int:
    file.seek(0)
    crc = 0
    while data := file.read(BUFFER_NBYTES):
        crc = zlib.crc32(data, crc)
    return crc


def _file_of(path: str) -> str:
    return path.rpartition("/")[2]


class _Window(io.RawIOBase):
    """A stretch of a file, as a file of its own. Read in a worker thread, it has the event loop read."""

    def __init__(self, reader: Reader, start: int, nbytes: int) -> None:
        self._reader = reader
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

    def readinto(self, buffer: Any) -> int:
        memory = memoryview(buffer).cast("B")
        memory = memory[: max(0, self._nbytes - self._position)]
        if memory.nbytes:
            anyio.from_thread.run(self._reader.read_into, self._start + self._position, [memory])
        self._position += memory.nbytes
        return memory.nbytes


verify_sync = sync_function(verify)
