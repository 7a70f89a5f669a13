"""A pickle, written opcode by opcode: what stands in its memo, and where its fields are.

Source of the opcodes: Lib/pickletools.py.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from .pickle_template import MetadataTemplate

NEW = b")\x81}("  # an instance without arguments, and the dict of its state

BUILT = b"ub"  # the dict filled, and the instance with it

_AT_ONCE = 10_000  # pieces


class PickleWriter:
    """Appends opcodes, and knows what is in the pickle's memo."""

    def __init__(self) -> None:
        self._fields: list[tuple[int, bool]] = []  # those that stand between the finished parts
        self._parts: list[bytes] = []
        self._pieces: list[bytes] = [b"\x80\x02"]
        self._memo: dict[Any, int] = {}
        self._gets: dict[Any, bytes] = {}

    def finish(self) -> MetadataTemplate:
        return MetadataTemplate(self._parts, self._fields, self._joined())

    def _joined(self) -> bytes:
        """Take all pieces, some at a time: in one go, 1,000,000 of them would hold the GIL for tens of milliseconds."""
        pieces, self._pieces = self._pieces, []
        blocks = []
        for start in range(0, len(pieces), _AT_ONCE):
            block = pieces[start : start + _AT_ONCE]
            pieces[start : start + _AT_ONCE] = [b""] * len(block)
            blocks.append(b"".join(block))
        return b"".join(blocks)

    def add(self, opcodes: bytes) -> None:
        self._pieces.append(opcodes)

    def field(self, number: int, *, text: bool = True) -> None:
        """Leave a place for what differs from save to save."""
        self._parts.append(self._joined())
        self._fields.append((number, text))

    def remember(self, key: Any) -> None:
        """Put what stands last into the memo."""
        number = self._memo[key] = len(self._memo)
        small = number < 256
        self._pieces.append(struct.pack("<cB", b"q", number) if small else struct.pack("<cI", b"r", number))
        self._gets[key] = get_opcode(number)

    def recall(self, key: Any) -> bool:
        """Write what is in the memo; return False if it is not there."""
        known = self._gets.get(key)
        if known is None:
            return False
        self._pieces.append(known)
        return True

    def wide(self, key: Any) -> bytes:
        """Return the opcode that recalls something, in five bytes whatever its number."""
        return struct.pack("<cI", b"j", self._memo[key])

    def text(self, text: str) -> None:
        if not self.recall(text):
            encoded = text.encode("utf-8", "surrogatepass")
            self._pieces.append(struct.pack("<cI", b"X", len(encoded)) + encoded)
            self.remember(text)

    def kind(self, module: str, name: str) -> None:
        """Write a class or function."""
        if not self.recall((module, name)):
            self._pieces.append(f"c{module}\n{name}\n".encode())
            self.remember((module, name))

    def begin(self, module: str, name: str) -> None:
        """Begin an instance and the dict of its state, which `BUILT` ends."""
        self.kind(module, name)
        self._pieces.append(NEW)

    def integer(self, number: int) -> None:
        self._pieces.append(encode_integer(number))

    def keys(self, values: Sequence[str | int]) -> None:
        """Write a tuple."""
        if len(values) > 3:
            self._pieces.append(b"(")
        for each in values:
            if isinstance(each, str):
                self.text(each)
            else:
                self.integer(each)
        self._pieces.append((b")", b"\x85", b"\x86", b"\x87")[len(values)] if len(values) <= 3 else b"t")

    def each(self, values: Sequence[Any], write: Any) -> None:
        """Write a list."""
        self._pieces.append(b"](" if values else b"]")
        for each in values:
            write(each)
        if values:
            self._pieces.append(b"e")


def get_opcode(number: int) -> bytes:
    """Return the opcode that recalls an entry of the memo."""
    return struct.pack("<cB", b"h", number) if number < 256 else struct.pack("<cI", b"j", number)


def encode_integer(number: int) -> bytes:
    """Return the opcode for an integer, as `pickle` writes it."""
    if 0 <= number < 1 << 8:
        return struct.pack("<cB", b"K", number)
    if 0 <= number < 1 << 16:
        return struct.pack("<cH", b"M", number)
    if -(1 << 31) <= number < 1 << 31:
        return struct.pack("<ci", b"J", number)
    nbytes = number.bit_length() // 8 + 1
    return b"\x8a" + bytes([nbytes]) + number.to_bytes(nbytes, "little", signed=True)
