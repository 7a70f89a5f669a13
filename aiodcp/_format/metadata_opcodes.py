"""DCP's `.metadata`, written as the opcodes of its pickle, straight from arrays: no object a chunk is made.

What comes out is what `pickle` makes of the objects that `metadata_writer` builds, but for the numbers of the memo and
the width of integers, and is of the kind that `pickle_screen` knows. The records of many chunks have one length, and
are made as one array of bytes: of one tensor, or of tensors that are one chunk each.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from .arrays import Array
from .dcp import KeyPath, TensorProperties
from .extension import Containers
from .metadata_writer import FORMAT_VERSION
from .pickle_opcodes import BUILT, NEW, PickleWriter, encode_integer, get_opcode
from .pickle_template import MetadataTemplate
from .seal import CLAIM

MANY = 8
"""Chunks of a tensor from which on their records are made as an array."""

_AT_ONCE = 10_000  # records

_METADATA = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorKind:
    """What is said of tensors that differ in their names and places only.

    Attributes:
        properties: as DCP keeps them.
        size: of the whole.
        offsets, sizes: of its chunks, a row each.
        pattern: the same for equal offsets and sizes.
    """

    properties: TensorProperties
    size: tuple[int, ...]
    offsets: Array
    sizes: Array
    pattern: Hashable


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkLines:
    """What is stored, and where: tensors in chunks, and other values, which count as one chunk each.

    Attributes:
        names: of all values.
        kinds: of each; None if it is no tensor.
        first: by name, its first chunk; and the end.
        files: by chunk, which file it lies in.
        starts: bytes, where in the file.
        nbytes: of its archive.
        fields: of chunks that lie in a tail: the two fields that say where.
    """

    names: Sequence[str]
    kinds: Sequence[TensorKind | None]
    first: Array
    files: Array
    starts: Array
    nbytes: Array
    fields: Mapping[int, tuple[int, int]]


def write_metadata(
    lines: ChunkLines,
    paths: Mapping[str, KeyPath],
    files: Sequence[int],
    checkpoint_id: int,
    save_id: int,
    opaque: Sequence[str],
    containers: Containers,
) -> MetadataTemplate:
    """Return `.metadata` as a template.

    Args:
        lines: what is stored.
        paths: by name, the keys that lead to it.
        files: the field of each file's name.
        checkpoint_id, save_id: fields, which stand where DCP's `StorageMeta` has them.
        opaque, containers: see `build_metadata`.
    """
    writer = _Writer(files)
    writer.begin(_METADATA, "Metadata")
    writer.text("state_dict_metadata")
    writer.add(b"}(")
    for name, kind in zip(lines.names, lines.kinds, strict=True):
        writer.entry(name, kind)
    writer.add(b"u")
    writer.text("planner_data")
    writer.add(b"}(")
    for name, path in paths.items():
        writer.text(name)
        writer.keys(path)
    writer.add(b"u")
    writer.text("storage_data")
    writer.add(b"}(")
    writer.places(lines)
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
    writer.add(b"]" + BUILT)
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
    writer.add(b"\x88u" + BUILT + b".")
    return writer.finish()


class _Writer(PickleWriter):
    """Appends what `.metadata` says."""

    def __init__(self, files: Sequence[int]) -> None:
        super().__init__()
        self._files = files
        self._known_files: set[int] = set()
        self._entries: dict[int, bytes] = {}  # by the id of their kind
        self._rows: dict[Any, tuple[Array, bytes]] = {}  # by pattern: numbers of the chunks' offsets, and their list

    # --- what is said of a value

    def entry(self, name: str, kind: TensorKind | None) -> None:
        """Write what it is."""
        self.text(name)
        if kind is None:
            self.kind(_METADATA, "BytesStorageMetadata")
            self.add(b")\x81")
            return
        known = self._entries.get(id(kind))
        if known is not None:
            self.add(known)
            return
        self.begin(_METADATA, "TensorStorageMetadata")
        self.text("properties")
        self._properties(kind.properties)
        self.text("size")
        self.size(kind.size)
        self.text("chunks")
        self._chunks(kind)
        self.add(BUILT)
        self._entries[id(kind)] = b"".join(
            (
                self._gets[_METADATA, "TensorStorageMetadata"],
                NEW,
                self._gets["properties"],
                self._gets[_facts(kind.properties)],
                self._gets["size"],
                self._gets["size", kind.size],
                self._gets["chunks"],
                self._rows[kind.pattern][1],
                BUILT,
            )
        )

    def size(self, size: tuple[int, ...]) -> None:
        """Write a `torch.Size`."""
        if not self.recall(("size", size)):
            self.kind("torch", "Size")
            self.keys(size)
            self._pieces.append(b"\x85R")
            self.remember(("size", size))

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

    def _chunks(self, kind: TensorKind) -> None:
        """Write the list of a tensor's chunks; of a pattern that has been written already, its bytes."""
        known = self._rows.get(kind.pattern)
        if known is not None:
            self.add(known[1])
            return
        count = len(kind.offsets)
        self.add(b"](" if count != 1 else b"]")
        sizes, numbers = [], []
        for offsets, lengths in zip(kind.offsets.tolist(), kind.sizes.tolist(), strict=True):
            self.begin(_METADATA, "ChunkStorageMetadata")
            self.text("offsets")
            self.size(tuple(offsets))
            self.text("sizes")
            self.size(tuple(lengths))
            self.add(BUILT)
            numbers.append(self._memo["size", tuple(offsets)])
            sizes.append(self._memo["size", tuple(lengths)])
        self.add(b"e" if count != 1 else b"a")
        record = b"".join(
            (
                self.wide((_METADATA, "ChunkStorageMetadata")) + NEW,
                self.wide("offsets") + b"j____",
                self.wide("sizes") + b"j____" + BUILT,
            )
        )
        at_offsets, at_sizes = (record.index(b"____"), record.rindex(b"____"))
        rows = np.tile(np.frombuffer(record, dtype=np.uint8), (count, 1))
        _put(rows, at_offsets, np.array(numbers, dtype="<u4"))
        _put(rows, at_sizes, np.array(sizes, dtype="<u4"))
        opening, closing = (b"](", b"e") if count != 1 else (b"]", b"a")
        self._rows[kind.pattern] = np.array(numbers, dtype=np.int64), opening + rows.tobytes() + closing

    # --- where it lies

    def places(self, lines: ChunkLines) -> None:
        """Write where everything lies."""
        bounds = lines.first.tolist()
        in_rows = np.ones(len(lines.names), dtype=np.bool_)  # nothing of it lies in a tail
        in_tails = np.fromiter(lines.fields, dtype=np.int64, count=len(lines.fields))
        in_rows[np.searchsorted(lines.first, in_tails, side="right") - 1] = False
        in_one = in_rows & (np.diff(lines.first) == 1)
        changes = np.flatnonzero(in_one[1:] != in_one[:-1]) + 1
        for start, stop in pairwise([0, *changes.tolist(), len(in_one)]):
            if start < stop and in_one[start]:
                for first in range(start, stop, _AT_ONCE):
                    self._places_in_one(lines, first, min(first + _AT_ONCE, stop), bounds)
            else:
                for name in range(start, stop):
                    self._places_of(lines, name, bounds[name], bounds[name + 1], in_rows=bool(in_rows[name]))

    def _places_of(self, lines: ChunkLines, name: int, start: int, stop: int, *, in_rows: bool = True) -> None:
        """Write where the chunks of one tensor lie, or another value."""
        kind = lines.kinds[name]
        if kind is None:
            self._index(lines.names[name], None, None)
            self._place(int(lines.files[start]), lines.fields[start])
            return
        offsets = self._rows[kind.pattern][0]
        files = lines.files[start:stop]
        if in_rows and stop - start >= MANY and (_METADATA, "MetadataIndex") in self._gets and self._knows(files):
            names = np.full(stop - start, self._memo[lines.names[name]])
            self._add_rows(names, np.arange(stop - start), offsets, lines, slice(start, stop))
            return
        numbers = files.tolist(), lines.starts[start:stop].tolist(), lines.nbytes[start:stop].tolist()
        for number, (file, first, nbytes) in enumerate(zip(*numbers, strict=True)):
            self._index(lines.names[name], number, int(offsets[number]))
            self._place(file, lines.fields.get(start + number), first, nbytes)

    def _places_in_one(self, lines: ChunkLines, start: int, stop: int, bounds: Sequence[int]) -> None:
        """Write where tensors lie that are one chunk each."""
        files, at = np.unique(lines.files[bounds[start] : bounds[stop]], return_index=True)
        unnamed = zip(files.tolist(), at.tolist(), strict=True)
        new = sorted(start + place for file, place in unnamed if file not in self._known_files)
        for name in new:
            if start < name:
                self._rows_in_one(lines, start, name, bounds[start])
            self._places_of(lines, name, bounds[name], bounds[name + 1])
            start = name + 1
        self._rows_in_one(lines, start, stop, bounds[start])

    def _rows_in_one(self, lines: ChunkLines, start: int, stop: int, first: int) -> None:
        """Do it with names of files that are in the memo."""
        if start == stop:
            return
        names = np.array([self._memo[name] for name in lines.names[start:stop]])
        kinds = lines.kinds[start:stop]
        offset_of = {id(kind): int(self._rows[kind.pattern][0][0]) for kind in kinds if kind is not None}
        offsets = np.array([offset_of[id(kind)] for kind in kinds])
        self._add_rows(names, np.zeros_like(names), offsets, lines, slice(first, first + stop - start))

    def _knows(self, files: Array) -> bool:
        """Whether the names of all of these files are in the memo."""
        if len(self._known_files) == len(self._files):
            return True
        return self._known_files.issuperset(np.unique(files).tolist())

    def _add_rows(self, names: Array, numbers: Array, offsets: Array, lines: ChunkLines, chunks: slice) -> None:
        """Write where chunks lie, all in one length, given the numbers in the memo of their names and offsets."""
        different, of_chunk = np.unique(lines.files[chunks], return_inverse=True)
        files = np.array([self._memo["file", file] for file in different.tolist()])[of_chunk]
        pieces: list[bytes | npt.NDArray[Any]] = [
            self.wide((_METADATA, "MetadataIndex")) + NEW + self.wide("fqn") + b"j",
            names.astype("<u4"),
            self.wide("index"),
            *_integers(numbers),
            self.wide("offset") + b"j",
            offsets.astype("<u4"),
            BUILT + self.wide(("torch.distributed.checkpoint.filesystem", "_StorageInfo")) + NEW,
            self.wide("relative_path") + b"j",
            files.astype("<u4"),
            self.wide("offset"),
            *_integers(lines.starts[chunks]),
            self.wide("length"),
            *_integers(lines.nbytes[chunks]),
            BUILT,
        ]
        widths = [len(each) if isinstance(each, bytes) else each.itemsize for each in pieces]
        rows = np.empty((len(names), sum(widths)), dtype=np.uint8)
        column = 0
        for each, width in zip(pieces, widths, strict=True):
            if isinstance(each, bytes):
                rows[:, column : column + width] = np.frombuffer(each, dtype=np.uint8)
            else:
                _put(rows, column, each)
            column += width
        self.add(rows.tobytes())

    def _index(self, name: str, number: int | None, offset: int | None) -> None:
        """Write the key of a chunk's place, given the number of its offsets in the memo; or of a value's."""
        self.begin(_METADATA, "MetadataIndex")
        self.text("fqn")
        self.text(name)
        self.text("index")
        self.add(b"N" if number is None else encode_integer(number))
        if offset is not None:
            self.text("offset")
            self.add(get_opcode(offset))
        self.add(BUILT)

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
        self.add(BUILT)


def _put(rows: npt.NDArray[np.uint8], column: int, numbers: npt.NDArray[Any]) -> None:
    """Write a number into each row."""
    width = numbers.itemsize
    rows[:, column : column + width] = np.ascontiguousarray(numbers).view(np.uint8).reshape(len(rows), width)


def _integers(numbers: Array) -> tuple[bytes, npt.NDArray[Any]]:
    """Return an opcode, and what follows it in each row: numbers from 0 on, as wide as the largest."""
    largest = int(numbers.max(initial=0))
    for opcode, kind, stop in ((b"K", "<u1", 1 << 8), (b"M", "<u2", 1 << 16), (b"J", "<i4", 1 << 31)):
        if largest < stop:
            return opcode, numbers.astype(kind)
    return b"\x8a\x08", numbers.astype("<i8")


def _facts(properties: TensorProperties) -> tuple[str, str, bool, int, bool]:
    """Return what a tensor's properties are, as they are pickled."""
    dtype, layout, requires_grad, memory_format, pin_memory = properties.__getstate__()[:5]  # type: ignore[no-untyped-call]
    return str(dtype).removeprefix("torch."), str(layout), requires_grad, memory_format.value, pin_memory
