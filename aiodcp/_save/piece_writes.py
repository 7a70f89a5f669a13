"""One rank's data written as pieces, where a store takes files whole: each by one request, as soon as it is complete.

Several are under way at once, as many as the storage allows, straight from the staging buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import anyio
from anyio import Event

from .._engine.broadcast import Signal
from ..storage.error_mapping import write_errors
from ..storage.retry import RetryingStorage
from .request import SaveJob


class PieceWriter:
    """The pieces of one rank's data file, on their way to storage."""

    def __init__(self, storage: RetryingStorage, job: SaveJob, names: Sequence[str]) -> None:
        self._storage = storage
        self._job = job
        self._names = names

    async def write_staged(
        self, ready: Sequence[Signal], complete: Callable[[int], Coroutine[Any, Any, memoryview]]
    ) -> None:
        """Write each piece once it is `ready`.

        Args:
            ready: set when a piece is staged.
            complete: brings the checksums into a piece, and returns its bytes; with the last, those of the tail.
        """

        async def write(number: int, signal: Signal) -> None:
            await signal.wait()
            await self._put(self._names[number], await complete(number))

        async with anyio.create_task_group() as group:
            for number, signal in enumerate(ready):
                group.start_soon(write, number, signal)

    async def write_windows(self, slots: int, fill: Callable[[int], Coroutine[Any, Any, memoryview]]) -> None:
        """Write piece after piece from memory that has room for `slots` of them.

        Args:
            slots: how many of them are in memory at a time.
            fill: brings a piece into its slot, which is free, complete; with the last, the tail.
        """
        free = [Event() for _ in range(slots)]
        for event in free:
            event.set()

        async def write(number: int, memory: memoryview) -> None:
            await self._put(self._names[number], memory)
            free[number % slots].set()

        async with anyio.create_task_group() as group:
            for number in range(len(self._names)):
                await free[number % slots].wait()
                free[number % slots] = Event()
                group.start_soon(write, number, await fill(number))

    async def _put(self, name: str, data: memoryview) -> None:
        checkpoint_id = self._job.checkpoint_id
        with write_errors(self._storage.describe(checkpoint_id, name)), self._job.timeline.record("write"):
            await self._storage.put_new(checkpoint_id, name, data)
        self._job.log.report(written=data.nbytes)
