"""From any thread to event loops of any threads: the one bridge over which the library wakes who waits."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from ..errors import ClosedError

T = TypeVar("T")

FORKED = "this process was forked from the one that does the work: it will not be notified"


def call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., object], *args: Any) -> bool:
    """Have `function` called on a loop of any thread; return False if that loop is closed."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        return False
    return True


class Signal:
    """Set once, from any thread; awaited on the event loop on which it was made."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._event = asyncio.Event()

    def set(self) -> bool:
        """Wake who waits, soon; return False if their loop is closed."""
        return call_soon(self._loop, self._event.set)

    def is_set(self) -> bool:
        """Whether who waits has been woken. On the loop."""
        return self._event.is_set()

    def has_running_loop(self) -> bool:
        """Whether the loop runs on which it is awaited."""
        return self._loop.is_running()

    async def wait(self) -> None:
        """Wait until it is set. Several waits, one after the other or at once, are one."""
        await self._event.wait()


class Broadcast(Generic[T]):
    """Items published in any thread, for any number of followers on any event loops.

    Args:
        replay: whether a follower begins with all items published before it, or with the next one.
    """

    def __init__(self, *, replay: bool = False) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._published: list[T] = []
        self._replay = replay
        self._followers: list[_Follower[T]] = []
        self._is_over = False

    def publish(self, item: T) -> None:
        """Hand an item to every follower."""
        with self._lock:
            if self._replay:
                self._published.append(item)
            for follower in self._followers:
                follower.put(item)

    def close(self) -> None:
        """Let every follower come to an end after the items so far."""
        with self._lock:
            self._is_over = True
            for follower in self._followers:
                follower.end()
            self._followers.clear()

    def follow(self) -> AsyncIterator[T]:
        """Return the items, from now on, until `close`. On the event loop on which they are iterated over.

        Raises:
            ClosedError: this process was forked from the one that publishes them.
        """
        if os.getpid() != self._pid and not self._is_over:
            raise ClosedError(FORKED)
        follower: _Follower[T] = _Follower()
        with self._lock:
            for item in self._published:
                follower.put(item)
            if self._is_over:
                follower.end()
            else:
                self._followers.append(follower)
        return self._items(follower)

    async def _items(self, follower: _Follower[T]) -> AsyncIterator[T]:
        try:
            while True:
                batch = await follower.take()
                if not batch:
                    return
                for item in batch:
                    yield item
        finally:
            with self._lock, suppress(ValueError):  # it is gone when all have come to an end
                self._followers.remove(follower)


class _Follower(Generic[T]):
    """What one follower has still to see. All but `take` is called with the lock of its `Broadcast` held."""

    def __init__(self) -> None:
        self._pending: deque[T] = deque()
        self._is_over = False
        self._news = Signal()

    def put(self, item: T) -> None:
        self._pending.append(item)
        self._news.set()

    def end(self) -> None:
        self._is_over = True
        self._news.set()

    async def take(self) -> list[T]:
        """Wait for items, and return them; none when there will be no more."""
        while True:
            news = self._news
            batch = [self._pending.popleft() for _ in range(len(self._pending))]
            if batch or self._is_over:
                return batch
            await news.wait()
            self._news = Signal()
