"""Data files of DCP's in its format SAFETENSORS: a `.metadata` as ever, whose places of tensors are wrong.

torch writes the values first, and then all tensors of a file as one safetensors file, of which the metadata says only
where it begins, for each tensor in it, and how many elements that has.
Source: `torch.distributed.checkpoint.filesystem._write_files_from_queue`, torch 2.9 to 2.13.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch

from .._format.dcp import Metadata, MetadataIndex, StorageInfo, TensorStorageMetadata
from .._format.extension import Containers, ForeignLayout, containers_of, set_foreign_layout
from ..errors import CorruptError
from ..storage.base import Storage
from ..storage.error_mapping import read_errors
from .safetensors_files import chunks_of, read_header

WRITTEN_BY = "torch.distributed.checkpoint, as SAFETENSORS"


def _bare_tensors(metadata: Metadata) -> Iterator[tuple[MetadataIndex, StorageInfo, TensorStorageMetadata, torch.Size]]:
    """Return the tensors that have as many bytes as their elements: an archive around them has more."""
    for index, info in metadata.storage_data.items():
        entry = metadata.state_dict_metadata.get(index.fqn)
        if isinstance(entry, TensorStorageMetadata):
            sizes = next((chunk.sizes for chunk in entry.chunks if chunk.offsets == index.offset), None)
            if sizes is None or info.length != prod(sizes) * entry.properties.dtype.itemsize:
                return  # one file has one format
            yield index, info, entry, sizes


async def find_safetensors_items(storage: Storage, checkpoint_id: str, metadata: Metadata) -> None:
    """Put the right places into metadata, if it is of this kind.

    Raises:
        CorruptError: a file is not what the metadata says.
        ReadError: storage failed.
    """
    by_file: dict[tuple[str, int], list[tuple[MetadataIndex, TensorStorageMetadata, torch.Size]]] = {}
    for index, info, entry, sizes in _bare_tensors(metadata):
        by_file.setdefault((info.relative_path, info.offset), []).append((index, entry, sizes))
    found: set[str] = set()
    for (file, offset), items in by_file.items():
        path = storage.describe(checkpoint_id, file)
        with read_errors(path):
            async with storage.open(checkpoint_id, file) as reader:
                header = await read_header(reader, offset, path)
        places = {fqn: (dtype, chunk) for fqn, dtype, chunk in chunks_of(header, file, path)}
        for index, entry, sizes in items:
            dtype, chunk = places.get(index.fqn, (None, None))
            if chunk is None or dtype is not entry.properties.dtype or tuple(sizes) != chunk.sizes:
                raise CorruptError(path, index.fqn, "the file does not have the tensor that the metadata names")
            metadata.storage_data[index] = StorageInfo(file, chunk.offset, chunk.nbytes)
            found.add(index.fqn)
    if found:
        layout = ForeignLayout(written_by=WRITTEN_BY, strides=dict.fromkeys(found))
        set_foreign_layout(metadata, layout, containers_of(metadata) or Containers())
