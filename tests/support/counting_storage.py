"""A storage on disk that counts what is read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from aiodcp import LocalStorage
from aiodcp.storage.base import Reader


class CountingStorage(LocalStorage):
    """Counts the bytes that are read, by file, and what is open."""

    def __init__(self) -> None:
        super().__init__()
        self.read: dict[str, int] = {}
        self.opened = 0

    @property
    def nbytes(self) -> int:
        return sum(self.read.values())

    @asynccontextmanager
    async def open(self, checkpoint_id: str, name: str) -> AsyncIterator[Any]:
        async with super().open(checkpoint_id, name) as reader:
            self.opened += 1
            try:
                yield _Counted(reader, self.read, name)
            finally:
                self.opened -= 1

    async def get(self, checkpoint_id: str, name: str) -> bytes:
        data = await super().get(checkpoint_id, name)
        self.read[name] = self.read.get(name, 0) + len(data)
        return data


class _Counted:
    def __init__(self, reader: Reader, read: dict[str, int], name: str) -> None:
        self._reader = reader
        self._read = read
        self._name = name
        self.nbytes = reader.nbytes

    @property
    def modified_at(self) -> float | None:
        return self._reader.modified_at

    async def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        await self._reader.read_into(offset, buffers)
        self._read[self._name] = self._read.get(self._name, 0) + sum(each.nbytes for each in buffers)
