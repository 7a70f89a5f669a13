"""A checkpoint, opened for the command line."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .._format.naming import METADATA_NAME
from ..errors import ArgumentError, NotACheckpointError
from ..manager.step_names import find_names
from ..reader.stored_checkpoint import StoredCheckpoint, open_checkpoint
from ..storage.auto import locate
from ..storage.base import Storage


@asynccontextmanager
async def opened(checkpoint_id: str, storage: Storage | None = None) -> AsyncIterator[StoredCheckpoint]:
    """Open a checkpoint while the block runs.

    Raises:
        ArgumentError: there are steps instead.
        LoadError: see `aiodcp.open`.
    """
    async with naming_steps(checkpoint_id, storage), open_checkpoint(checkpoint_id, storage=storage) as checkpoint:
        yield checkpoint


@asynccontextmanager
async def naming_steps(checkpoint_id: str, storage: Storage | None = None) -> AsyncIterator[None]:
    """Say of a directory of steps that is taken for a checkpoint what it is.

    Raises:
        ArgumentError: instead of a `NotACheckpointError`, if there are steps.
    """
    try:
        yield
    except NotACheckpointError as error:
        newest = await _find_newest_step(*locate(checkpoint_id, storage))
        if not newest:
            raise
        problem = f"{checkpoint_id} is a directory of steps, such as {newest}: see `aiodcp ls`"
        raise ArgumentError("checkpoint", problem) from error


async def _find_newest_step(storage: Storage, root: str) -> str:
    """Return the complete step with the largest number below `root`; empty if there is none."""
    children = await storage.list_children(root)
    names = find_names(children)
    steps = [step for name in children if (step := names.step_of(name)) is not None]
    for step in sorted(steps, reverse=True):
        path = names.path(root, step)
        if METADATA_NAME in await storage.list_files(path):
            return path
    return ""
