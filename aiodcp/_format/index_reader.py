"""`.metadata` of this library without its pickle: what the ranks that load it are sent, and read."""

from __future__ import annotations

import struct
import zlib

from ..errors import CorruptError
from .index_columns import decode_columns
from .indexed_metadata import IndexedMetadata
from .outline import decode_outline, has_columns
from .seal import Seal, SealError, open_seal, open_tail, seal_and_outline_nbytes

MAGIC = b"aiodcp-index\n"
"""No pickle begins so."""

MALFORMED = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    RecursionError,
    OverflowError,
    struct.error,
    zlib.error,
)
"""What decoding a malformed index raises."""


def without_pickle(data: bytes) -> bytes:
    """Return what the columns of a whole `.metadata` need; all of it if it has none, or is damaged."""
    try:
        pickled, _ = open_seal(data)
    except SealError:
        return data
    return index_of_end(data[len(pickled) :]) or data


def index_of_end(end: bytes) -> bytes | None:
    """Return what the columns need, given a `.metadata` from somewhere in its pickle on; None as above."""
    nbytes = seal_and_outline_nbytes(end)
    try:
        outline = open_tail(end).outline
    except SealError:
        return None
    return MAGIC + end[len(end) - nbytes :] if nbytes and has_columns(outline) else None


def read_index(data: bytes, path: str) -> tuple[IndexedMetadata, Seal]:
    """Return what the columns say, and the seal, given what `without_pickle` has returned.

    Raises:
        CorruptError: they are not what was saved.
    """
    try:
        seal = open_tail(data[len(MAGIC) :])
        outline = decode_outline(seal.outline)
        return IndexedMetadata(outline, decode_columns(outline.columns, len(outline.tensors))), seal
    except SealError as error:
        raise CorruptError(path, "", str(error)) from error
    except MALFORMED as error:
        raise CorruptError(path, "", f"its index is malformed: {type(error).__name__}: {error!s:.200}") from error


def open_any_seal(data: bytes) -> Seal:
    """Return the seal of a whole `.metadata`, or of one without its pickle.

    Raises:
        SealError: it is not what was saved.
    """
    return open_tail(data[len(MAGIC) :]) if data.startswith(MAGIC) else open_seal(data)[1]
