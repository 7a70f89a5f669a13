"""What is taken from torch of the metadata's classes, private names included."""

from __future__ import annotations

import torch
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
    "layout_named",
]

KeyPath = tuple[str | int, ...]
"""The keys and list indices that lead to a value, as in `Metadata.planner_data`."""


def layout_named(name: str) -> torch.layout:
    """Return the layout that torch calls so in its archives."""
    layout: torch.layout = torch.serialization._get_layout(name)  # type: ignore[no-untyped-call]
    return layout
