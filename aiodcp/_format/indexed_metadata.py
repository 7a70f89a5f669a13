"""DCP's `Metadata` on columns: it makes the objects that it is asked for, and no others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .arrays import Array
from .chunks import grid_makes_up, is_whole
from .dcp import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    KeyPath,
    Metadata,
    MetadataIndex,
    StorageInfo,
    TensorProperties,
    TensorStorageMetadata,
)
from .index_columns import Columns
from .outline import Outline


class ChunkPattern:
    """How tensors of one size are cut into chunks."""

    def __init__(self, offsets: Array, sizes: Array) -> None:
        self._offsets = offsets
        self._sizes = sizes
        self._wholes: dict[tuple[int, ...], bool] = {}

    def __len__(self) -> int:
        return len(self._offsets)

    def chunk(self, number: int) -> ChunkStorageMetadata:
        """Return one of the chunks."""
        return ChunkStorageMetadata(
            offsets=torch.Size(self._offsets[number].tolist()), sizes=torch.Size(self._sizes[number].tolist())
        )

    @cached_property
    def chunks(self) -> list[ChunkStorageMetadata]:
        """All of them."""
        return [
            ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
            for offsets, sizes in zip(self._offsets.tolist(), self._sizes.tolist(), strict=True)
        ]

    @cached_property
    def numbers(self) -> Mapping[tuple[int, ...], int]:
        """By their offsets, which of the chunks they are."""
        return {tuple(offsets): number for number, offsets in enumerate(self._offsets.tolist())}

    def over(self, part: ChunkStorageMetadata) -> list[ChunkStorageMetadata]:
        """Return the chunks that share elements with a part of the tensor."""
        if len(self) == 1:
            return self.chunks
        starts, lengths = np.array(part.offsets, dtype=np.int64), np.array(part.sizes, dtype=np.int64)
        shares = ((self._offsets < starts + lengths) & (self._offsets + self._sizes > starts)).all(axis=1)
        return [self.chunk(number) for number in np.flatnonzero(shares).tolist()]

    def makes_up(self, size: torch.Size) -> bool:
        """Whether the chunks make up a tensor of this size."""
        if size not in self._wholes:
            entry = TensorStorageMetadata(properties=TensorProperties(), size=size, chunks=self.chunks)
            self._wholes[size] = grid_makes_up(self._offsets, self._sizes, size) or is_whole(entry)
        return self._wholes[size]


class IndexedTensor(TensorStorageMetadata):
    """What is stored of one tensor; its chunks are made when they are asked for."""

    def __init__(self, properties: TensorProperties, size: torch.Size, pattern: ChunkPattern) -> None:
        self.properties = properties
        self.size = size
        self.pattern: ChunkPattern = pattern

    @property
    def is_whole(self) -> bool:
        """Whether it is stored in one piece."""
        return len(self.pattern) == 1

    def __getattr__(self, name: str) -> Any:
        if name == "chunks":
            return self.pattern.chunks
        raise AttributeError(name)


class IndexedMetadata(Metadata):
    """What a checkpoint of this library holds, by its columns.

    Attributes:
        places: where chunks lie, in the order of the names.
        file_names: of the files.
    """

    def __init__(self, outline: Outline, columns: Columns) -> None:
        self.places = columns.places
        self.file_names: list[str] = columns.file_names
        self._paths = columns.paths
        self._names: list[str] = list(outline.tensors)
        patterns = [ChunkPattern(*cut) for cut in columns.places.cuts]
        self._patterns: list[ChunkPattern | None] = [
            patterns[number] if number >= 0 else None for number in columns.places.patterns.tolist()
        ]
        self._first: dict[str, int] = dict(
            zip(self._names, (np.cumsum(columns.places.counts) - columns.places.counts).tolist(), strict=True)
        )
        entries: dict[str, STORAGE_TYPES] = {}
        for name, kind, properties, pattern in zip(
            self._names, outline.tensors.values(), outline.properties, self._patterns, strict=True
        ):
            if (kind is None) is not (pattern is None) or (kind is None) is not (properties is None):
                raise ValueError("a tensor without chunks, or chunks without a tensor")
            if kind is None or pattern is None or properties is None:
                entries[name] = BytesStorageMetadata()
            else:
                entries[name] = IndexedTensor(properties, kind[1], pattern)
        self.state_dict_metadata = entries
        for name, entry in entries.items():
            if isinstance(entry, IndexedTensor) and not entry.pattern.makes_up(entry.size):
                raise ValueError(f"chunks that do not make up {name}")
        vars(self)["aiodcp"] = {
            "framing": 1,
            "opaque": columns.opaque,
            "empty": columns.containers.empty,
            "int_keys": columns.containers.int_keys,
        }

    @cached_property
    def planner_data(self) -> Mapping[str, KeyPath]:
        """The keys that lead to the values, by name."""
        odd = {name: path for _, name, path in self._paths}
        paths = {name: odd[name] if name in odd else tuple(name.split(".")) for name in self._names}
        return paths | odd

    def find(self, fqn: str, offsets: torch.Size | None) -> StorageInfo | None:
        """Return where a value lies, or the chunk of a tensor at `offsets`; None if it is nowhere."""
        first, entry = self._first.get(fqn), self.state_dict_metadata.get(fqn)
        if first is None:
            return None
        if isinstance(entry, IndexedTensor):
            number = entry.pattern.numbers.get(tuple(offsets)) if offsets is not None else None
        else:
            number = 0 if offsets is None else None
        return None if number is None else self._place(first + number)

    def rows_of(self, fqns: Sequence[str]) -> Array:
        """Return where in `places` values lie, or the first chunks of tensors."""
        return np.fromiter(map(self._first.__getitem__, fqns), dtype=np.int64, count=len(fqns))

    def _place(self, row: int) -> StorageInfo:
        places = self.places
        file = self.file_names[places.files.item(row)]
        return StorageInfo(file, places.starts.item(row), places.nbytes.item(row))

    @cached_property
    def storage_data(self) -> Mapping[MetadataIndex, StorageInfo]:
        """All places: an object for each chunk."""
        return dict(self._all_places())

    def _all_places(self) -> Iterator[tuple[MetadataIndex, StorageInfo]]:
        row = 0
        for name, pattern in zip(self._names, self._patterns, strict=True):
            if pattern is None:
                yield MetadataIndex(name), self._place(row)
                row += 1
                continue
            for number, chunk in enumerate(pattern.chunks):
                yield MetadataIndex(name, chunk.offsets, number), self._place(row)
                row += 1


def chunks_over(entry: TensorStorageMetadata, part: ChunkStorageMetadata) -> list[ChunkStorageMetadata]:
    """Return the chunks that may share elements with a part of a tensor: all of them, unless there are columns."""
    return entry.pattern.over(part) if isinstance(entry, IndexedTensor) else entry.chunks
