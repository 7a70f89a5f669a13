"""A storage in memory whose every call can be made to fail, to wait, or to be counted."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import anyio
import anyio.to_thread

from ..storage.base import Reader, Writer
from ..storage.memory import MemoryStorage

HELD_AT_MOST_S = 30.0


class FaultyStorage(MemoryStorage):
    """A `MemoryStorage` whose every call passes a gate, which may raise, block, or count.

    Attributes:
        calls: names of the calls made so far: "create", "write", "sync" (when a file is made durable), "open",
            "read", "put", "get", "remove" and "remove_tree".
        gate: called with each name before the call is carried out, on the library's event loop; what it returns is
            awaited, unless it is None.
        fail_once: raised by the next `put` that passes its gate.
        open_files: how many files are open.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.gate: Callable[[str], Awaitable[object] | None] = lambda call: None
        self.fail_once: OSError | None = None
        self.open_files: int = 0

    async def enter(self, call: str) -> None:
        """Count a call, and let it pass the gate."""
        self.calls.append(call)
        answer = self.gate(call)
        if answer is not None:
            await answer

    @asynccontextmanager
    async def create(self, checkpoint_id: str, name: str) -> AsyncIterator[Writer]:  # type: ignore[override]
        await self.enter("create")
        async with super().create(checkpoint_id, name) as writer:
            self.open_files += 1
            try:
                yield _FaultyWriter(self, writer)
                await self.enter("sync")
            finally:
                self.open_files -= 1

    @asynccontextmanager
    async def open(self, checkpoint_id: str, name: str) -> AsyncIterator[Reader]:  # type: ignore[override]
        await self.enter("open")
        async with super().open(checkpoint_id, name) as reader:
            self.open_files += 1
            try:
                yield _FaultyReader(self, reader)
            finally:
                self.open_files -= 1

    async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
        await self.enter("put")
        if self.fail_once is not None:
            error, self.fail_once = self.fail_once, None
            raise error
        await super().put(checkpoint_id, name, data)

    async def get(self, checkpoint_id: str, name: str) -> bytes:
        await self.enter("get")
        return await super().get(checkpoint_id, name)

    async def remove(self, checkpoint_id: str, name: str, *, durable: bool = False) -> None:
        await self.enter("remove")
        await super().remove(checkpoint_id, name, durable=durable)

    async def remove_tree(self, checkpoint_id: str) -> None:
        await self.enter("remove_tree")
        await super().remove_tree(checkpoint_id)


class _FaultyWriter:
    def __init__(self, storage: FaultyStorage, writer: Writer) -> None:
        self._storage = storage
        self._writer = writer

    async def write(self, offset: int, data: memoryview) -> None:
        await self._storage.enter("write")
        await self._writer.write(offset, data)


class _FaultyReader:
    def __init__(self, storage: FaultyStorage, reader: Reader) -> None:
        self._storage = storage
        self._reader = reader
        self.nbytes = reader.nbytes
        self.modified_at = reader.modified_at

    async def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        await self._storage.enter("read")
        await self._reader.read_into(offset, buffers)


class Gate:
    """Holds the calls of one kind until it is opened, from any thread: `storage.gate = Gate("write")`.

    Attributes:
        reached: set when a call is held.
    """

    def __init__(self, call: str) -> None:
        self._call = call
        self.reached: threading.Event = threading.Event()
        self._open = threading.Event()

    def __call__(self, call: str) -> Awaitable[object] | None:
        return self._hold() if call == self._call and not self._open.is_set() else None

    async def _hold(self) -> None:
        self.reached.set()
        until = time.monotonic() + HELD_AT_MOST_S
        while not self._open.is_set():
            if time.monotonic() > until:  # the test has failed, and leaving its Checkpointer waits for this call
                raise OSError(f"{self._call} was held for {HELD_AT_MOST_S} s and never let go")
            await anyio.sleep(0.001)

    def open(self) -> None:
        """Let all calls pass, those that are held and those to come."""
        self._open.set()

    async def wait_reached(self) -> None:
        """Wait until a call is held."""
        if not await anyio.to_thread.run_sync(self.reached.wait, HELD_AT_MOST_S):
            raise TimeoutError(f"no call of {self._call!r} within {HELD_AT_MOST_S} s")
