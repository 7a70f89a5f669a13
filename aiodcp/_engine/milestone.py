"""What a user can await of a save.

A milestone is set by the engine's thread and read from anywhere: from the caller's event loop, from another one, from
no loop at all. A waiter that is cancelled stops waiting, and changes nothing for the others.

Users hold the read side, a `Milestone`; the library keeps the other one, its `MilestoneSource`.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self

import anyio

from .._log import SafeLogger
from ..errors import ClosedError
from .broadcast import FORKED, Signal
from .callbacks import callbacks

log = SafeLogger(__name__)


class MilestoneSource:
    """The write side of a milestone: reached once, or failed once, in whatever thread; what comes later is ignored."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._state: Literal["pending", "settling", "settled"] = "pending"
        self._error: Exception | None = None
        self._trace: TracebackType | None = None  # of the failure, where it was raised first
        self._abandoned: Exception | None = None
        self._first: list[Callable[[Exception | None], None]] = []
        self._on_loops: set[Signal] = set()  # one for each waiter: cancelling one leaves the rest
        self._in_threads = 0
        self._is_retrieved = False
        self._check: Callable[[bool], None] = lambda blocking: None

    def __repr__(self) -> str:
        if self._state != "settled":
            return f"{self.name} pending"
        return f"{self.name} reached" if self._error is None else f"{self.name} failed: {self._error!r}"

    # --- how it ends

    def reach(self) -> None:
        self._settle(None)

    def fail(self, error: Exception, *, retrieved: bool = False) -> None:
        self._is_retrieved = self._is_retrieved or retrieved
        self._settle(error)

    def _settle(self, error: Exception | None) -> None:
        with self._changed:
            if self._state != "pending":
                return
            self._state, self._error = "settling", error
            self._trace = error.__traceback__ if error is not None else None
            first, self._first = self._first, []
        for function in first:
            try:
                function(error)
            except BaseException:  # SystemExit, too: whoever waits is to wake
                log.exception("%s: a completion callback failed", self.name)
        with self._changed:
            self._state = "settled"
        self._wake_all()

    def abandon(self, error: Exception) -> None:
        """Wake all waiters with `error`: it will not be reached any more, and is not done either."""
        self._abandoned = error
        self._wake_all()

    def when_done(self, function: Callable[[Exception | None], None]) -> None:
        """Call `function` with how it has ended, before any waiter wakes, in whatever thread it ends."""
        with self._changed:
            if self._state == "pending":
                self._first.append(function)
                return
        function(self._error)

    def check_before(self, check: Callable[[bool], None]) -> None:
        """Have `check` called before anyone waits; it may raise, where to wait would be for ever.

        Its argument is whether the wait would block the thread.
        """
        self._check = check

    # --- how it has ended

    def done(self) -> bool:
        return self._state == "settled"

    def error(self) -> Exception | None:
        """Return why it will never be reached; None if it is or may still be."""
        return self._error if self._state == "settled" else None

    def unretrieved(self) -> Exception | None:
        """Return the failure, unless it was retrieved or is about to be."""
        if self._is_retrieved or self._in_threads or any(each.has_running_loop() for each in list(self._on_loops)):
            return None
        return self.error()

    def mark_retrieved(self) -> None:
        """Count a failure, present or to come, as retrieved: it is reported elsewhere."""
        self._is_retrieved = True

    # --- waiting for it

    def retrieve(self) -> Exception | None:
        """Return the failure, if it is one; now, or when `abandon` has been called, and only then."""
        if self._state != "settled":
            assert self._abandoned is not None
            raise self._abandoned
        if self._error is None:
            return None
        self._is_retrieved = True
        return self._error.with_traceback(self._trace)  # without the frames of who has raised it before

    async def wait_on_loop(self) -> Exception | None:
        """Wait on the running event loop; return the failure, which counts as retrieved."""
        if self._state != "settled":
            self._refuse_endless_wait(blocking=False)
            await self._until_woken()
        return self.retrieve()

    async def reached(self) -> None:
        """Wait on the running event loop, and raise the failure."""
        error = await self.wait_on_loop()
        if error is not None:
            raise error

    def wait_in_thread(self, timeout: float | None) -> Exception | None:
        """Block this thread; return the failure, which counts as retrieved.

        Raises:
            TimeoutError: it was not reached in `timeout` seconds.
        """
        if self._state != "settled":
            self._refuse_endless_wait(blocking=True)
            if not self._block(timeout):
                raise TimeoutError(f"{self.name} was not reached within {timeout} s")
        return self.retrieve()

    async def settled(self) -> None:
        """Wait on the running event loop until it is reached, failed or abandoned: no failure counts as retrieved."""
        if self._state != "settled" and not self._is_forked():
            await self._until_woken()

    async def settled_uncancellable(self) -> None:
        """Wait as `settled` does, also in a task that is cancelled meanwhile, however often."""
        while self._state != "settled" and self._abandoned is None:
            with suppress(asyncio.CancelledError), anyio.CancelScope(shield=True):  # which anyio does again and again
                await self._until_woken()

    def settle(self) -> None:
        """Block this thread until it is reached, failed or abandoned: no failure counts as retrieved."""
        if self._state != "settled" and not self._is_forked():
            self._block(None)

    def _is_forked(self) -> bool:
        return os.getpid() != self._pid

    def refuse_forked(self) -> None:
        """Raise `ClosedError` if it is still to come in the process that this one was forked from."""
        if self._state != "settled" and self._is_forked():
            raise ClosedError(FORKED)

    def _refuse_endless_wait(self, *, blocking: bool) -> None:
        self.refuse_forked()
        self._check(blocking)

    def _block(self, timeout: float | None) -> bool:
        with self._changed:
            self._in_threads += 1
            try:
                return self._changed.wait_for(self._is_over, timeout)
            finally:
                self._in_threads -= 1

    def _is_over(self) -> bool:
        return self._state == "settled" or self._abandoned is not None

    async def _until_woken(self) -> None:
        """Sleep until it is over."""
        woken = Signal()
        with self._changed:
            if self._is_over():
                return
            self._on_loops.add(woken)
        try:
            await woken.wait()
        finally:
            with self._changed:
                self._on_loops.discard(woken)

    def _wake_all(self) -> None:
        with self._changed:
            self._changed.notify_all()
            waiting = list(self._on_loops)
        for woken in waiting:
            if not woken.set():
                with self._changed:
                    self._on_loops.discard(woken)  # that loop is closed


