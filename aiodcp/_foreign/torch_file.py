"""A file of `torch.save`, by its directory and its pickle: what is in it, and where the elements of its tensors lie.

The pickle is read on storages without memory; the tensors' bytes are read by who wants them, as from any checkpoint.
"""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections import Counter
from collections.abc import Mapping
from typing import Any

import anyio
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .._engine.task_groups import single_error
from .._engine.threads import Threads, in_thread
from .._format.archive_reader import check_records
from .._format.plain_data import NotPlainError, load_with_storages
from .._state.flatten import Leaves, flatten
from .._state.freeze import freeze
from .._state.plain_tensors import PLAIN_TENSORS, QUANTIZED
from ..errors import CaptureError, CheckpointError, CorruptError, FormatError, UnsafeError
from ..storage.base import Reader, Storage, object_limits
from ..storage.error_mapping import read_errors
from .index import ForeignChunk, ForeignIndex, stamp_of

WRITTEN_BY = "torch.save"

ZIP_MARK = b"PK\3\4"

_LOCAL_NBYTES, _LENGTHS = 30, struct.Struct("<26x2H")  # before a record: the lengths of its name and of what follows

_TAIL_NBYTES = 256 << 10  # read at first: the directory of an archive with two thousand storages

_HEADERS_AT_ONCE = 8

SHARED = 10_000
"""Values that a file may hold beyond those in its pickle, since containers are shared: each takes two bytes there."""


def looks_like_torch_file(start: bytes) -> bool:
    return start.startswith(ZIP_MARK)


def looks_like_old_torch_file(start: bytes) -> bool:
    """Whether a file that begins so is a pickle: what `torch.save` wrote before torch 1.6."""
    return start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5")


async def read_torch_file(
    storage: Storage, folder: str, file: str, threads: Threads, *, weights_only: bool, in_parent: bool = False
) -> ForeignIndex:
    """Return what a file holds.

    Args:
        storage, folder, file: where it is.
        threads: to unpickle in.
        weights_only: whether the file may only have plain data and tensors.
        in_parent: whether the checkpoint's id is the file's.

    Raises:
        CorruptError: it is damaged.
        FormatError: it holds no mapping of names.
        UnsafeError: it needs more than plain data.
        ReadError: storage failed.
    """
    path = storage.describe(folder, file)
    with read_errors(path):
        async with storage.open(folder, file) as reader:
            records = await _read_directory(reader, path)
            names = [name for name in records if name.endswith("/data.pkl")]
            if len(names) != 1:
                raise FormatError(path, "is a zip archive, but not one that torch.save wrote: it has no data.pkl")
            prefix = names[0].removesuffix("data.pkl")
            limits = object_limits(storage, folder)
            stored = [
                info for name, info in records.items() if name.startswith((f"{prefix}data", f"{prefix}byteorder"))
            ]
            starts = await _find_starts(reader, stored, limits.reads_at_once if limits else _HEADERS_AT_ONCE)
            if any(info.compress_type != zipfile.ZIP_STORED for info in stored):
                raise FormatError(path, "is an archive with compressed records: load it with torch.load")

            async def read(name: str) -> bytes:
                data = bytearray(records[name].file_size)
                await reader.read_into(starts[name], [memoryview(data)])
                return bytes(data)

            if f"{prefix}byteorder" in records and await read(f"{prefix}byteorder") != b"little":
                raise FormatError(path, "was written on a machine of the other byte order: load it with torch.load")
            pickled = await read(names[0])
            found = _TorchFile(file, path, prefix, records, starts, weights_only=weights_only, in_parent=in_parent)
            found.index.stamps[file] = stamp_of(reader)
            await in_thread(threads.compute, found.describe, pickled)
            if found.is_unfinished:
                contents = {name: await read(name) for name in found.needed}
                await in_thread(threads.compute, found.fill_in, pickled, contents)
    return found.index


async def _read_directory(reader: Reader, path: str) -> dict[str, zipfile.ZipInfo]:
    """Return the records of an archive, from its end."""
    nbytes = min(_TAIL_NBYTES, reader.nbytes)
    while True:
        tail = bytearray(nbytes)
        await reader.read_into(reader.nbytes - nbytes, [memoryview(tail)])
        try:
            records = zipfile.ZipFile(_Tail(bytes(tail), reader.nbytes)).infolist()
            check_records(records, reader.nbytes)
            return {each.filename: each for each in records}
        except _NotInTailError as error:
            nbytes = reader.nbytes - error.args[0]
        except Exception as error:  # a damaged archive can raise almost anything
            raise CorruptError(path, "", f"not an archive of torch.save: {error!r:.200}") from error


