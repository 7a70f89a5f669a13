"""Where the chunks of one checkpoint lie. Pure."""

from __future__ import annotations

import torch

from .._format.archive_writer import frame_tensor, with_strides
from .._format.chunks import extent
from .._format.dcp import ChunkStorageMetadata, Metadata, StorageInfo, TensorStorageMetadata
from .._format.extension import foreign_layout, framed_by_us, opaque_names
from .._format.indexed_metadata import IndexedMetadata
from ..errors import CorruptError
from .plan import TensorRead

BARE_BELOW = 0.9  # the part of a stored item below which only that is read, and its checksum cannot be compared


class ChunkIndex:
    """Where the pieces of one checkpoint lie."""

    def __init__(self, metadata: Metadata, checkpoint_id: str) -> None:
        self.checkpoint_id = checkpoint_id
        self._is_framed = framed_by_us(metadata)
        layout = foreign_layout(metadata)
        self._bare = layout.strides if layout is not None else {}
        self.opaque = opaque_names(metadata)
        self._metadata = metadata
        # A `MetadataIndex` made and hashed for each look-up costs 3 us.
        self._stored_at: dict[str, dict[torch.Size | None, StorageInfo]] = {}
        if isinstance(metadata, IndexedMetadata):
            return
        for index, info in metadata.storage_data.items():
            if index.fqn in self._stored_at:
                self._stored_at[index.fqn][index.offset] = info
            else:
                self._stored_at[index.fqn] = {index.offset: info}

    def find(self, fqn: str, offsets: torch.Size | None) -> StorageInfo:
        """Return where a value, or the chunk of a tensor at `offsets`, lies."""
        if isinstance(self._metadata, IndexedMetadata):
            info = self._metadata.find(fqn, offsets)
        else:
            info = self._stored_at.get(fqn, {}).get(offsets)
        if info is None:
            raise CorruptError(self.checkpoint_id, fqn, "the metadata has no storage location for it")
        if getattr(info, "transform_descriptors", None):
            problem = f"is stored with the extensions {info.transform_descriptors}, which aiodcp does not support"
            raise CorruptError(self.checkpoint_id, fqn, problem)
        return info

    def read(
        self,
        fqn: str,
        source: str,
        entry: TensorStorageMetadata,
        chunk: ChunkStorageMetadata,
        part: tuple[torch.Size, torch.Size] | None,
        into: torch.Tensor,
    ) -> TensorRead:
        """Read a chunk of a tensor, or a part of it: only its rows, where they are much less than the whole.

        Args:
            fqn: the tensor, by the name under which it is wanted.
            source: by the name under which it is stored.
            entry, chunk: of it.
            part: what is wanted of the chunk; None for all of it.
            into: where that goes.
        """
        dtype, sizes = entry.properties.dtype, chunk.sizes
        info = self.find(source, chunk.offsets)
        if source in self._bare:
            return self._read_bare(fqn, source, info, dtype, sizes, part, into)
        frame = frame_tensor(dtype, tuple(sizes)) if self._is_framed(source) else None
        start, nbytes = info.offset, info.length
        bare = False
        if part is not None and frame is not None:
            first, last = extent(frame, part)
            if last - first < BARE_BELOW * nbytes:
                if frame.item_nbytes != nbytes:
                    raise CorruptError(
                        self.checkpoint_id,
                        fqn,
                        f"is stored as {nbytes} bytes, not the size of {dtype} {tuple(sizes)}",
                    )
                start, nbytes, bare = start + len(frame.header) + first, last - first, True
        return TensorRead(fqn, info.relative_path, start, nbytes, dtype, sizes, frame, part, into, bare)

    def _read_bare(
        self,
        fqn: str,
        source: str,
        info: StorageInfo,
        dtype: torch.dtype,
        sizes: torch.Size,
        part: tuple[torch.Size, torch.Size] | None,
        into: torch.Tensor,
    ) -> TensorRead:
        """Read of elements without a frame, as other formats have them, those that hold the part."""
        frame, strides = frame_tensor(dtype, tuple(sizes)), self._bare[source]
        if strides is not None:
            frame = with_strides(frame, strides)
        part = part or (torch.Size((0,) * len(sizes)), sizes)
        first, last = extent(frame, part)
        return TensorRead(
            fqn, info.relative_path, info.offset + first, last - first, dtype, sizes, frame, part, into, True
        )


def read_rows(
    read: TensorRead,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    start: int,
    offset: int,
) -> None:
    """Change `read`, of an archive of `torch.save`, to read only the rows that hold the part, if that is much less.

    Args:
        read: wants a part.
        dtype, sizes, strides: of the tensor in the archive.
        start: bytes, where in the archive its storage begins.
        offset: elements, where in the storage it begins.
    """
    frame = frame_tensor(read.dtype, tuple(read.sizes))
    if (dtype, sizes, strides) != (read.dtype, tuple(read.sizes), frame.strides) or read.part is None:
        return
    first, last = extent(frame, read.part)
    if last - first < BARE_BELOW * read.nbytes:
        read.offset += start + offset * dtype.itemsize + first
        read.nbytes, read.frame, read.bare = last - first, frame, True
