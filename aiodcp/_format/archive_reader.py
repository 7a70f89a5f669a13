"""A tensor inside an archive of `torch.save`, found without copying or loading it.

`torch.load` copies an archive twice and holds the GIL meanwhile. What DCP writes are archives of one strided tensor
each: those are taken apart here, and everything else is left to `torch.load`.
Source: `torch.serialization._save`; APPNOTE.TXT of PKWARE for the zip format.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_END = struct.Struct("<4s4H2IH")

_LOCATOR64 = struct.Struct("<4sIQI")

_END64 = struct.Struct("<4sQ2H2I4Q")

_ENTRY = struct.Struct("<4s6H3I5H2I")

_ZIP64 = 0xFFFFFFFF

# Of the header before each record: its length, and where in it the record's length, and those of its name and of what
# follows the name, are.
_LOCAL_NBYTES, _LOCAL_LENGTH, _LOCAL_LENGTHS = 30, 18, 26


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor as it lies in an archive.

    Attributes:
        dtype, sizes, strides: what it is.
        offset: elements, where in the storage it begins.
        start, stop: bytes, where in the archive the storage lies.
        has_checksums: whether the archive has CRC32s; torch can be set to write none.
        crc: of the storage.
    """

    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    start: int
    stop: int
    has_checksums: bool
    crc: int


@dataclass(frozen=True, slots=True)
class _Record:
    start: int
    nbytes: int
    crc: int


def check_records(records: Sequence[zipfile.ZipInfo], nbytes: int) -> None:
    """Refuse an archive that `torch.save` does not write: one that is larger unpacked than packed.

    Raises:
        ValueError: its records are compressed, overlap, or lie outside.
    """
    end = 0
    for record in sorted(records, key=lambda record: record.header_offset):
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise ValueError("it has compressed records")
        if record.header_offset < end:
            raise ValueError("it has records that overlap")
        end = record.header_offset + record.file_size
    if end > nbytes:
        raise ValueError("it has a record that ends outside")


def framed_pickle(data: bytes) -> bytes:
    """Return the pickle in what `frame_value` has made; of anything else, any bytes."""
    start = _LOCAL_NBYTES + len("archive/data.pkl")
    return data[start : start + int.from_bytes(data[_LOCAL_LENGTH : _LOCAL_LENGTH + 4], "little")]


def find_tensor(archive: memoryview, crc32: Callable[[memoryview, int], int] | None) -> StoredTensor | None:
    """Return where the one tensor of an archive lies; None if it is not of that kind, or not as it was saved.

    Args:
        archive: all of it.
        crc32: compares every record with its checksum; None compares none.
    """
    try:
        records = _read_directory(archive)
        prefix = next(name for name in records if name.endswith("/data.pkl")).removesuffix("data.pkl")
        has_checksums = any(record.crc for record in records.values())
        if (
            crc32
            and has_checksums
            and any(crc32(archive[r.start : r.start + r.nbytes], 0) != r.crc for r in records.values())
        ):
            return None
        order = records.get(f"{prefix}byteorder")
        if order and bytes(archive[order.start : order.start + order.nbytes]) != b"little":
            return None
        pickled = records[f"{prefix}data.pkl"]
        found = _TensorUnpickler(io.BytesIO(archive[pickled.start : pickled.start + pickled.nbytes])).load()
        if not isinstance(found, _Found):
            return None
        storage = records[f"{prefix}data/{found.key}"]
        reach = sum((size - 1) * stride for size, stride in zip(found.sizes, found.strides, strict=True))
        last = (found.offset + reach + 1) * found.dtype.itemsize
        if min(found.offset, *found.sizes, *found.strides, 0) < 0 or last > storage.nbytes:
            return None
        if storage.nbytes % found.dtype.itemsize:
            return None
    except Exception:  # whatever is odd about it, torch.load will say what
        return None
    return StoredTensor(
        dtype=found.dtype,
        sizes=found.sizes,
        strides=found.strides,
        offset=found.offset,
        start=storage.start,
        stop=storage.start + storage.nbytes,
        has_checksums=has_checksums,
        crc=storage.crc,
    )