async def _find_starts(reader: Reader, records: list[zipfile.ZipInfo], at_once: int) -> dict[str, int]:
    """Return where in the file each record's bytes begin: behind its header, whose length only that says."""
    starts: dict[str, int] = {}
    limit = anyio.Semaphore(at_once)

    async def look(info: zipfile.ZipInfo) -> None:
        header = bytearray(_LOCAL_NBYTES)
        async with limit:
            await reader.read_into(info.header_offset, [memoryview(header)])
        starts[info.filename] = info.header_offset + _LOCAL_NBYTES + sum(_LENGTHS.unpack(header))

    with single_error():
        async with anyio.create_task_group() as group:
            for info in records:
                group.start_soon(look, info)
    return starts


class _TorchFile:
    """One file, while it is found out what it holds."""

    def __init__(
        self,
        file: str,
        path: str,
        prefix: str,
        records: Mapping[str, zipfile.ZipInfo],
        starts: Mapping[str, int],
        *,
        weights_only: bool,
        in_parent: bool,
    ) -> None:
        self.index = ForeignIndex(written_by=WRITTEN_BY, in_parent=in_parent)
        self._file = file
        self._path = path
        self._prefix = prefix
        self._records = records
        self._starts = starts
        self._weights_only = weights_only
        self._storages: dict[str, torch.UntypedStorage] = {}  # without memory, by record
        self._names: dict[int, str] = {}  # of records, by storage
        self._contents: Mapping[str, bytes] = {}  # of records that are needed
        self._uses: Counter[str] = Counter()  # by record, how many tensors have their elements there
        self._dense: dict[str, set[int]] = {}  # of these, by record, those whose elements are read by who wants them
        self._leaves: Leaves
        self._left: list[int] = []  # leaves that only the storages of their tensors can give

    @property
    def is_unfinished(self) -> bool:
        """Whether there are values that `describe` could not find out."""
        return bool(self._left)

    @property
    def needed(self) -> list[str]:
        """The records that these may need: those in which there is anything else than tensors that are dense."""
        return sorted(name for name, uses in self._uses.items() if uses > len(self._dense.get(name, ())))

    def describe(self, pickled: bytes) -> None:
        """Find out from the pickle what is there."""
        self._leaves = self._flatten(self._load(lambda: self._unpickle(pickled, is_outline=True)), len(pickled))
        index = self.index
        index.containers = self._leaves.containers
        for number, (fqn, value) in enumerate(zip(self._leaves.fqns, self._leaves.values, strict=True)):
            if fqn in index.paths:
                raise FormatError(self._path, f"two of its values have the name {fqn!r}: load it with torch.load")
            index.paths[fqn] = self._leaves.paths[number]
            if isinstance(value, torch.Tensor):
                chunk = self._chunk_of(fqn, value)
                if chunk is None:
                    self._left.append(number)
                else:
                    index.tensors[fqn] = value.dtype, [chunk]
                continue
            frozen = self._freeze(fqn, value)
            if frozen is None:
                self._left.append(number)
            else:
                index.values[fqn] = frozen

    def fill_in(self, pickled: bytes, contents: Mapping[str, bytes]) -> None:
        """Take from records what the pickle alone cannot give: tensors that are not dense, or inside values.

        Args:
            pickled: the pickle.
            contents: the records that are `needed`.
        """
        self._contents = contents
        self._storages.clear()
        leaves = self._flatten(self._load(lambda: self._unpickle(pickled, is_outline=False)), len(pickled))
        for number in self._left:
            fqn = self._leaves.fqns[number]
            try:
                self.index.values[fqn] = freeze(fqn, leaves.values[number]).archive()
            except CaptureError as error:
                problem = f"{fqn} is a {type(leaves.values[number]).__name__}, which only torch.load can give back"
                raise FormatError(self._path, problem) from error

    def _unpickle(self, pickled: bytes, *, is_outline: bool) -> Any:
        return load_with_storages(pickled, self._find_storage, is_outline=is_outline, weights_only=self._weights_only)

    def _load(self, load: Any) -> Any:
        try:
            return load()
        except NotPlainError as error:
            raise UnsafeError(self._path, "", error.problem, error.names) from error
        except (AttributeError, ImportError) as error:
            problem = f"needs a class that this program has not imported: {error}"
            raise UnsafeError(self._path, "", problem) from error
        except CheckpointError:
            raise
        except Exception as error:  # a damaged pickle can raise almost anything
            raise CorruptError(
                self._path, "", f"cannot be unpickled: {type(error).__name__}: {error!s:.200}"
            ) from error

    def _flatten(self, value: Any, pickled_nbytes: int) -> Leaves:
        if not isinstance(value, Mapping):
            problem = f"holds a {type(value).__name__}, not a mapping of names to values: load it with torch.load"
            raise FormatError(self._path, problem)
        if not _is_smaller(value, SHARED + 2 * pickled_nbytes):
            problem = "holds the same containers again and again, or one that contains itself: load it with torch.load"
            raise FormatError(self._path, problem)
        try:
            return flatten(value)
        except CaptureError as error:
            raise FormatError(self._path, f"{error}: load it with torch.load") from error

    def _find_storage(self, pid: Any) -> torch.TypedStorage:
        _, kind, key, _, numel = pid
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        name = f"{self._prefix}data/{key}"
        if name not in self._storages:
            nbytes = int(numel) * dtype.itemsize
            if self._records[name].file_size < nbytes:
                raise CorruptError(self._path, "", f"the record {name:.80} is smaller than the storage in it")
            if name in self._contents:
                content = bytearray(self._contents[name][:nbytes])
                storage = torch.frombuffer(content, dtype=torch.uint8).untyped_storage() if content else _storage(0)
            else:
                storage = _storage(nbytes, device="meta")
            self._storages[name] = storage
            self._names[_identity(storage)] = name
        self._uses[name] += 1
        typed: torch.TypedStorage = _typed_storage(wrap_storage=self._storages[name], dtype=dtype, _internal=True)
        return typed

    def _chunk_of(self, fqn: str, value: torch.Tensor) -> ForeignChunk | None:
        """Return where a tensor's elements lie; None if they do not lie there bare."""
        if type(value) not in PLAIN_TENSORS or value.layout is not torch.strided or value.dtype in QUANTIZED:
            return None
        if not value.is_meta or value.is_conj() or value.is_neg():
            return None
        name = self._names.get(_identity(value.untyped_storage()))
        if name is None:
            return None
        itemsize, shape, strides = value.dtype.itemsize, tuple(value.shape), value.stride()
        if min(strides, default=0) < 0:
            raise CorruptError(self._path, fqn, f"has the strides {strides}, which no tensor has")
        steps = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        nbytes = (steps + 1) * itemsize if value.numel() else 0
        first = int(value.storage_offset()) * itemsize
        if first + nbytes > self._records[name].file_size:
            raise CorruptError(self._path, fqn, "reaches beyond the end of its storage")
        self._dense.setdefault(name, set()).add(id(value))
        start = self._starts[name] + first
        own = None if value.is_contiguous() else strides
        return ForeignChunk((0,) * len(shape), shape, self._file, start, nbytes, own)

    def _freeze(self, fqn: str, value: object) -> bytes | None:
        """Return a value as an archive of `torch.save`; None if tensors are in it."""
        try:
            frozen = freeze(fqn, value)
        except CaptureError:
            return None
        return None if frozen.framed else frozen.archive()


