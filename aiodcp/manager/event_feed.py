"""Events handed on: to the log, to a callback, to all who follow."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from anyio import move_on_after

from .._engine.broadcast import Broadcast
from .._engine.callbacks import CallbackThread
from .._engine.milestone import MilestoneSource
from .._log import SafeLogger
from .events import Event

log: SafeLogger = SafeLogger(__name__)


FLUSH_TIMEOUT_S = 10.0


class EventFeed:
    """Hands events on, from any thread: to the log, to a callback, and to all who follow."""

    def __init__(self, callback: Callable[[Event], None] | None = None) -> None:
        self._callback = callback
        self._callbacks = CallbackThread()
        self._events: Broadcast[Event] = Broadcast()
        self._events.close()  # until `begin`

    def publish(self, event: Event) -> None:
        """Hand on an event. The callback is called in the thread `aiodcp-callbacks`, one event at a time."""
        log.log(event.level, "step %d, rank %d: %s", event.step, event.rank, event, extra=_facts(event))
        if self._callback is not None:
            self._callbacks.call(self._callback, event)
        self._events.publish(event)

    async def flush(self) -> None:
        """Wait until the callback has been called for all events so far, up to `FLUSH_TIMEOUT_S`."""
        if self._callback is None:
            return
        flushed = MilestoneSource("flushed")
        self._callbacks.call(flushed.reach)
        with move_on_after(FLUSH_TIMEOUT_S):
            await flushed.settled()
        if not flushed.done():
            log.error("on_event did not finish within %.0f s: no longer waiting for it", FLUSH_TIMEOUT_S)

    def begin(self) -> None:
        """Let those who follow from now on wait for events."""
        self._events = Broadcast()

    def end(self) -> None:
        """Let all who follow come to an end, and who follows from now on."""
        self._events.close()

    def follow(self) -> AsyncIterator[Event]:
        """Return the events from now on, until the end.

        Raises:
            ClosedError: this process was forked from the one in which they happen.
        """
        return self._events.follow()


def _facts(event: Event) -> dict[str, object]:
    """What a structured log wants beside the text."""
    facts: dict[str, object] = {"event": type(event).__name__, "step": event.step, "rank": event.rank}
    for name in ("nbytes", "seconds", "phases"):
        if hasattr(event, name):
            facts[name] = getattr(event, name)
    return facts
