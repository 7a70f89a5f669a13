"""A checkpoint, read for people: what it says it holds, and its values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import anyio
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
from ..storage.base import Storage
from .locations import locate

PIECE_NBYTES = 256 << 20  # of tensors held in memory at a time, from each of two checkpoints


def read(checkpoint_id: str) -> tuple[Metadata, Seal]:
    """Return what a checkpoint holds, and what stands behind that in its `.metadata`.

    Raises:
        ArgumentError: there are steps instead.
        NotACheckpointError: there is none.
        CorruptError, UnsafeError: see `read_metadata`.
    """
    return anyio.run(read_from, *locate(checkpoint_id))


async def read_from(storage: Storage, checkpoint_id: str) -> tuple[Metadata, Seal]:
    """As `read`, from a storage."""
    try:
        data = await storage.get(checkpoint_id, METADATA_NAME)
    except (FileNotFoundError, NotADirectoryError) as error:
        if newest := await _find_newest_step(storage, checkpoint_id):
            problem = f"{checkpoint_id} is a directory of steps, such as {newest}: see `aiodcp ls`"
            raise ArgumentError("checkpoint", problem) from error
        raise NotACheckpointError(checkpoint_id) from error
    path = storage.describe(checkpoint_id, METADATA_NAME)
    with gc_paused():
        metadata, seal = read_sealed(data, path)
    try:
        decode_custom_metadata(seal.custom_metadata)
    except SealError as error:
        raise CorruptError(path, "", str(error)) from error
    return metadata, seal


async def _find_newest_step(storage: Storage, root: str) -> str:
    """Return the complete step with the largest number below `root`; empty if there is none."""
    steps = [step for name in await storage.list_children(root) if (step := step_of(name)) is not None]
    for step in sorted(steps, reverse=True):
        path = step_path(root, step)
        if METADATA_NAME in await storage.list_files(path):
            return path
    return ""


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


def make_checkpointer(checkpoint_id: str) -> Checkpointer:
    """Return a Checkpointer, still to be entered, that loads what is at `checkpoint_id`."""
    storage, _ = locate(checkpoint_id)
    return Checkpointer(storage=storage, no_dist=True)


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
    """Return the bytes of a tensor's elements; of another value 0."""
    return prod(entry.size) * entry.properties.dtype.itemsize if isinstance(entry, TensorStorageMetadata) else 0


def name_of(dtype: torch.dtype) -> str:
    """Return the short name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
