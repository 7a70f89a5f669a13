"""A checkpoint of the local file system, read for people: what it says it holds, and its values."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from ._names import METADATA_NAME, step_of, step_place
from ._note import decode_note
from .checkpointer import Checkpointer
from .errors import ArgumentError, CorruptError, LoadError, NotACheckpointError
from .metadata import (
    BytesStorageMetadata,
    Metadata,
    TensorStorageMetadata,
    read_metadata,
)

PIECE_NBYTES = 256 << 20  # of tensors held in memory at a time, from each of two checkpoints


def read(checkpoint_id: str) -> tuple[Metadata, dict[str, Any]]:
    """Return what a checkpoint of the local file system holds, and what is noted of it.

    Raises:
        NotACheckpointError: there is none.
        CorruptError, UnsafeError: see `read_metadata`.
    """
    path = os.path.join(checkpoint_id, METADATA_NAME)
    try:
        data = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        complete = Path(checkpoint_id).glob(f"step-*/{METADATA_NAME}")
        steps = [step for each in complete if (step := step_of(each.parent.name)) is not None]
        if steps:
            newest = step_place(checkpoint_id, max(steps))
            problem = f"{checkpoint_id} is a directory of steps, such as {newest}: see `aiodcp ls`"
            raise ArgumentError("checkpoint", problem) from error
        raise NotACheckpointError(checkpoint_id) from error
    metadata = read_metadata(data, path)
    try:
        wrong = [fqn for fqn, entry in metadata.state_dict_metadata.items() if not _is_sound(entry)]
    except (AttributeError, TypeError) as error:
        raise CorruptError(path, "", f"not a checkpoint's metadata: {error}") from error
    if wrong:
        raise CorruptError(path, wrong[0], "the metadata does not say what it is")
    return metadata, decode_note(data)


def _is_sound(entry: object) -> bool:
    """Whether an entry has the fields that it must have: a damaged pickle may give anything."""
    if not isinstance(entry, TensorStorageMetadata):
        return isinstance(entry, BytesStorageMetadata)
    fields: list[tuple[Any, type]] = [(entry.properties.dtype, torch.dtype), (entry.size, torch.Size)]
    fields += [(part, torch.Size) for chunk in entry.chunks for part in (chunk.offsets, chunk.sizes)]
    return all(isinstance(value, kind) for value, kind in fields)


def pieces(
    entries: Mapping[str, TensorStorageMetadata | BytesStorageMetadata], names: list[str], nbytes: int = PIECE_NBYTES
) -> Iterator[list[str]]:
    """Cut names into groups whose tensors have together at most `nbytes`, or are one."""
    piece: list[str] = []
    held = 0
    for fqn in names:
        if piece and held + nbytes_of(entries[fqn]) > nbytes:
            yield piece
            piece, held = [], 0
        piece.append(fqn)
        held += nbytes_of(entries[fqn])
    if piece:
        yield piece


def load(
    checkpointer: Checkpointer,
    checkpoint_id: str,
    entries: Mapping[str, TensorStorageMetadata | BytesStorageMetadata],
) -> dict[str, Any]:
    """Load values by their names, as they are stored.

    Raises:
        LoadError: they cannot be read, or are of a kind that cannot be loaded into a plain tensor.
    """
    state: dict[str, Any] = {
        fqn: torch.empty(entry.size, dtype=entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None
        for fqn, entry in entries.items()
    }
    try:
        checkpointer.load_sync(state, checkpoint_id, strict=False)
    except RuntimeError as error:
        raise LoadError(f"{checkpoint_id}: holds a tensor that is not a plain one: {error}") from error
    return state


def nbytes_of(entry: TensorStorageMetadata | BytesStorageMetadata) -> int:
    return prod(entry.size) * entry.properties.dtype.itemsize if isinstance(entry, TensorStorageMetadata) else 0


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