class Handle(Coroutine[Any, Any, None]):
    """Something that will have happened. Await it any number of times, from any event loop, and from none.

    Whatever takes an awaitable or a coroutine takes it: `asyncio.create_task(handle)`, `task_group.create_task`,
    `gather`, `wait_for`, `shield`, `run_coroutine_threadsafe`. Only `asyncio.wait` wants tasks and futures, and says
    so. `result`, `exception` and `add_done_callback` are as those of `concurrent.futures.Future`.

    Cancellation: cancels the wait, never the save.
    """

    def __init__(self, source: MilestoneSource) -> None:
        self._source = source
        self._driven: dict[asyncio.Task[Any], Generator[Any, None, None]] = {}  # by the task whose coroutine this is

    def __await__(self) -> Generator[Any, None, None]:
        return self._source.reached().__await__()

    def wait(self, timeout: float | None = None) -> None:
        """Block this thread until it has happened: for callers without an event loop.

        Args:
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: it has not happened in time; the save goes on.
            SaveError: the save failed.
            ClosedError: it will never happen in this process, which was forked, or it would wait for itself.
        """
        error = self._source.wait_in_thread(timeout)
        if error is not None:
            raise error

    def result(self, timeout: float | None = None) -> None:
        """Block as `wait` does."""
        self.wait(timeout)

    def exception(self, timeout: float | None = None) -> Exception | None:
        """Block as `wait` does, and return the failure instead of raising it; None if there is none."""
        return self._source.wait_in_thread(timeout)

    def done(self) -> bool:
        """Whether it has happened, or never will."""
        return self._source.done()

    def add_done_callback(self, function: Callable[[Self], object]) -> None:
        """Have `function` called with this object when it is done, in the thread `aiodcp-callbacks`.

        What it raises is logged. A failure counts as seen when the function asks for it, by `exception` or `result`.

        Raises:
            ClosedError: it will never be done in this process, which was forked.
        """
        self._source.refuse_forked()
        self._source.when_done(lambda _: callbacks.call(self._call_when_settled, function))

    def _call_when_settled(self, function: Callable[[Self], object]) -> None:
        self._source.settle()
        function(self)

    # --- as a coroutine: a task has one of its own, and drives it

    @property
    def __name__(self) -> str:
        """What a task that runs this calls its coroutine."""
        return self._source.name

    def send(self, value: None) -> Any:
        """Go on, for the task that runs this as its coroutine."""
        return self._drive(lambda waiting: waiting.send(value))

    def throw(self, kind: Any, value: Any = None, trace: Any = None) -> Any:
        """Raise an exception where the task that runs this as its coroutine waits."""
        error = kind if value is None else value
        return self._drive(lambda waiting: waiting.throw(error() if isinstance(error, type) else error))

    def close(self) -> None:
        """End the wait of the task that runs this as its coroutine. The save goes on."""
        waiting = self._driven.pop(task, None) if (task := current_task()) is not None else None
        if waiting is not None:
            waiting.close()

    def _drive(self, step: Callable[[Generator[Any, None, None]], Any]) -> Any:
        task = current_task()
        if task is None:
            raise RuntimeError("await this object, or pass it to a task: it cannot be driven in any other way")
        if task not in self._driven:
            self._driven[task] = self.__await__()
        try:
            return step(self._driven[task])
        except BaseException:  # it has come to its end: StopIteration, the failure, or a cancellation
            self._driven.pop(task, None)
            raise


class Milestone(Handle):
    """A point that a save reaches once, or fails to reach."""

    def __repr__(self) -> str:
        return f"<Milestone {self._source!r}>"


def current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop is running in this thread
        return None