def _is_smaller(value: Any, limit: int) -> bool:
    """Return whether there are fewer than so many values: one that is shared counts wherever it is."""
    count, rest = 0, [value]
    while rest and count < limit:
        each = rest.pop()
        inside = each.values() if isinstance(each, Mapping) else each if type(each) in (list, tuple) else ()
        count += 1 + len(inside)
        rest.extend(below for below in inside if isinstance(below, Mapping | list | tuple))
    return count < limit


_storage: Any = torch.UntypedStorage  # untyped in torch

_typed_storage: Any = torch.TypedStorage


def _identity(storage: torch.UntypedStorage) -> int:
    """Return what is the same for all tensors that have this storage."""
    identity: int = StorageWeakRef(storage).cdata  # type: ignore[no-untyped-call]
    return identity


class _NotInTailError(Exception):
    """A read before the bytes that are there."""


class _Tail(io.RawIOBase):
    """The last bytes of a file, as that file."""

    def __init__(self, tail: bytes, nbytes: int) -> None:
        self._tail = tail
        self._start = nbytes - len(tail)
        self._nbytes = nbytes
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._nbytes}[whence]
        if position < 0:
            raise ValueError(f"a position of {position}")
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        if self._position < self._start:
            raise _NotInTailError(self._position)
        memory = memoryview(buffer).cast("B")
        part = self._tail[self._position - self._start :][: memory.nbytes]
        memory[: len(part)] = part
        self._position += len(part)
        return len(part)
