"""A note beside a checkpoint's metadata: what its owner wants to know of it without reading it. No torch here.

It stands behind the pickle in `.metadata`, where unpickling ends before it, so it is committed in the same instant as
the checkpoint, and read without unpickling anything:

    pickle of DCP's Metadata | note, as JSON | its length, four bytes | MARK
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

MARK = b"\0aiodcp1"
FOOT_NBYTES = 4 + len(MARK)
TAIL_NBYTES = 4096
"""Of a file's last bytes: what to read at first, to have the note of almost any checkpoint."""

_LENGTH = struct.Struct("<I")


def encode_note(note: Mapping[str, Any]) -> bytes:
    """Return what is to stand behind the pickle.

    Raises:
        TypeError, ValueError: JSON cannot say it.
    """
    data = json.dumps(dict(note), separators=(",", ":")).encode()
    return data + _LENGTH.pack(len(data)) + MARK


def note_nbytes(tail: bytes) -> int:
    """Return how many of a file's last bytes are its note, from its last `FOOT_NBYTES` or more; 0 if it has none."""
    if len(tail) < FOOT_NBYTES or not tail.endswith(MARK):
        return 0
    [length] = _LENGTH.unpack_from(tail, len(tail) - FOOT_NBYTES)
    return int(length) + FOOT_NBYTES


def decode_note(tail: bytes) -> dict[str, Any]:
    """Return the note, from a file's last bytes, as many as `note_nbytes` says or more; empty if it has none."""
    nbytes = note_nbytes(tail)
    if not nbytes or nbytes > len(tail):
        return {}
    try:
        note = json.loads(tail[len(tail) - nbytes : len(tail) - FOOT_NBYTES])
    except (ValueError, RecursionError):  # damaged: a checkpoint is none the worse for it
        return {}
    return note if isinstance(note, dict) else {}
