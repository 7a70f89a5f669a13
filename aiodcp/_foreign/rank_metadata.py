"""Checkpoints of `dcp.save(use_collectives=False)`: each rank has a `.metadata` of its own (`__0.metadata`).

What several ranks have saved under one name is each rank's own, as `dcp.load` reads it: that of the rank that loads,
or of the first one that has it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence

from .._format.dcp import Metadata, TensorStorageMetadata
from .._format.metadata_reader import read_metadata
from ..errors import FormatError
from ..storage.base import Storage
from ..storage.error_mapping import read_errors

_NAME = re.compile(r"__(\d+)\.metadata")

_MARK = "metadata_of_ranks"


def rank_metadata_names(names: Sequence[str]) -> list[str]:
    """Return which of a checkpoint's files are a rank's metadata, by rank."""
    return sorted(filter(_NAME.fullmatch, names), key=_rank_of)


def _rank_of(name: str) -> int:
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else -1


async def join_rank_metadata(storage: Storage, checkpoint_id: str, names: Sequence[str]) -> bytes:
    """Return one `.metadata` of all ranks'.

    Raises:
        CorruptError, UnsafeError: see `read_metadata`.
        FormatError: two ranks say of one tensor that it has another dtype or shape.
        ReadError: storage failed.
    """
    joined = Metadata({}, {}, {})
    for name in names:
        _add(joined, await _read(storage, checkpoint_id, name), storage.describe(checkpoint_id))
    vars(joined)[_MARK] = True
    return pickle.dumps(joined)


async def prefer_own(storage: Storage, checkpoint_id: str, metadata: Metadata, rank: int) -> None:
    """Have a rank read what it has saved itself, if the metadata is one of `join_rank_metadata`."""
    if vars(metadata).get(_MARK) is not True:
        return
    try:
        own = await _read(storage, checkpoint_id, f"__{rank}.metadata")
    except FileNotFoundError:
        return
    for index, info in own.storage_data.items():
        if index in metadata.storage_data:
            metadata.storage_data[index] = info


async def _read(storage: Storage, checkpoint_id: str, name: str) -> Metadata:
    path = storage.describe(checkpoint_id, name)
    try:
        data = await storage.get(checkpoint_id, name)
    except FileNotFoundError:
        raise
    except OSError:
        with read_errors(path):
            raise
    return read_metadata(data, path)


def _add(joined: Metadata, other: Metadata, path: str) -> None:
    for fqn, entry in other.state_dict_metadata.items():
        known = joined.state_dict_metadata.setdefault(fqn, entry)
        if known is entry:
            continue
        if not isinstance(known, TensorStorageMetadata) or not isinstance(entry, TensorStorageMetadata):
            continue
        if known.size != entry.size or known.properties.dtype is not entry.properties.dtype:
            raise FormatError(path, f"{fqn} has another dtype or shape on every rank: load it on each with dcp.load")
        places = {chunk.offsets for chunk in known.chunks}
        known.chunks += [chunk for chunk in entry.chunks if chunk.offsets not in places]
    joined.planner_data = {**(other.planner_data or {}), **joined.planner_data}
    for index, info in other.storage_data.items():
        joined.storage_data.setdefault(index, info)
