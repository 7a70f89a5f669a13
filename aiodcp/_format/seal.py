"""What stands behind the pickle in `.metadata`: an outline, custom metadata and checksums. No torch here.

Unpickling ends before it, so stock readers do not see it; it is committed in the same instant as the checkpoint, and
the outline and the custom metadata are read without unpickling anything:

    pickle of DCP's Metadata | outline, in pieces | custom metadata, as JSON | a CRC32 for each data file, of the table
    at its end | CRC32 of the pickle | length of the JSON | number of data files | length of the outline | its CRC32 |
    CRC32 of all from the custom metadata on | MARK

The table at the end of a data file has the CRC32 of each item in it: what is an item as it was saved, and yet not the
one that belongs there, is found by that.

The pickle itself says that a seal follows (`CLAIM` is one of its last bytes), and so does each piece of the outline
(`PIECE_CLAIM`), so that a seal whose own mark is damaged, or cut off, is missed. Files of aiodcp 0.1 before this have
no outline (`PLAIN_MARK`), or no checksums either (`OLD_MARK`); those of others have nothing.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

MARK = b"\0aiodcp3"

PLAIN_MARK = b"\0aiodcp2"

OLD_MARK = b"\0aiodcp1"

CLAIM = "sealed behind this pickle"

PIECE_CLAIM = b"sealed behind this piece"

TAIL_NBYTES = 4096
"""Of a file's last bytes: what to read at first, to have the custom metadata of almost any checkpoint."""

_NUMBERS = struct.Struct("<6I")

_PLAIN_NUMBERS = struct.Struct("<4I")

_CRC = struct.Struct("<I")

_LENGTH = struct.Struct("<I")

FOOT_NBYTES = _NUMBERS.size + len(MARK)

_PLAIN_FOOT_NBYTES = _PLAIN_NUMBERS.size + len(PLAIN_MARK)

