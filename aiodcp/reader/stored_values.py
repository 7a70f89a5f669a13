"""What a checkpoint says of its values, without reading them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .._format.dcp import TensorStorageMetadata
from .._load.stored_reader import StoredReader


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredChunk:
    """A part of a tensor, as it is stored.

    Attributes:
        offsets, sizes: which elements, by dimension.
        file: where, below the checkpoint.
        offset: bytes, where in the file.
        nbytes: stored, with what is stored around the elements.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor.

    Attributes:
        fqn: its name.
        shape: of the whole tensor.
        dtype: as it is stored.
        nbytes: of its elements.
    """

    fqn: str
    shape: torch.Size
    dtype: torch.dtype
    nbytes: int
    _reader: StoredReader | None = field(default=None, repr=False, compare=False)

    @property
    def path(self) -> tuple[str | int, ...]:
        """The keys and list indices that lead to it in the state dict. Known while the checkpoint is open."""
        return _path(self._reader, self.fqn)

    @property
    def chunks(self) -> tuple[StoredChunk, ...]:
        """How it was sharded: the parts that make it up, one for a tensor that was not. Known while it is open.

        The first time that such a thing is asked for, all of the metadata is read: some microseconds a tensor.
        """
        entry = self._reader.metadata.state_dict_metadata[self.fqn] if self._reader is not None else None
        if self._reader is None or not isinstance(entry, TensorStorageMetadata):
            return ()
        chunks = []
        for chunk in entry.chunks:
            info = self._reader.find(self.fqn, chunk.offsets)
            chunks.append(
                StoredChunk(
                    offsets=tuple(chunk.offsets),
                    sizes=tuple(chunk.sizes),
                    file=info.relative_path,
                    offset=info.offset,
                    nbytes=info.length,
                )
            )
        return tuple(chunks)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredValue:
    """A value that is not a tensor.

    Attributes:
        fqn: its name.
    """

    fqn: str
    _reader: StoredReader = field(repr=False, compare=False)

    @property
    def path(self) -> tuple[str | int, ...]:
        """As of a `StoredTensor`."""
        return _path(self._reader, self.fqn)

    @property
    def nbytes(self) -> int:
        """Stored."""
        return self._reader.find(self.fqn, None).length

    @property
    def file(self) -> str:
        """Where, below the checkpoint; empty if it has none of its own."""
        return self._reader.find(self.fqn, None).relative_path


def _path(reader: StoredReader | None, fqn: str) -> tuple[str | int, ...]:
    paths = (reader.metadata.planner_data or {}) if reader is not None else {}
    return tuple(paths.get(fqn, (fqn,)))


def name_of(dtype: torch.dtype) -> str:
    """Return the short name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
