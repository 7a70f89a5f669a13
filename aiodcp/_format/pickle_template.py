"""A pickled `Metadata` with placeholders, filled in for each save."""

from __future__ import annotations

import copyreg
import io
import pickle
import re
from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from .dcp import Metadata, TensorProperties
from .pickle_screen import without_memoized_tuples


class Placeholder:
    """A value that differs from save to save, standing in a `PickleTemplate`: an int, or a str where `text` is set."""

    def __init__(self, number: int, *, text: bool = False) -> None:
        self.stand_in: int | str = f"\0aiodcp field {number}\0" if text else _FIRST_FIELD + number


_MARK = b"dcp"  # no offset or length of a file is as large as an int with these bytes above its fourth

_FIRST_FIELD = int.from_bytes(bytes(4) + _MARK + b"\x40", "little")

_INT_FIELD = re.compile(rb"\x8a\x08(....)" + _MARK + rb"\x40", re.DOTALL)  # opcode LONG1, eight bytes

_TEXT_FIELD = re.compile(rb"X....\0aiodcp field (\d+)\0", re.DOTALL)  # opcode BINUNICODE, a length, the text


class PickleTemplate:
    """A pickled `Metadata` with fields to fill in, so that a save need not pickle 10,000 tensors' places again.

    Protocol 2 has no length prefixes around groups of objects, so a field may be cut out and another put in.
    """

    def __init__(self, metadata: Metadata, fields: Sequence[Placeholder]) -> None:
        data = dump_metadata(metadata)
        cuts: list[tuple[int, int, int | str]] = []
        for found in _INT_FIELD.finditer(data):
            cuts.append((found.start(), found.end(), _FIRST_FIELD + int.from_bytes(found[1], "little")))
        for found in _TEXT_FIELD.finditer(data):
            cuts.append((found.start(), found.end(), found[0][5:].decode()))
        cuts.sort(key=itemgetter(0))
        numbers = {field.stand_in: number for number, field in enumerate(fields)}
        assert sorted(numbers, key=str) == sorted((cut[2] for cut in cuts), key=str), "every field stands there once"
        self._parts: list[bytes] = []
        self._order: list[int] = []
        position = 0
        for start, stop, stand_in in cuts:
            self._parts.append(data[position:start])
            self._order.append(numbers[stand_in])
            position = stop
        self._last = data[position:]

    def render(self, values: Sequence[int | str]) -> bytes:
        """Return `.metadata`'s content, with one value for each field, in the fields' order."""
        pieces: list[bytes] = []
        for part, number in zip(self._parts, self._order, strict=True):
            pieces += (part, _opcode(values[number]))
        return b"".join((*pieces, self._last))


def _opcode(value: int | str) -> bytes:
    pickled = pickle.dumps(value, protocol=2)[2:-1]
    return pickled if isinstance(value, int) else pickled[:-2]  # without "remember this as number 0"


class MetadataTemplate:
    """A pickle in parts, with a field between two of them."""

    def __init__(self, parts: Sequence[bytes], fields: Sequence[tuple[int, bool]], last: bytes) -> None:
        """Take the parts before each field, the fields, each a number and whether it is a text, and what is last."""
        self._parts = parts
        self._fields = fields
        self._last = last

    def render(self, values: Sequence[int | str]) -> bytes:
        """Return `.metadata`'s content, given the value of each field."""
        pieces: list[bytes] = []
        for part, (number, _) in zip(self._parts, self._fields, strict=True):
            pieces += (part, _opcode(values[number]))
        return b"".join((*pieces, self._last))


class _MetadataPickler(pickle.Pickler):
    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, TensorProperties):  # five fields, which every torch reads; 2.15 would write six
            return copyreg.__newobj__, (TensorProperties,), obj.__getstate__()[:5]  # type: ignore[attr-defined, no-untyped-call]
        return NotImplemented


def dump_metadata(metadata: Metadata) -> bytes:
    """Return the pickle of metadata, as every reader wants it."""
    file = io.BytesIO()
    _MetadataPickler(file, protocol=2).dump(metadata)
    return without_memoized_tuples(file.getvalue())