def _read_directory(archive: memoryview) -> dict[str, _Record]:
    """Return the records of a zip archive whose members are stored, not compressed; raise for any other."""
    mark, _, _, _, entries, _, position, comment = _END.unpack_from(archive, archive.nbytes - _END.size)
    if mark != b"PK\5\6" or comment:
        raise ValueError("does not end as an archive without a comment does")
    if position == _ZIP64 or entries == 0xFFFF:
        locator = _LOCATOR64.unpack_from(archive, archive.nbytes - _END.size - _LOCATOR64.size)
        end = _END64.unpack_from(archive, locator[2])
        entries, position = end[7], end[9]
    records: dict[str, _Record] = {}
    for _ in range(entries):
        fields = _ENTRY.unpack_from(archive, position)
        mark, flags, method, crc, nbytes, names, extras, comments = (fields[n] for n in (0, 3, 4, 7, 9, 10, 11, 12))
        if mark != b"PK\1\2" or method or flags & 1:
            raise ValueError("has a record that is compressed, encrypted or none")
        header = fields[16]
        position += _ENTRY.size
        name = bytes(archive[position : position + names]).decode()
        extra = bytes(archive[position + names : position + names + extras])
        position += names + extras + comments
        if _ZIP64 in (nbytes, header):
            nbytes, header = _read_zip64(extra, nbytes, header)
        start = header + _LOCAL_NBYTES + sum(struct.unpack_from("<2H", archive, header + _LOCAL_LENGTHS))
        if start + nbytes > archive.nbytes:
            raise ValueError("has a record beyond its end")
        if name in records:
            raise ValueError("has two records of one name")
        records[name] = _Record(start, nbytes, crc)
    last = 0
    for record in sorted(records.values(), key=lambda record: record.start):
        if record.start < last:
            raise ValueError("has records that overlap")
        last = record.start + record.nbytes
    return records


def _read_zip64(extra: bytes, nbytes: int, header: int) -> tuple[int, int]:
    position = 0
    while True:
        kind, size = struct.unpack_from("<2H", extra, position)
        if kind == 1:
            break
        position += 4 + size
    position += 4
    if nbytes == _ZIP64:  # the size stands twice, as it is and as it is stored
        [nbytes] = struct.unpack_from("<Q", extra, position)
        position += 16
    if header == _ZIP64:
        [header] = struct.unpack_from("<Q", extra, position)
    return nbytes, header


@dataclass(frozen=True, slots=True)
class _Found:
    key: str
    dtype: torch.dtype
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


# The classes themselves would warn that they are deprecated when asked for their dtype.
_STORAGES = {
    "UntypedStorage": torch.uint8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
}

_StoredStorage = tuple[str, torch.dtype]  # the name of its record, and the dtype by which it was saved


def _rebuild_v2(storage: _StoredStorage, offset: int, sizes: Any, strides: Any, *rest: object) -> _Found:
    _refuse_views(rest[2:])
    return _Found(storage[0], storage[1], offset, tuple(sizes), tuple(strides))


def _refuse_views(rest: tuple[object, ...]) -> None:
    if any(rest):
        raise ValueError("conjugate and negative views are left to torch.load")


def _rebuild_v3(storage: _StoredStorage, offset: int, sizes: Any, strides: Any, *rest: Any) -> _Found:
    _refuse_views(rest[3:])
    return _Found(storage[0], rest[2], offset, tuple(sizes), tuple(strides))


class _TensorUnpickler(pickle.Unpickler):
    """Understands the pickle of one strided tensor, and raises for any other."""

    def find_class(self, module: str, name: str) -> Any:
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_v2,
            ("torch._utils", "_rebuild_tensor_v3"): _rebuild_v3,
            ("collections", "OrderedDict"): OrderedDict,
        }
        if (module, name) in known:
            function = known[module, name]
            return lambda *arguments: function(*arguments)
        found = getattr(torch, name) if module == "torch" else None
        if isinstance(found, torch.dtype):
            return found
        if module in ("torch", "torch.storage") and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a plain tensor")

    def persistent_load(self, pid: Any) -> _StoredStorage:
        _, name, key, _, _ = pid
        return key, _STORAGES[name]
