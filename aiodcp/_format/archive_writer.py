"""`torch.save`'s zip framing around a payload, and around values without tensors. Pure: no files, no clock, no tensors.

An item's *header* ends where its payload begins, on a multiple of 64 bytes; its *trailer* is the archive's directory.
Both depend only on the payload's dtype and shape, except for the payload's CRC32, which stands once in each.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod

import torch

from .alignment import ALIGNMENT, round_up

_FLAG_UTF8 = 0x800

_ZIP64 = 0xFFFFFFFF

_PADDING_ID = 0x4246  # "FB", the extra field that torch.save pads with

_LOCAL = struct.Struct("<IHHHHHIIIHH")

_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")

_END = struct.Struct("<IHHHHIIH")

_END64 = struct.Struct("<IQHHIIQQQQ")

_LOCATOR64 = struct.Struct("<IIQI")

_LOCAL_CRC = 14  # where the CRC32 stands in a local header

_CENTRAL_CRC = 16  # and in an entry of the central directory


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """The bytes around a payload of `nbytes`, whose CRC32 is still to be filled in at two places.

    Attributes:
        dtype, shape, strides: what the payload is: contiguous, if this library has written it.
        header: bytes before the payload; its length is a multiple of `ALIGNMENT`.
        trailer: bytes after it.
        header_crc: where the CRC32 stands in `header`.
        trailer_crc: where it stands in `trailer`.
        item_nbytes: header, payload and trailer.
        is_row_major: whether the strides are those of a contiguous tensor.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    header: bytes
    nbytes: int
    trailer: bytes
    header_crc: int
    trailer_crc: int
    item_nbytes: int
    is_row_major: bool = True


@lru_cache(maxsize=4096)
def frame_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> Frame:
    """Return the bytes that make `torch.load(weights_only=True)` see a contiguous CPU tensor around a payload.

    Source: `torch.serialization._save` and `_load`, whose records `data.pkl`, `version` and `data/0` these are.
    """
    nbytes = prod(shape) * dtype.itemsize
    strides = tuple(prod(max(size, 1) for size in shape[dimension + 1 :]) for dimension in range(len(shape)))
    header, directory = _begin_archive(_pickle_tensor(dtype, shape, strides, nbytes))
    name = b"archive/data/0"
    header_crc = len(header) + _LOCAL_CRC
    trailer_crc = len(directory) + _CENTRAL_CRC
    directory += _central_entry(name, 0, nbytes, len(header))
    header += _local_header(name, 0, nbytes, pad_from=len(header))
    trailer = directory + _end(3, len(directory), len(header) + nbytes)
    return Frame(
        dtype=dtype,
        shape=shape,
        strides=strides,
        header=header,
        nbytes=nbytes,
        trailer=trailer,
        header_crc=header_crc,
        trailer_crc=trailer_crc,
        item_nbytes=len(header) + nbytes + len(trailer),
    )


def with_strides(frame: Frame, strides: tuple[int, ...]) -> Frame:
    """Return the frame of elements that another program has written in another order."""
    return replace(frame, strides=strides, is_row_major=False)


def frame_value(pickled: bytes) -> bytes:
    """Return the archive that makes `torch.load` see a value without tensors, from its pickle."""
    header, directory = _begin_archive(pickled)
    return header + directory + _end(2, len(directory), len(header))


def _begin_archive(pickled: bytes) -> tuple[bytes, bytes]:
    """The two records that every archive begins with, and their entries in the directory."""
    header, directory = b"", b""
    for name, data in ((b"archive/data.pkl", pickled), (b"archive/version", b"3\n")):
        directory += _central_entry(name, zlib.crc32(data), len(data), len(header))
        header += _local_header(name, zlib.crc32(data), len(data)) + data
    return header, directory


def _local_header(name: bytes, crc: int, nbytes: int, pad_from: int | None = None) -> bytes:
    extra, size = b"", nbytes
    if nbytes >= _ZIP64:
        extra, size = struct.pack("<HHQQ", 1, 16, nbytes, nbytes), _ZIP64
    if pad_from is not None:
        start = pad_from + _LOCAL.size + len(name) + len(extra) + 4
        padding = round_up(start, ALIGNMENT) - start
        extra += struct.pack("<HH", _PADDING_ID, padding) + b"Z" * padding
    version = 45 if nbytes >= _ZIP64 else 20
    return _LOCAL.pack(0x04034B50, version, _FLAG_UTF8, 0, 0, 0, crc, size, size, len(name), len(extra)) + name + extra


def _central_entry(name: bytes, crc: int, nbytes: int, offset: int) -> bytes:
    extra, size = b"", nbytes
    if nbytes >= _ZIP64:
        extra, size = struct.pack("<HHQQ", 1, 16, nbytes, nbytes), _ZIP64
    version = 45 if nbytes >= _ZIP64 else 20
    fields = (0x02014B50, version, version, _FLAG_UTF8, 0, 0, 0, crc, size, size, len(name), len(extra))
    return _CENTRAL.pack(*fields, 0, 0, 0, 0, offset) + name + extra


def _end(entries: int, nbytes: int, start: int) -> bytes:
    """The end of an archive whose central directory has `nbytes` bytes and begins at `start`."""
    if start < _ZIP64:
        return _END.pack(0x06054B50, 0, 0, entries, entries, nbytes, start, 0)
    end64 = _END64.pack(0x06064B50, _END64.size - 12, 45, 45, 0, 0, entries, entries, nbytes, start)
    locator = _LOCATOR64.pack(0x07064B50, 0, start + nbytes, 1)
    return end64 + locator + _END.pack(0x06054B50, 0, 0, entries, entries, nbytes, _ZIP64, 0)


class _StorageStandIn:
    """Pickled as the persistent id of the archive's one storage."""


class _TensorStandIn:
    def __init__(self, *fields: object) -> None:
        self.fields = fields

    def __reduce__(self) -> tuple[object, ...]:
        return torch._utils._rebuild_tensor_v3, self.fields


class _FramePickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, nbytes: int) -> None:
        super().__init__(file, protocol=2)
        self._nbytes = nbytes

    def persistent_id(self, obj: object) -> object:
        if isinstance(obj, _StorageStandIn):
            return ("storage", torch.UntypedStorage, "0", "cpu", self._nbytes)
        return None


def _pickle_tensor(dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...], nbytes: int) -> bytes:
    file = io.BytesIO()
    hooks: OrderedDict[str, object] = OrderedDict()
    tensor = _TensorStandIn(_StorageStandIn(), 0, shape, strides, False, hooks, dtype)
    _FramePickler(file, nbytes).dump(tensor)
    return file.getvalue()
