"""A checkpoint of the local file system, read for people: what it says it holds, and its values."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from .._engine.gc_pause import gc_paused
from .._format.custom_metadata import decode_custom_metadata
from .._format.dcp import BytesStorageMetadata, Metadata, TensorStorageMetadata
from .._format.metadata_reader import read_sealed
from .._format.naming import METADATA_NAME
from .._format.seal import Seal, SealError
from ..checkpointer.checkpointer import Checkpointer
from ..errors import ArgumentError, CorruptError, NotACheckpointError
from ..manager.steps import step_of, step_path
from ..storage.file_access import open_inside

PIECE_NBYTES = 256 << 20  # of tensors held in memory at a time, from each of two checkpoints


def read(checkpoint_id: str) -> tuple[Metadata, Seal]:
    """Return what a checkpoint of the local file system holds, and what stands behind that.

    Raises:
        NotACheckpointError: there is none.
        CorruptError, UnsafeError: see `read_metadata`.
    """
    path = os.path.join(checkpoint_id, METADATA_NAME)
    try:
        with open_inside(checkpoint_id, METADATA_NAME) as file:
            data = file.read()
    except (FileNotFoundError, NotADirectoryError) as error:
        complete = Path(checkpoint_id).glob(f"step-*/{METADATA_NAME}")
        steps = [step for each in complete if (step := step_of(each.parent.name)) is not None]
        if steps:
            newest = step_path(checkpoint_id, max(steps))
            problem = f"{checkpoint_id} is a directory of steps, such as {newest}: see `aiodcp ls`"
            raise ArgumentError("checkpoint", problem) from error
        raise NotACheckpointError(checkpoint_id) from error
    with gc_paused():
        metadata, seal = read_sealed(data, path)
    try:
        decode_custom_metadata(seal.note)
    except SealError as error:
        raise CorruptError(path, "", str(error)) from error
    return metadata, seal


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
        LoadError: they cannot be read.
    """
    state: dict[str, Any] = dict.fromkeys(entries)
    checkpointer.load_sync(state, checkpoint_id)
    return state


def nbytes_of(entry: TensorStorageMetadata | BytesStorageMetadata) -> int:
    return prod(entry.size) * entry.properties.dtype.itemsize if isinstance(entry, TensorStorageMetadata) else 0


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
