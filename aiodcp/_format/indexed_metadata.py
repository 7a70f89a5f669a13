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
from .index_columns import Columns, path_of
from .outline import Outline

_AT_ONCE = 2000  # names: what takes long in one go holds up all other threads


class ChunkPattern:
    """How tensors of one size are cut into chunks."""

    def __init__(self, offsets: Array, sizes: Array) -> None:
        self._offsets = offsets
        self._sizes = sizes
        self._wholes: dict[tuple[int, ...], bool] = {}
        self._last: tuple[ChunkStorageMetadata, list[ChunkStorageMetadata]] | None = None  # part, and what is over it

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
        last = self._last
        if last is not None and last[0] == part:  # as where one rank asks for its part of many tensors
            return last[1]
        starts, lengths = np.array(part.offsets, dtype=np.int64), np.array(part.sizes, dtype=np.int64)
        shares = ((self._offsets < starts + lengths) & (self._offsets + self._sizes > starts)).all(axis=1)
        found = [self.chunk(number) for number in np.flatnonzero(shares).tolist()]
        self._last = part, found
        return found

    def makes_up(self, size: torch.Size) -> bool:
        """Whether the chunks make up a tensor of this size."""
        if size not in self._wholes:
            self._wholes[size] = grid_makes_up(self._offsets, self._sizes, size) or is_whole(
                TensorStorageMetadata(properties=TensorProperties(), size=size, chunks=self.chunks)
            )
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


class _Paths(Mapping[str, KeyPath]):
    """The keys that lead to values, by name; most come of the names themselves.

    Attributes:
        numbers: of the names that are stored.
    """

    def __init__(self, names: Sequence[str], splits: Array, odd: Mapping[str, KeyPath]) -> None:
        self._names = names
        self._splits = splits
        self._odd = odd
        self._others = [name for name in odd if name not in self.numbers] if odd else []

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        numbers: dict[str, int] = {}
        for start in range(0, len(self._names), _AT_ONCE):
            names = self._names[start : start + _AT_ONCE]
            numbers.update(zip(names, range(start, start + len(names)), strict=True))
        return numbers

    def __getitem__(self, name: str) -> KeyPath:
        split = int(self._splits[self.numbers[name]]) if name in self.numbers else -1
        return path_of(name, split) if split >= 0 else self._odd[name]

    def __contains__(self, name: object) -> bool:
        return name in self._odd or (name in self.numbers and int(self._splits[self.numbers[str(name)]]) >= 0)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self._names), _AT_ONCE):
            splits = self._splits[start : start + _AT_ONCE].tolist()
            for name, split in zip(self._names[start : start + _AT_ONCE], splits, strict=True):
                if split >= 0 or name in self._odd:
                    yield name
        yield from self._others

    def __len__(self) -> int:
        return int((self._splits >= 0).sum()) + len(self._odd)


class IndexedMetadata(Metadata):
    """What a checkpoint of this library holds, by its columns.

    Attributes:
        places: where chunks lie, in the order of the names.
        file_names: of the files.
    """

    def __init__(self, outline: Outline, columns: Columns) -> None:
        self.places = columns.places
        self.file_names: list[str] = columns.file_names
        self._names: list[str] = list(outline.tensors)
        self._rows: Array = np.cumsum(columns.places.counts) - columns.places.counts
        self._paths = _Paths(self._names, columns.splits, columns.paths)
        patterns = [ChunkPattern(*cut) for cut in columns.places.cuts]
        numbers = columns.places.patterns
        self._patterns: list[ChunkPattern | None] = [*patterns, None]  # the last for -1
        if not np.array_equal(outline.codes < 0, numbers < 0):
            raise ValueError("a tensor without chunks, or chunks without a tensor")
        pairs = outline.codes * len(self._patterns) + numbers  # -1 twice only for what is no tensor
        _, first, alike = np.unique(pairs, return_index=True, return_inverse=True)
        shared: list[STORAGE_TYPES] = []  # by values that are stored alike
        for number in first.tolist():
            code, pattern = int(outline.codes[number]), self._patterns[int(numbers[number])]
            if pattern is None:
                shared.append(BytesStorageMetadata())
                continue
            properties, size = outline.kinds[code]
            if not pattern.makes_up(size):
                raise ValueError(f"chunks that do not make up {self._names[number]}")
            shared.append(IndexedTensor(properties, size, pattern))
        self.state_dict_metadata: dict[str, STORAGE_TYPES] = {}
        for start in range(0, len(self._names), _AT_ONCE):
            entries = map(shared.__getitem__, alike[start : start + _AT_ONCE].tolist())
            self.state_dict_metadata.update(zip(self._names[start : start + _AT_ONCE], entries, strict=True))
        vars(self)["aiodcp"] = {
            "framing": 1,
            "opaque": columns.opaque,
            "empty": columns.containers.empty,
            "int_keys": columns.containers.int_keys,
        }

    @property
    def planner_data(self) -> Mapping[str, KeyPath]:
        """The keys that lead to the values, by name."""
        return self._paths

    def find(self, fqn: str, offsets: torch.Size | None) -> StorageInfo | None:
        """Return where a value lies, or the chunk of a tensor at `offsets`; None if it is nowhere."""
        number, entry = self._paths.numbers.get(fqn), self.state_dict_metadata.get(fqn)
        if number is None:
            return None
        if isinstance(entry, IndexedTensor):
            chunk = entry.pattern.numbers.get(tuple(offsets)) if offsets is not None else None
        else:
            chunk = 0 if offsets is None else None
        return None if chunk is None else self._place(int(self._rows[number]) + chunk)

    def rows_of(self, fqns: Sequence[str]) -> Array:
        """Return where in `places` values lie, or the first chunks of tensors."""
        found = np.zeros(len(fqns), dtype=np.int64)
        for start in range(0, len(fqns), _AT_ONCE):
            these = fqns[start : start + _AT_ONCE]
            if these == self._names[start : start + _AT_ONCE]:  # as where all is loaded that was saved
                found[start : start + _AT_ONCE] = self._rows[start : start + _AT_ONCE]
            else:
                numbers = [*map(self._paths.numbers.__getitem__, these)]
                found[start : start + _AT_ONCE] = self._rows[numbers]
        return found

    def _place(self, row: int) -> StorageInfo:
        places = self.places
        return StorageInfo(self.file_names[places.files.item(row)], places.starts.item(row), places.nbytes.item(row))

    @cached_property
    def storage_data(self) -> Mapping[MetadataIndex, StorageInfo]:
        """All places: an object for each chunk."""
        return dict(self._all_places())

    def _all_places(self) -> Iterator[tuple[MetadataIndex, StorageInfo]]:
        row = 0
        for name, number in zip(self._names, self.places.patterns.tolist(), strict=True):
            pattern = self._patterns[number]
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
