"""Checkpoints in a dict: the shortest storage, for tests and for what need not outlive the process."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from .base import INTERNAL_DIRECTORY
from .process_locks import ProcessLocks


class MemoryStorage:
    """Keep checkpoints in this process's memory. Copies what it is given; one object may serve many Checkpointers.

    Attributes:
        files: checkpoint_id -> name -> content.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = defaultdict(dict)
        self._locks = ProcessLocks()
        self._written_at: dict[tuple[str, str], float] = {}

    def resolve(self, checkpoint_id: str) -> str:
        return checkpoint_id

    def describe(self, checkpoint_id: str, name: str = "") -> str:
        return f"memory:{checkpoint_id}/{name}" if name else f"memory:{checkpoint_id}"

    @asynccontextmanager
    async def create(self, checkpoint_id: str, name: str) -> AsyncIterator[MemoryWriter]:
        if name in self.files[checkpoint_id]:
            raise FileExistsError(self.describe(checkpoint_id, name))
        writer = MemoryWriter()
        yield writer
        self._keep(checkpoint_id, name, writer.content)

    @asynccontextmanager
    async def open(self, checkpoint_id: str, name: str) -> AsyncIterator[_MemoryReader]:
        yield _MemoryReader(await self.get(checkpoint_id, name), self._written_at.get((checkpoint_id, name)))

    async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
        self._keep(checkpoint_id, name, data)

    def _keep(self, checkpoint_id: str, name: str, data: bytes | bytearray) -> None:
        self.files[checkpoint_id][name] = bytes(data)
        self._written_at[checkpoint_id, name] = time.time()

    async def get(self, checkpoint_id: str, name: str) -> bytes:
        try:
            return self.files[checkpoint_id][name]
        except KeyError:
            raise FileNotFoundError(self.describe(checkpoint_id, name)) from None

    async def list_files(self, checkpoint_id: str) -> list[str]:
        return sorted(self.files[checkpoint_id])

    async def file_sizes(self, checkpoint_id: str) -> dict[str, int]:
        return {name: len(content) for name, content in sorted(self.files[checkpoint_id].items())}

    async def remove(self, checkpoint_id: str, name: str, *, durable: bool = False) -> None:
        self.files[checkpoint_id].pop(name, None)

    async def remove_if_empty(self, checkpoint_id: str, *, made_by_anyone: bool = False) -> None:
        if not self.files[checkpoint_id]:
            del self.files[checkpoint_id]

    async def remove_tree(self, checkpoint_id: str) -> None:
        below = [each for each in self.files if each == checkpoint_id or each.startswith(f"{checkpoint_id}/")]
        for each in below:
            del self.files[each]

    async def list_children(self, root: str) -> list[str]:
        below = [each[len(root) + 1 :] for each, files in self.files.items() if files and each.startswith(f"{root}/")]
        return sorted({each.split("/")[0] for each in below} - {INTERNAL_DIRECTORY})

    def lock(self, root: str, *, exclusive: bool, create: bool = True) -> AbstractAsyncContextManager[bool]:
        return self._locks.hold(root, exclusive=exclusive)


class MemoryWriter:
    """Keeps what is written, at whatever offsets, in memory."""

    def __init__(self) -> None:
        self.content = bytearray()

    async def write(self, offset: int, data: memoryview) -> None:
        stop = offset + data.nbytes
        if len(self.content) < stop:
            self.content.extend(bytes(stop - len(self.content)))
        self.content[offset:stop] = data.cast("B")


class _MemoryReader:
    def __init__(self, content: bytes, modified_at: float | None) -> None:
        self.content = content
        self.modified_at = modified_at
        self.nbytes = len(content)

    async def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            stop = offset + buffer.nbytes
            if stop > self.nbytes:
                raise EOFError(f"{self.nbytes} bytes, {stop} wanted")
            buffer[:] = self.content[offset:stop]
            offset = stop
