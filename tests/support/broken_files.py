"""Local files whose writes fail, wait, or never end: for tests of several ranks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiodcp import LocalStorage
from aiodcp.storage import Writer


class BrokenFiles(LocalStorage):
    """Local files; `fault` is called before each write, sync and put, with what is about to be done."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: Callable[[str], Any] = lambda call: None

    async def check(self, call: str) -> None:
        answer = self.fault(call)
        if answer is not None:
            await answer

    @asynccontextmanager
    async def create(self, checkpoint_id: str, name: str) -> AsyncIterator[Writer]:  # type: ignore[override]
        async with super().create(checkpoint_id, name) as writer:
            yield _BrokenWriter(self, writer)
            await self.check("sync")

    async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
        await self.check("put")
        await super().put(checkpoint_id, name, data)


class _BrokenWriter:
    def __init__(self, storage: BrokenFiles, writer: Writer) -> None:
        self._storage = storage
        self._writer = writer

    async def write(self, offset: int, data: memoryview) -> None:
        await self._storage.check("write")
        await self._writer.write(offset, data)
