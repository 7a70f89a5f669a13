"""Events handed on: to the log, to a callback, to all who follow."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress

from anyio import move_on_after

from .._engine.broadcast import FORKED, call_soon
from .._engine.callbacks import CallbackThread
from .._engine.milestone import MilestoneSource
from .._log import SafeLogger
from ..errors import ClosedError
from .events import Event

log = SafeLogger(__name__)


FLUSH_S = 10.0


class EventFeed:
    """Hands events on, from any thread: to the log, to a callback, and to all who follow."""

    def __init__(self, callback: Callable[[Event], None] | None = None) -> None:
        self._callback = callback
        self._callbacks = CallbackThread()
        self._pid = 0
        self._lock = threading.Lock()
        self._followers: list[tuple[deque[Event | None], Callable[[], None]]] = []
        self._is_open = False

    def publish(self, event: Event) -> None:
        """Tell everybody of an event. The callback is called in the thread `aiodcp-callbacks`, one event at a time."""
        log.log(event.level, "step %d, rank %d: %s", event.step, event.rank, event, extra=_facts(event))
        if self._callback is not None:
            self._callbacks.call(self._callback, event)
        self._hand_on(event)

    async def flush(self) -> None:
        """Wait until the callback has been called for all events so far, up to `FLUSH_S`."""
        if self._callback is None:
            return
        flushed = MilestoneSource("flushed")
        self._callbacks.call(flushed.reach)
        with move_on_after(FLUSH_S):
            await flushed.settled()
        if not flushed.done():
            log.error("on_event has not returned for %.0f s: it is not waited for any longer", FLUSH_S)

    def begin(self) -> None:
        """Let those who follow from now on wait for events."""
        self._is_open = True
        self._pid = os.getpid()

    def end(self) -> None:
        """Let all who follow come to an end, and who follows from now on."""
        self._is_open = False
        self._hand_on(None)
        with self._lock:
            self._followers.clear()

    def _hand_on(self, event: Event | None) -> None:
        with self._lock:
            for queue, wake in self._followers:
                queue.append(event)
                wake()

    def follow(self) -> AsyncIterator[Event]:
        """Return the events from now on, until the end.

        Raises:
            ClosedError: this process was forked from the one in which they happen.
        """
        if self._is_open and os.getpid() != self._pid:
            raise ClosedError(FORKED)
        loop = asyncio.get_running_loop()
        news = asyncio.Event()
        queue: deque[Event | None] = deque()

        def wake() -> None:
            call_soon(loop, news.set)

        follower = queue, wake
        with self._lock:
            if self._is_open:
                self._followers.append(follower)
            else:
                queue.append(None)
                news.set()

        async def events() -> AsyncIterator[Event]:
            try:
                while True:
                    await news.wait()
                    news.clear()
                    while queue:
                        event = queue.popleft()
                        if event is None:
                            return
                        yield event
            finally:
                with self._lock, suppress(ValueError):  # it is gone when all have come to an end
                    self._followers.remove(follower)

        return events()


def _facts(event: Event) -> dict[str, object]:
    """What a structured log wants beside the text."""
    facts: dict[str, object] = {"event": type(event).__name__, "step": event.step, "rank": event.rank}
    for name in ("nbytes", "seconds", "phases"):
        if hasattr(event, name):
            facts[name] = getattr(event, name)
    return facts
