"""What stands behind the pickle in `.metadata`: custom metadata and checksums. No torch here.

Unpickling ends before it, so stock readers do not see it; it is committed in the same instant as the checkpoint, and
the custom metadata is read without unpickling anything:

    pickle of DCP's Metadata | custom metadata, as JSON | a CRC32 for each data file, of the table at its end |
    CRC32 of the pickle | length of the JSON | number of data files | CRC32 of all since the pickle | MARK

The table at the end of a data file has the CRC32 of each item in it: what is an item as it was saved, and yet not the
one that belongs there, is found by that.

The pickle itself says that a seal follows (`CLAIM` is one of its last bytes), so that a seal whose own mark is damaged
is missed. Files of aiodcp 0.1 before this have `OLD_MARK` and no checksums; those of others have neither.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

MARK = b"\0aiodcp2"

OLD_MARK = b"\0aiodcp1"

CLAIM = "sealed behind this pickle"

TAIL_NBYTES = 4096
"""Of a file's last bytes: what to read at first, to have the custom metadata of almost any checkpoint."""

_NUMBERS = struct.Struct("<4I")

_CRC = struct.Struct("<I")

_LENGTH = struct.Struct("<I")

FOOT_NBYTES = _NUMBERS.size + len(MARK)

_OLD_FOOT_NBYTES = _LENGTH.size + len(OLD_MARK)


class SealError(ValueError):
    """What stands behind the pickle is not what was written there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """What stands behind a pickle.

    Attributes:
        nbytes: of it; 0 if there is nothing.
        custom_metadata: encoded.
        crc: of the pickle; None if it was not stored.
        tables: CRC32s of the tables at the ends of data files, in the order of the files' names.
    """

    nbytes: int = 0
    custom_metadata: bytes = b""
    crc: int | None = None
    tables: tuple[int, ...] = ()


def seal(pickled: bytes, custom_metadata: bytes, tables: Sequence[int] = ()) -> bytes:
    """Return the content of `.metadata`, given the CRC32s of the data files' tables in the order of their names."""
    between = custom_metadata + b"".join(map(_CRC.pack, tables))
    crc = zlib.crc32(pickled)
    own = zlib.crc32(_NUMBERS.pack(crc, len(custom_metadata), len(tables), 0), zlib.crc32(between))
    return b"".join((pickled, between, _NUMBERS.pack(crc, len(custom_metadata), len(tables), own), MARK))


def seal_nbytes(tail: bytes) -> int:
    """Return how many of a file's last bytes are its seal, from its last `FOOT_NBYTES` or more; 0 if it has none."""
    if tail.endswith(MARK) and len(tail) >= FOOT_NBYTES:
        _, custom_nbytes, files, _ = _NUMBERS.unpack_from(tail, len(tail) - FOOT_NBYTES)
        return FOOT_NBYTES + int(custom_nbytes) + _CRC.size * int(files)
    if tail.endswith(OLD_MARK) and len(tail) >= _OLD_FOOT_NBYTES:
        return _OLD_FOOT_NBYTES + int(_LENGTH.unpack_from(tail, len(tail) - _OLD_FOOT_NBYTES)[0])
    return 0


def read_seal(tail: bytes) -> Seal:
    """Return the seal in a file's last bytes, as many as `seal_nbytes` says or more.

    Raises:
        SealError: it is damaged, or missing where the pickle says that there is one.
    """
    nbytes = seal_nbytes(tail)
    if not nbytes:
        if CLAIM.encode() in tail[-TAIL_NBYTES:] and not tail.endswith(b"."):  # a bare pickle: rewritten by others
            raise SealError("its checksums are missing")
        return Seal()
    if nbytes > len(tail):
        raise SealError(f"the custom metadata would have {nbytes} bytes")
    if tail.endswith(OLD_MARK):
        return Seal(nbytes=nbytes, custom_metadata=tail[len(tail) - nbytes : len(tail) - _OLD_FOOT_NBYTES])
    between = tail[len(tail) - nbytes : len(tail) - FOOT_NBYTES]
    crc, length, files, own = _NUMBERS.unpack_from(tail, len(tail) - FOOT_NBYTES)
    if zlib.crc32(_NUMBERS.pack(crc, length, files, 0), zlib.crc32(between)) != own:
        raise SealError("CRC32 mismatch in the custom metadata")
    tables = tuple(each for (each,) in _CRC.iter_unpack(between[length:]))
    return Seal(nbytes=nbytes, custom_metadata=between[:length], crc=crc, tables=tables)


def open_seal(data: bytes) -> tuple[memoryview, Seal]:
    """Return the pickle of a whole file, and what stands behind it, compared with their checksums.

    Raises:
        SealError: one of them is not what was saved.
    """
    found = read_seal(data)
    pickled = memoryview(data)[: len(data) - found.nbytes]
    if found.crc is not None and zlib.crc32(pickled) != found.crc:
        raise SealError("CRC32 mismatch")
    return pickled, found