_PIECE_NBYTES = TAIL_NBYTES // 2

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
        outline_nbytes, outline_crc: of the outline that stands before it, in pieces; 0 if there is none.
        outline: of the whole file only.
    """

    nbytes: int = 0
    custom_metadata: bytes = b""
    crc: int | None = None
    tables: tuple[int, ...] = ()
    outline_nbytes: int = 0
    outline_crc: int = 0
    outline: bytes = b""


def seal(pickled: bytes, custom_metadata: bytes, tables: Sequence[int] = (), outline: bytes = b"") -> bytes:
    """Return the content of `.metadata`.

    Args:
        pickled: DCP's metadata.
        custom_metadata: encoded.
        tables: CRC32s of the data files' tables, in the order of their names.
        outline: as `in_pieces` has it.
    """
    between = custom_metadata + b"".join(map(_CRC.pack, tables))
    numbers = zlib.crc32(pickled), len(custom_metadata), len(tables), len(outline), zlib.crc32(outline)
    own = zlib.crc32(_NUMBERS.pack(*numbers, 0), zlib.crc32(between))
    return b"".join((pickled, outline, between, _NUMBERS.pack(*numbers, own), MARK))


def in_pieces(outline: bytes) -> bytes:
    """Return an outline as it is stored: after each piece of it stands that there is a seal."""
    starts = range(0, len(outline), _PIECE_NBYTES)
    return b"".join(outline[start : start + _PIECE_NBYTES] + PIECE_CLAIM for start in starts)


def _without_claims(pieces: bytes) -> bytes:
    step = _PIECE_NBYTES + len(PIECE_CLAIM)
    return b"".join(pieces[start : start + step][: -len(PIECE_CLAIM)] for start in range(0, len(pieces), step))


def seal_nbytes(tail: bytes) -> int:
    """Return how many of a file's last bytes are its seal, but for the outline, from its last `FOOT_NBYTES` or more.

    0 if it has none.
    """
    if tail.endswith(MARK) and len(tail) >= FOOT_NBYTES:
        _, custom_nbytes, files, *_ = _NUMBERS.unpack_from(tail, len(tail) - FOOT_NBYTES)
        return FOOT_NBYTES + int(custom_nbytes) + _CRC.size * int(files)
    if tail.endswith(PLAIN_MARK) and len(tail) >= _PLAIN_FOOT_NBYTES:
        _, custom_nbytes, files, _ = _PLAIN_NUMBERS.unpack_from(tail, len(tail) - _PLAIN_FOOT_NBYTES)
        return _PLAIN_FOOT_NBYTES + int(custom_nbytes) + _CRC.size * int(files)
    if tail.endswith(OLD_MARK) and len(tail) >= _OLD_FOOT_NBYTES:
        return _OLD_FOOT_NBYTES + int(_LENGTH.unpack_from(tail, len(tail) - _OLD_FOOT_NBYTES)[0])
    return 0


def seal_and_outline_nbytes(tail: bytes) -> int:
    """Return the same with the outline; 0 if there is none."""
    if not tail.endswith(MARK) or len(tail) < FOOT_NBYTES:
        return 0
    *_, outline_nbytes, _, _ = _NUMBERS.unpack_from(tail, len(tail) - FOOT_NBYTES)
    return seal_nbytes(tail) + int(outline_nbytes) if outline_nbytes else 0


def read_seal(tail: bytes) -> Seal:
    """Return the seal in a file's last bytes, as many as `seal_nbytes` says or more.

    Raises:
        SealError: it is damaged, or missing where the pickle says that there is one.
    """
    nbytes = seal_nbytes(tail)
    if not nbytes:
        last = tail[-TAIL_NBYTES:]
        is_bare = last.endswith(b".")  # a pickle that others have rewritten
        if PIECE_CLAIM in last or (CLAIM.encode() in last and not is_bare):
            raise SealError("its checksums are missing")
        return Seal()
    if nbytes > len(tail):
        raise SealError(f"the custom metadata would have {nbytes} bytes")
    if tail.endswith(OLD_MARK):
        return Seal(nbytes=nbytes, custom_metadata=tail[len(tail) - nbytes : len(tail) - _OLD_FOOT_NBYTES])
    outline_nbytes = outline_crc = 0
    if tail.endswith(MARK):
        foot_nbytes, numbers = FOOT_NBYTES, _NUMBERS
        crc, length, files, outline_nbytes, outline_crc, own = numbers.unpack_from(tail, len(tail) - foot_nbytes)
        claimed = numbers.pack(crc, length, files, outline_nbytes, outline_crc, 0)
    else:
        foot_nbytes, numbers = _PLAIN_FOOT_NBYTES, _PLAIN_NUMBERS
        crc, length, files, own = numbers.unpack_from(tail, len(tail) - foot_nbytes)
        claimed = numbers.pack(crc, length, files, 0)
    between = tail[len(tail) - nbytes : len(tail) - foot_nbytes]
    if zlib.crc32(claimed, zlib.crc32(between)) != own:
        raise SealError("CRC32 mismatch in the custom metadata")
    return Seal(
        nbytes=nbytes,
        custom_metadata=between[:length],
        crc=crc,
        tables=tuple(each for (each,) in _CRC.iter_unpack(between[length:])),
        outline_nbytes=outline_nbytes,
        outline_crc=outline_crc,
    )


def open_seal(data: bytes) -> tuple[memoryview, Seal]:
    """Return the pickle of a whole file, and what stands behind it, compared with their checksums.

    Raises:
        SealError: one of them is not what was saved.
    """
    found = open_tail(data)
    pickled = memoryview(data)[: len(data) - found.nbytes - found.outline_nbytes]
    if found.crc is not None and zlib.crc32(pickled) != found.crc:
        raise SealError("CRC32 mismatch")
    return pickled, found


def open_tail(data: bytes) -> Seal:
    """Return what stands behind a pickle, given the end of the file, or all of it.

    Raises:
        SealError: it is not what was saved.
    """
    found = read_seal(data)
    stop = len(data) - found.nbytes
    if found.outline_nbytes > stop:
        raise SealError(f"the outline would have {found.outline_nbytes} bytes")
    outline = memoryview(data)[stop - found.outline_nbytes : stop]
    if zlib.crc32(outline) != found.outline_crc:
        raise SealError("CRC32 mismatch in the outline")
    return replace(found, outline=_without_claims(bytes(outline)))
