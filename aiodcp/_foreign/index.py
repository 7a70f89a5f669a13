"""What a checkpoint of another format holds and where, and the bytes by which one rank tells the others.

One rank reads the headers; the others are sent what it found, as JSON: nothing of it is unpickled, and it is checked
like any metadata. All else that a load needs is made of it: DCP's `Metadata`.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import TensorProperties

from .._format.dcp import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    KeyPath,
    Metadata,
    MetadataIndex,
    StorageInfo,
    TensorStorageMetadata,
)
from .._format.extension import INLINE, Containers, ForeignLayout, Stamp, set_foreign_layout
from ..storage.base import Reader

MAGIC = b"aiodcp-foreign\n"
"""No `.metadata` begins so: a pickle begins with its protocol."""


def stamp_of(reader: Reader) -> Stamp:
    """Return what tells a file from another one that takes its place."""
    return reader.nbytes, reader.modified_at


@dataclass(frozen=True, slots=True)
class ForeignChunk:
    """Elements that lie bare in a file.

    Attributes:
        offsets, sizes: which of the tensor's.
        file: where.
        offset: bytes, of the first one in the file.
        strides: elements, by dimension; None if they are contiguous.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None


@dataclass(slots=True, kw_only=True)
class ForeignIndex:
    """What a checkpoint of another format holds.

    Attributes:
        written_by: see `ForeignLayout`.
        in_parent: likewise.
        tensors: dtype, and chunks, by fqn.
        values: other values, by fqn, as archives of `torch.save`.
        paths: keys that lead to them, if they are nested.
        containers: what is known of those.
        notes: small facts that the files say of themselves.
        stamps: of the files, by name.
    """

    written_by: str
    in_parent: bool = False
    tensors: dict[str, tuple[torch.dtype, list[ForeignChunk]]] = field(default_factory=dict)
    values: dict[str, bytes] = field(default_factory=dict)
    paths: dict[str, KeyPath] = field(default_factory=dict)
    containers: Containers = field(default_factory=Containers)
    notes: dict[str, str] = field(default_factory=dict)
    stamps: dict[str, Stamp] = field(default_factory=dict)

    def pack(self) -> bytes:
        """Return it as bytes."""
        tensors = {
            fqn: [
                str(dtype).removeprefix("torch."),
                [[c.offsets, c.sizes, c.file, c.offset, c.nbytes, c.strides] for c in chunks],
            ]
            for fqn, (dtype, chunks) in self.tensors.items()
        }
        found = {
            "written_by": self.written_by,
            "in_parent": self.in_parent,
            "tensors": tensors,
            "values": {fqn: base64.b64encode(value).decode() for fqn, value in self.values.items()},
            "paths": self.paths,
            "empty": self.containers.empty,
            "int_keys": self.containers.int_keys,
            "notes": self.notes,
            "stamps": self.stamps,
        }
        return MAGIC + json.dumps(found, separators=(",", ":")).encode()

    @classmethod
    def unpack(cls, data: bytes) -> ForeignIndex:
        """Return what `pack` has made bytes of."""
        found: dict[str, Any] = json.loads(data[len(MAGIC) :])
        return cls(
            written_by=found["written_by"],
            in_parent=found["in_parent"],
            tensors={
                fqn: (
                    getattr(torch, dtype),
                    [
                        ForeignChunk(tuple(o), tuple(s), file, start, n, None if strides is None else tuple(strides))
                        for o, s, file, start, n, strides in chunks
                    ],
                )
                for fqn, (dtype, chunks) in found["tensors"].items()
            },
            values={fqn: base64.b64decode(value) for fqn, value in found["values"].items()},
            paths={fqn: tuple(path) for fqn, path in found["paths"].items()},
            containers=Containers(
                [tuple(path) for path in found["empty"]], [tuple(path) for path in found["int_keys"]]
            ),
            notes=found["notes"],
            stamps={file: (nbytes, modified_at) for file, (nbytes, modified_at) in found["stamps"].items()},
        )

    def to_metadata(self) -> Metadata:
        """Return it as DCP's metadata, marked so that readers know how to find the elements."""
        entries: dict[str, STORAGE_TYPES] = {}
        stored: dict[MetadataIndex, StorageInfo] = {}
        properties: dict[torch.dtype, TensorProperties] = {}
        strides: dict[str, tuple[int, ...] | None] = {}
        for fqn, (dtype, chunks) in self.tensors.items():
            if dtype not in properties:
                properties[dtype] = TensorProperties(dtype=dtype)
            placed = [ChunkStorageMetadata(torch.Size(each.offsets), torch.Size(each.sizes)) for each in chunks]
            size = [max(o + s for o, s in zip(*ends, strict=True)) for ends in _by_dimension(chunks)]
            entries[fqn] = TensorStorageMetadata(properties[dtype], torch.Size(size), placed)
            strides[fqn] = chunks[0].strides
            for chunk, each in zip(placed, chunks, strict=True):
                stored[MetadataIndex(fqn, chunk.offsets)] = StorageInfo(each.file, each.offset, each.nbytes)
        for number, (fqn, value) in enumerate(self.values.items()):
            entries[fqn] = BytesStorageMetadata()
            stored[MetadataIndex(fqn)] = StorageInfo(INLINE, number, len(value))
        metadata = Metadata(entries, self.paths or None, stored)
        layout = ForeignLayout(
            written_by=self.written_by,
            strides=strides,
            inline=list(self.values.values()),
            notes=self.notes,
            in_parent=self.in_parent,
            stamps=self.stamps,
        )
        set_foreign_layout(metadata, layout, self.containers)
        return metadata


def _by_dimension(chunks: list[ForeignChunk]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return by dimension the offsets and the sizes of all chunks."""
    return [
        (tuple(each.offsets[axis] for each in chunks), tuple(each.sizes[axis] for each in chunks))
        for axis in range(len(chunks[0].sizes))
    ]
