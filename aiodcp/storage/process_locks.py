"""Shared and exclusive locks within one process."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

_POLL_S = 0.01  # an exclusive lock is held for as long as it takes to clear up


class ProcessLocks:
    """The locks of one process, whose engines have a loop each."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._shared: Counter[str] = Counter()
        self._exclusive: set[str] = set()

    def _take(self, root: str, exclusive: bool) -> bool:
        with self._mutex:
            if root in self._exclusive or (exclusive and self._shared[root]):
                return False
            if exclusive:
                self._exclusive.add(root)
            else:
                self._shared[root] += 1
            return True

    @asynccontextmanager
    async def hold(self, root: str, *, exclusive: bool) -> AsyncIterator[bool]:
        """Hold a lock while the block runs; an exclusive one is not waited for, but False."""
        while not (held := self._take(root, exclusive)) and not exclusive:  # noqa: ASYNC110 - of another loop
            await anyio.sleep(_POLL_S)
        try:
            yield held
        finally:
            with self._mutex:
                if exclusive and held:
                    self._exclusive.discard(root)
                elif held:
                    self._shared[root] -= 1
