"""What a checkpoint holds and where: DCP's `.metadata`, written portably.

The file is a pickle of `torch.distributed.checkpoint.metadata.Metadata`, written so that torch 2.6 to 2.15 can read it
on Python 3.11 to 3.15. `metadata_reader` reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .dcp import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageInfo,
    StorageMeta,
    TensorStorageMetadata,
)
from .extension import Containers
from .seal import CLAIM

FORMAT_VERSION = "1.0.0"
"""DCP's own, `torch.distributed.checkpoint.filesystem.CURRENT_DCP_VERSION`."""


def build_metadata(
    planned: Metadata,
    paths: Mapping[str, tuple[str | int, ...]] | None,
    stored: Mapping[MetadataIndex, StorageInfo],
    storage_meta: StorageMeta,
    opaque: Sequence[str],
    containers: Containers,
) -> Metadata:
    """Return `planned` completed for writing, equal parts shared so that the pickle is small and quick to read.

    Args:
        planned: what a save planner returns: names, shapes, chunks.
        paths: fqn -> the keys that lead to it in the state dict; None if a planner has not said.
        stored: where each item lies.
        storage_meta: as DCP's; ids are `str` (a pickled `Path` leaks the host's paths, and differs between Pythons).
        opaque: fqns of tensors that lie there as `torch.save` wrote them, not in this library's framing.
        containers: what dotted names do not say of them.
    """
    share: dict[Any, Any] = {}

    def shared(value: Any, key: Any) -> Any:
        return share.setdefault((type(value), key), value)

    entries: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for fqn, entry in planned.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            properties = entry.properties
            chunks = [
                ChunkStorageMetadata(
                    offsets=shared(torch.Size(chunk.offsets), chunk.offsets),
                    sizes=shared(torch.Size(chunk.sizes), chunk.sizes),
                )
                for chunk in entry.chunks
            ]
            size = shared(torch.Size(entry.size), entry.size)
            key = (properties.dtype, str(properties.layout), properties.requires_grad)
            entries[fqn] = TensorStorageMetadata(shared(properties, key), size, chunks)
        else:
            entries[fqn] = entry
    indices = {}
    for index, info in stored.items():
        same = MetadataIndex(index.fqn, None, index.index)
        if index.offset is not None:  # set past the constructor, which makes a `torch.Size` of its own
            object.__setattr__(same, "offset", shared(index.offset, index.offset))
        indices[same] = info
    keys = None if paths is None else {fqn: (*path,) for fqn, path in paths.items()}  # each a tuple of its own
    metadata = Metadata(entries, keys, indices, storage_meta, FORMAT_VERSION)
    # Stock readers ignore further attributes; ours reads tensors in its own framing without parsing archives.
    vars(metadata)["aiodcp"] = {
        "framing": 1,
        "opaque": list(opaque),
        "empty": list(containers.empty),
        "int_keys": list(containers.int_keys),
        CLAIM: True,  # the last: it is looked for in the last bytes
    }
    return metadata
