"""Which stored names any rank wants. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

_WANTED, _BELOW = 1, 2


def pack_marks(names: Sequence[str], wanted: set[str], is_below: Callable[[str], bool]) -> bytes:
    """Return which of all stored names, sorted, one rank wants, and which are below the names that it asks for."""
    marks = bytes(_WANTED if name in wanted else _BELOW if is_below(name) else 0 for name in names)
    return zlib.compress(marks)


def join_marks(packed: Sequence[bytes]) -> bytes:
    """Return the marks of all ranks together."""
    joined = 0
    length = 0
    for each in packed:
        marks = zlib.decompress(each)
        length = len(marks)
        joined |= int.from_bytes(marks, "little")
    return zlib.compress(joined.to_bytes(length, "little"))


def unwanted(names: Sequence[str], joined: bytes) -> list[str]:
    """Return the names that are below those asked for and that no rank wants."""
    return [name for name, mark in zip(names, zlib.decompress(joined), strict=True) if mark == _BELOW]
