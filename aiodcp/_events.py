"""What a manager tells of: typed events, for a callback, for iterators, and as lines of the log `aiodcp`."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar

from anyio import move_on_after

from ._callbacks import CallbackThread
from ._log import log
from ._milestone import FORKED, MilestoneSource, call_soon
from ._retry import Attempt
from ._timeline import Timeline
from .errors import ClosedError

FLUSH_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something happened to the checkpoint of a step.

    Attributes:
        step: which.
        rank: on which rank; each tells of its own.
        checkpoint_id: where the checkpoint is, or was to be.
    """

    level: ClassVar[int] = logging.INFO

    step: int
    rank: int
    checkpoint_id: str

    def __str__(self) -> str:
        return type(self).__name__


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveBegan(Event):
    """The state is captured.

    Attributes:
        waited_s: seconds for which it waited for the save before.
        held_s: seconds for which the caller was held to capture it.
    """

    level: ClassVar[int] = logging.DEBUG

    waited_s: float
    held_s: float

    def __str__(self) -> str:
        return f"captured in {self.held_s:.3f} s, after waiting {self.waited_s:.3f} s for the save before"


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFinished(Event):
    """The checkpoint is committed and durable.

    Attributes:
        nbytes: that this rank wrote.
        held_s: seconds for which the caller was held, to capture the state and in fences.
        staged_s: seconds until the tensors might change again, from when `save` had its turn.
        seconds: likewise, until all was durable.
        phases: by name, for how long each was at work; see `Timeline`.
    """

    nbytes: int
    held_s: float
    staged_s: float
    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        phases = ", ".join(f"{name} {1000 * seconds:.1f}" for name, seconds in self.phases.items())
        return (
            f"saved {self.nbytes} bytes in {self.seconds:.3f} s, staged after {self.staged_s:.3f} s, "
            f"caller held {self.held_s:.3f} s (ms: {phases})"
        )


def times_of(timelines: Sequence[Timeline]) -> dict[str, Any]:
    """Return the times of a `SaveFinished`, of the states that were saved together, now that all of them are."""
    captured = [span for each in timelines if (span := each.between("capture")) is not None]
    staged = [span for each in timelines if (span := each.between("stage")) is not None]
    began = min(start for start, _ in captured)
    phases: dict[str, float] = {}
    for each in timelines:
        for name in {span.name: None for span in each.spans}:
            phases[name] = phases.get(name, 0.0) + each.seconds(name)
    return {
        "held_s": sum(each.held_s for each in timelines),
        "staged_s": max((stop for _, stop in (*staged, *captured))) - began,
        "seconds": time.perf_counter() - began,
        "phases": phases,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveFailed(Event):
    """The checkpoint is not committed.

    Attributes:
        error: why.
    """

    level: ClassVar[int] = logging.ERROR

    error: Exception

    def __str__(self) -> str:
        return f"not saved: {type(self.error).__name__}: {self.error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Retried(Event):
    """Storage has refused something for the moment, and it is tried again.

    Attributes:
        path: what was to be read or written.
        attempt: which attempt failed, why, and when the next one is.
    """

    level: ClassVar[int] = logging.WARNING

    path: str
    attempt: Attempt

    def __str__(self) -> str:
        return f"{self.path}: {self.attempt}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveSkipped(Event):
    """The save before was still in flight, and `on_busy` was "skip"."""

    level: ClassVar[int] = logging.WARNING

    def __str__(self) -> str:
        return "skipped: the save before is still in flight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Preempted(Event):
    """The run is to stop at this step, on all ranks.

    Attributes:
        reason: why, in words.
        left_s: seconds until the process is ended.
    """

    level: ClassVar[int] = logging.WARNING

    reason: str
    left_s: float

    def __str__(self) -> str:
        return f"to stop here, with {self.left_s:.1f} s left: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRemoved(Event):
    """A checkpoint that is not to be kept is removed."""

    def __str__(self) -> str:
        return "removed, as it is not among those to keep"


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftoverRemoved(Event):
    """What an interrupted save had left is removed."""

    def __str__(self) -> str:
        return "removed what an interrupted save had left"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemovalFailed(Event):
    """A checkpoint could not be removed; it is tried again.

    Attributes:
        error: why.
    """

    level: ClassVar[int] = logging.WARNING

    error: Exception

    def __str__(self) -> str:
        return f"could not be removed: {self.error}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Restored(Event):
    """The checkpoint is loaded.

    Attributes:
        seconds: that it took.
    """

    seconds: float

    def __str__(self) -> str:
        return f"restored in {self.seconds:.3f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class FellBack(Event):
    """The checkpoint could not be loaded, and the one before is tried.

    Attributes:
        error: why.
    """

    level: ClassVar[int] = logging.ERROR

    error: Exception

    def __str__(self) -> str:
        return f"cannot be restored, going back to the one before: {type(self.error).__name__}: {self.error}"


class Feed:
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
