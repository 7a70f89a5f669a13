"""Leases: steps that are being read, which no process removes meanwhile. No torch here."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager

from anyio.from_thread import start_blocking_portal

from .._format.naming import METADATA_NAME
from ..errors import ArgumentError, NotACheckpointError, ReadError
from ..storage.auto import AutoStorage
from ..storage.base import Storage
from ..storage.error_mapping import write_errors
from ..storage.leases import LEASE_S, Leases
from .watch import WatchedStep


@asynccontextmanager
async def lease(
    step: WatchedStep | str | os.PathLike[str], *, storage: Storage | None = None, lease_s: float = LEASE_S
) -> AsyncIterator[str]:
    """Keep a checkpoint from being removed while the block runs, by a manager or `aiodcp gc` of any process.

        async for step in aiodcp.watch("s3://bucket/run"):
            async with aiodcp.lease(step) as path:
                await checkpointer.load(state, path)

    It is a small file below the checkpoint, renewed while the block runs; it needs the permission to write there. A
    lease that cannot be renewed is reported in the log, and ends after `lease_s`. A step that is to be removed
    meanwhile is removed after a later commit.

    Args:
        step: as `watch` yields it, or the checkpoint's id.
        storage: where it is; by default where its id says.
        lease_s: seconds for which the step is kept when this process is gone.

    Yields:
        The checkpoint's id, to be loaded.

    Raises:
        NotACheckpointError: it is not there, or being removed.
        WriteError: the lease cannot be written.
        ReadError: storage failed.

    Cancellation: as of any block; the lease ends.
    """
    if type(lease_s) not in (int, float) or not 0 < lease_s < float("inf"):
        raise ArgumentError("lease_s", f"must be a positive, finite number of seconds, got {lease_s!r}")
    if isinstance(step, WatchedStep):
        storage = storage or step.storage
        step = step.path
    storage = storage or AutoStorage()
    path = storage.resolve(os.fsdecode(step))
    await _look(storage, path)
    leases = Leases(storage, lease_s=float(lease_s))
    async with AsyncExitStack() as stack:
        with write_errors(storage.describe(path)):
            await stack.enter_async_context(leases.hold(path, exclusive=False))
        await _look(storage, path)  # it may have been removed before
        yield path


@contextmanager
def lease_sync(
    step: WatchedStep | str | os.PathLike[str], *, storage: Storage | None = None, lease_s: float = LEASE_S
) -> Iterator[str]:
    """Like `async with lease(...)`, for callers without an event loop."""
    with start_blocking_portal("asyncio", name="aiodcp lease") as portal:
        with portal.wrap_async_context_manager(lease(step, storage=storage, lease_s=lease_s)) as path:
            yield path


async def _look(storage: Storage, path: str) -> None:
    try:
        async with storage.open(path, METADATA_NAME):
            pass
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotACheckpointError(path) from error
    except OSError as error:
        raise ReadError(storage.describe(path, METADATA_NAME), str(error)) from error
