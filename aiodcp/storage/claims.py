"""Who in this process claims which place: any number together, or one alone."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

_POLL_S = 0.01  # a claim that is alone is held for as long as it takes to clear up


class Claims:
    """The claims of one process, whose engines have a loop each."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._together: Counter[str] = Counter()
        self._alone: set[str] = set()

    def _take(self, place: str, alone: bool) -> bool:
        with self._lock:
            if place in self._alone or (alone and self._together[place]):
                return False
            if alone:
                self._alone.add(place)
            else:
                self._together[place] += 1
            return True

    @asynccontextmanager
    async def hold(self, place: str, *, alone: bool) -> AsyncIterator[bool]:
        """Hold a claim while the block lasts; one that is `alone` is not waited for, but False."""
        while not (held := self._take(place, alone)) and not alone:  # noqa: ASYNC110 - the other is on another loop
            await anyio.sleep(_POLL_S)
        try:
            yield held
        finally:
            with self._lock:
                if alone and held:
                    self._alone.discard(place)
                elif held:
                    self._together[place] -= 1
