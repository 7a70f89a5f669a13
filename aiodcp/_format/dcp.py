"""What is taken from `torch.distributed.checkpoint`'s metadata, its private names included."""

from __future__ import annotations

from torch.distributed.checkpoint.filesystem import _StorageInfo as StorageInfo
from torch.distributed.checkpoint.filesystem import _StoragePrefix as StoragePrefix
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING as MEM_FORMAT_ENCODING
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

__all__ = [
    "MEM_FORMAT_ENCODING",
    "STORAGE_TYPES",
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "KeyPath",
    "Metadata",
    "MetadataIndex",
    "StorageInfo",
    "StorageMeta",
    "StoragePrefix",
    "TensorProperties",
    "TensorStorageMetadata",
]

KeyPath = tuple[str | int, ...]
"""The keys and list indices that lead to a value, as in `Metadata.planner_data`."""
