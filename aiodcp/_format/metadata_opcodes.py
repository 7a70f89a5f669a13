"""DCP's `.metadata`, written as the opcodes of its pickle, straight from arrays: no object a chunk is made.

What comes out is what `pickle` makes of the objects that `metadata_writer` builds, but for the numbers of the memo and
the width of integers, and is of the kind that `pickle_screen` knows. Of a tensor with many chunks all records have one
length, and are made as one array of bytes.

Source of the opcodes: Lib/pickletools.py.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import Array
from .dcp import KeyPath, TensorProperties
from .extension import Containers
from .metadata_writer import FORMAT_VERSION
from .pickle_template import MetadataTemplate
from .seal import CLAIM

MANY = 8
"""Chunks of a tensor from which on their records are made as an array."""

_AT_ONCE = 10_000  # pieces

_METADATA = "torch.distributed.checkpoint.metadata"

_NEW = b")\x81}("  # an instance without arguments, and the dict of its state

_BUILT = b"ub"  # the dict filled, and the instance with it


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorLines:
    """What is said of one tensor.

    Attributes:
        properties: as DCP keeps them.
        size: of the whole.
        offsets, sizes: of its chunks, a row each.
        pattern: the same for tensors of equal offsets and sizes.
        files: of each chunk, which file it lies in.
        starts: bytes, where in the file.
        nbytes: of its archive.
        fields: of chunks that lie in a tail, by their number: the two fields that say where.
    """

    properties: TensorProperties
    size: tuple[int, ...]
    offsets: Array
    sizes: Array
    pattern: Hashable
    files: Array
    starts: Array
    nbytes: Array
    fields: Mapping[int, tuple[int, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLines:
    """What is said of a value that is no tensor: which file it lies in, and the two fields that say where."""

    file: int
    fields: tuple[int, int]


def write_metadata(
    names: Sequence[str],
    lines: Sequence[TensorLines | ValueLines],
    paths: Mapping[str, KeyPath],
    files: Sequence[int],
    checkpoint_id: int,
    save_id: int,
    opaque: Sequence[str],
    containers: Containers,
) -> MetadataTemplate:
    """Return `.metadata` as a template.

    Args:
        names: of all values that are stored.
        lines: what is said of each.
        paths: by name, the keys that lead to it.
        files: the field of each file's name.
        checkpoint_id, save_id: fields, which stand where DCP's `StorageMeta` has them.
        opaque, containers: see `build_metadata`.
    """
    writer = _Writer(files)
    writer.begin(_METADATA, "Metadata")
    writer.text("state_dict_metadata")
    writer.add(b"}(")
    for name, each in zip(names, lines, strict=True):
        writer.entry(name, each)
    writer.add(b"u")
    writer.text("planner_data")
    writer.add(b"}(")
    for name, path in paths.items():
        writer.text(name)
        writer.keys(path)
    writer.add(b"u")
    writer.text("storage_data")
    writer.add(b"}(")
    for name, each in zip(names, lines, strict=True):
        writer.places(name, each)
    writer.add(b"u")
    writer.text("storage_meta")
    writer.begin(_METADATA, "StorageMeta")
    writer.text("checkpoint_id")
    writer.field(checkpoint_id)
    writer.text("save_id")
    writer.field(save_id)
    writer.text("load_id")
    writer.add(b"N")
    writer.text("modules")
    writer.add(b"]" + _BUILT)
    writer.text("version")
    writer.text(FORMAT_VERSION)
    writer.text("aiodcp")
    writer.add(b"}(")
    writer.text("framing")
    writer.integer(1)
    writer.text("opaque")
    writer.each(opaque, writer.text)
    writer.text("empty")
    writer.each(containers.empty, writer.keys)
    writer.text("int_keys")
    writer.each(containers.int_keys, writer.keys)
    writer.text(CLAIM)  # the last: it is looked for in the last bytes
    writer.add(b"\x88u" + _BUILT + b".")
    return writer.finish()


class _Writer:
    """Appends opcodes, and knows what is in the pickle's memo."""

    def __init__(self, files: Sequence[int]) -> None:
        self._fields: list[tuple[int, bool]] = []  # those that stand between the finished parts
        self._parts: list[bytes] = []
        self._pieces: list[bytes] = [b"\x80\x02"]
        self._memo: dict[Any, int] = {}
        self._gets: dict[Any, bytes] = {}
        self._files = files
        self._known_files: set[int] = set()
        self._around: dict[Any, tuple[bytes, bytes, bytes]] = {}  # the name and the numbers of a tensor in one chunk
        self._entries: dict[Any, bytes] = {}  # of tensors that differ in nothing but their names
        self._rows: dict[Any, tuple[Array, bytes]] = {}  # by pattern: numbers of the chunks' offsets, and their list

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
        self._gets[key] = _get(number)

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
        """Begin an instance and the dict of its state, which `_BUILT` ends."""
        self.kind(module, name)
        self._pieces.append(_NEW)

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

    def size(self, size: tuple[int, ...]) -> None:
        """Write a `torch.Size`."""
        if not self.recall(("size", size)):
            self.kind("torch", "Size")
            self.keys(size)
            self._pieces.append(b"\x85R")
            self.remember(("size", size))

    # --- what is said of a value

    def entry(self, name: str, lines: TensorLines | ValueLines) -> None:
        """Write what it is."""
        self.text(name)
        if isinstance(lines, ValueLines):
            self.kind(_METADATA, "BytesStorageMetadata")
            self.add(b")\x81")
            return
        key = id(lines.properties), lines.size, lines.pattern
        known = self._entries.get(key)
        if known is not None:
            self.add(known)
            return
        self.begin(_METADATA, "TensorStorageMetadata")
        self.text("properties")
        self._properties(lines.properties)
        self.text("size")
        self.size(lines.size)
        self.text("chunks")
        self._chunks(lines)
        self.add(_BUILT)
        self._entries[key] = b"".join(
            (
                self._gets[_METADATA, "TensorStorageMetadata"],
                _NEW,
                self._gets["properties"],
                self._gets[_facts(lines.properties)],
                self._gets["size"],
                self._gets["size", lines.size],
                self._gets["chunks"],
                self._rows[lines.pattern][1],
                _BUILT,
            )
        )

    def _properties(self, properties: TensorProperties) -> None:
        facts = _facts(properties)
        if self.recall(facts):
            return
        dtype, layout, requires_grad, memory_format, pin_memory = facts
        self.kind(_METADATA, "TensorProperties")
        self.add(b")\x81")
        self.remember(facts)
        self.add(b"(")
        self.kind("torch", dtype)
        self.kind("torch.serialization", "_get_layout")
        self.text(layout)
        self.add(b"\x85R")
        self.remember(("layout", len(self._memo)))
        self.add(b"\x88" if requires_grad else b"\x89")
        self.kind(_METADATA, "_MEM_FORMAT_ENCODING")
        self.integer(memory_format)
        self.add(b"\x85R")
        self.remember(("memory format", len(self._memo)))
        self.add(b"\x88tb" if pin_memory else b"\x89tb")

    def _chunks(self, lines: TensorLines) -> None:
        """Write the list of a tensor's chunks; of a pattern that has been written already, its bytes."""
        known = self._rows.get(lines.pattern)
        if known is not None:
            self.add(known[1])
            return
        count = len(lines.offsets)
        self.add(b"](" if count != 1 else b"]")
        sizes, numbers = [], []
        for offsets, lengths in zip(lines.offsets.tolist(), lines.sizes.tolist(), strict=True):
            self.begin(_METADATA, "ChunkStorageMetadata")
            self.text("offsets")
            self.size(tuple(offsets))
            self.text("sizes")
            self.size(tuple(lengths))
            self.add(_BUILT)
            numbers.append(self._memo["size", tuple(offsets)])
            sizes.append(self._memo["size", tuple(lengths)])
        self.add(b"e" if count != 1 else b"a")
        record = b"".join(
            (
                self.wide((_METADATA, "ChunkStorageMetadata")) + _NEW,
                self.wide("offsets") + b"j____",
                self.wide("sizes") + b"j____" + _BUILT,
            )
        )
        at_offsets, at_sizes = (record.index(b"____"), record.rindex(b"____"))
        rows = np.tile(np.frombuffer(record, dtype=np.uint8), (count, 1))
        _put(rows, at_offsets, np.array(numbers, dtype="<u4"))
        _put(rows, at_sizes, np.array(sizes, dtype="<u4"))
        opening, closing = (b"](", b"e") if count != 1 else (b"]", b"a")
        self._rows[lines.pattern] = np.array(numbers, dtype=np.int64), opening + rows.tobytes() + closing

    def places(self, name: str, lines: TensorLines | ValueLines) -> None:
        """Write where it lies."""
        if isinstance(lines, ValueLines):
            self._index(name, None, None)
            self._place(lines.file, lines.fields)
            return
        count = len(lines.files)
        is_plain = count >= MANY and not lines.fields and (_METADATA, "MetadataIndex") in self._gets
        if is_plain and self._knows(lines.files):
            self.add(self._many_places(name, lines))
            return
        if count == 1 and not lines.fields and self._place_one(name, lines):
            return
        offsets = self._rows[lines.pattern][0].tolist()
        for number, (file, start, nbytes) in enumerate(
            zip(lines.files.tolist(), lines.starts.tolist(), lines.nbytes.tolist(), strict=True)
        ):
            self._index(name, number, offsets[number])
            self._place(file, lines.fields.get(number), start, nbytes)

    def _place_one(self, name: str, lines: TensorLines) -> bool:
        """Write where a tensor lies that is one chunk; return False if its file's name has not been written yet."""
        file = int(lines.files[0])
        if file not in self._known_files:
            return False
        key = lines.pattern, file
        around = self._around.get(key)
        if around is None:
            gets = self._gets
            offset = int(self._rows[lines.pattern][0][0])
            around = self._around[key] = (
                gets[_METADATA, "MetadataIndex"] + _NEW + gets["fqn"],
                gets["index"]
                + encode_integer(0)
                + gets["offset"]
                + _get(offset)
                + _BUILT
                + gets["torch.distributed.checkpoint.filesystem", "_StorageInfo"]
                + _NEW
                + gets["relative_path"]
                + gets["file", file]
                + gets["offset"],
                gets["length"],
            )
        start, nbytes = encode_integer(int(lines.starts[0])), encode_integer(int(lines.nbytes[0]))
        self._pieces += (around[0], self._gets[name], around[1], start, around[2], nbytes, _BUILT)
        return True

    def _knows(self, files: Array) -> bool:
        """Whether the names of all of these files are in the memo."""
        if len(self._known_files) == len(self._files):
            return True
        return self._known_files.issuperset(np.unique(files).tolist())

    def _index(self, name: str, number: int | None, offset: int | None) -> None:
        """Write the key of a chunk's place, given the number of its offsets in the memo; or of a value's."""
        self.begin(_METADATA, "MetadataIndex")
        self.text("fqn")
        self.text(name)
        self.text("index")
        self.add(b"N" if number is None else encode_integer(number))
        if offset is not None:
            self.text("offset")
            self.add(_get(offset))
        self.add(_BUILT)

    def _place(self, file: int, fields: tuple[int, int] | None, start: int = 0, nbytes: int = 0) -> None:
        self.begin("torch.distributed.checkpoint.filesystem", "_StorageInfo")
        self.text("relative_path")
        if not self.recall(("file", file)):
            self.field(self._files[file])
            self.remember(("file", file))
            self._known_files.add(file)
        self.text("offset")
        self.field(fields[0], text=False) if fields else self.integer(start)
        self.text("length")
        self.field(fields[1], text=False) if fields else self.integer(nbytes)
        self.add(_BUILT)

    def _many_places(self, name: str, lines: TensorLines) -> bytes:
        pieces = [
            self.wide((_METADATA, "MetadataIndex")) + _NEW + self.wide("fqn") + self.wide(name) + self.wide("index"),
            b"J",
            b"____",
            self.wide("offset"),
            b"j",
            b"____",
            _BUILT + self.wide(("torch.distributed.checkpoint.filesystem", "_StorageInfo")) + _NEW,
            self.wide("relative_path"),
            b"j",
            b"____",
            self.wide("offset") + b"\x8a\x08",
            b"________",
            self.wide("length") + b"\x8a\x08",
            b"________",
            _BUILT,
        ]
        begins = np.cumsum([0, *map(len, pieces)]).tolist()
        rows = np.tile(np.frombuffer(b"".join(pieces), dtype=np.uint8), (len(lines.files), 1))
        files = np.array([self._memo["file", file] for file in lines.files.tolist()], dtype="<u4")
        _put(rows, begins[2], np.arange(len(lines.files), dtype="<u4"))
        _put(rows, begins[5], self._rows[lines.pattern][0].astype("<u4"))
        _put(rows, begins[9], files)
        _put(rows, begins[11], lines.starts.astype("<i8"))
        _put(rows, begins[13], lines.nbytes.astype("<i8"))
        return rows.tobytes()


def _get(number: int) -> bytes:
    """Return the opcode that recalls an entry of the memo."""
    return struct.pack("<cB", b"h", number) if number < 256 else struct.pack("<cI", b"j", number)


def _put(rows: npt.NDArray[np.uint8], column: int, numbers: npt.NDArray[Any]) -> None:
    """Write a number into each row."""
    width = numbers.itemsize
    rows[:, column : column + width] = np.ascontiguousarray(numbers).view(np.uint8).reshape(len(rows), width)


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


def _facts(properties: TensorProperties) -> tuple[str, str, bool, int, bool]:
    """Return what a tensor's properties are, as they are pickled."""
    dtype, layout, requires_grad, memory_format, pin_memory = properties.__getstate__()[:5]  # type: ignore[no-untyped-call]
    return str(dtype).removeprefix("torch."), str(layout), requires_grad, memory_format.value, pin_memory
