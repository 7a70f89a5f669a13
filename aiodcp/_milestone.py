"""What a user can await of a save, and watch: milestones and progress.

Both are set by the engine's thread and read from anywhere: from the caller's event loop, from another one, from no
loop at all. A waiter that is cancelled stops waiting, and changes nothing for the others.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

Phase = Literal["plan", "stage", "write", "commit", "done", "failed", "cancelled"]


_log = logging.getLogger("aiodcp")


class Milestone:
    """A point that a save reaches once, or fails to reach. Await it any number of times, from any event loop.

    Cancellation: cancels the wait, never the save.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._future: Future[None] = Future()
        self._lock = threading.Lock()
        self._is_settled = False
        self._error: Exception | None = None
        self._before: list[Callable[[Exception | None], None]] = []  # called before anyone hears of it
        self._wakers: dict[object, Callable[[], None]] = {}  # of those who wait on event loops
        self._told = False
        self._waiters = 0
        self._check: Callable[[], None] = lambda: None

    def __repr__(self) -> str:
        if not self._future.done():
            state = "pending"
        else:
            error = self._future.exception()
            state = "reached" if error is None else f"failed: {error!r}"
        return f"<Milestone {self._name} {state}>"

    def __await__(self) -> Generator[Any, None, None]:
        return self._wait().__await__()

    async def _wait(self) -> None:
        self._check()
        self._waiters += 1
        try:
            if not self._future.done():
                await self._wake_up()
            self.wait()
        finally:
            self._waiters -= 1

    async def _wake_up(self) -> None:
        """Sleep until the future is done; each waiter has a future of its own, so cancelling one leaves the rest."""
        loop = asyncio.get_running_loop()
        woken = loop.create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        with self._lock:
            self._wakers[woken] = lambda: _call_soon(loop, wake)
        if self._future.done():
            wake()
        try:
            await woken
        finally:
            with self._lock:
                self._wakers.pop(woken, None)

    def _wake_all(self) -> None:
        with self._lock:
            wakers = list(self._wakers.values())
        for each in wakers:
            each()

    def wait(self, timeout: float | None = None) -> None:
        """Block this thread until the milestone is reached: for callers without an event loop.

        Args:
            timeout: seconds to wait at most.

        Raises:
            TimeoutError: it was not reached in time; the save goes on.
            SaveError: the save failed.
        """
        if not self._future.done():
            self._check()
        try:
            error = self._future.exception(timeout)
        except TimeoutError:
            raise TimeoutError(f"{self._name} was not reached within {timeout} s") from None
        if error is not None:
            self._told = True
            raise error

    def check_before(self, check: Callable[[], None]) -> None:
        """Have `check` called before anyone waits; it may raise, where to wait would be for ever."""
        self._check = check

    def settle(self) -> None:
        """Block this thread until the milestone is reached or will never be: no failure counts as told."""
        self._future.exception()

    async def settled(self) -> None:
        """Wait as `settle` does, on an event loop."""
        if not self._future.done():
            await self._wake_up()

    def done(self) -> bool:
        """Whether the milestone is reached, or will never be."""
        return self._future.done()

    def reach(self) -> None:
        self._settle(None)

    def fail(self, error: Exception, *, told: bool = False) -> None:
        self._told = self._told or told
        self._settle(error)

    def _settle(self, error: Exception | None) -> None:
        with self._lock:
            if self._is_settled:
                return
            self._is_settled, self._error = True, error
            before, self._before = self._before, []
        for function in before:
            try:
                function(error)
            except Exception:
                _log.exception("%s: what is to be called first failed", self._name)
        if error is None:
            self._future.set_result(None)
        else:
            self._future.set_exception(error)
        self._wake_all()

    def when_done(self, function: Callable[[Exception | None], None]) -> None:
        """Call `function` with how it has ended, before anyone who waits is let go, in whatever thread says so."""
        with self._lock:
            if not self._is_settled:
                self._before.append(function)
                return
        function(self._error)

    def forgive(self) -> None:
        """Count a failure, also one to come, as told: somebody else tells it."""
        self._told = True

    def error(self) -> Exception | None:
        """Return why it will never be reached; None if it is or may still be."""
        error = self._future.exception() if self._future.done() else None
        assert error is None or isinstance(error, Exception)
        return error

    def failed(self) -> bool:
        return self._future.done() and self._future.exception() is not None

    def failed_with(self, error: BaseException) -> bool:
        """Whether this very error is why it was not reached."""
        return self._future.done() and self._future.exception() is error

    def untold(self) -> Exception | None:
        """Return the failure that nobody has seen yet or is about to see, if there is one."""
        return None if self._told or self._waiters else self.error()


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a save has come.

    Attributes:
        phase: what it is doing; staging and writing overlap, and "write" begins when everything is staged.
        bytes_staged: bytes in host memory: from here on the caller may change them once all are.
        bytes_written: bytes handed to storage.
        bytes_total: bytes of the data file; 0 until it is planned.
        elapsed_s: seconds since the state was captured.
    """

    phase: Phase
    bytes_staged: int = 0
    bytes_written: int = 0
    bytes_total: int = 0
    elapsed_s: float = 0.0


class ProgressLog:
    """All that a save has reported, for any number of readers on any loops."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._began = time.perf_counter()
        self._entries = [Progress(phase="plan")]
        self._wakers: list[Callable[[], None]] = []

    def restart(self) -> None:
        """Count `elapsed_s` from now."""
        self._began = time.perf_counter()

    @property
    def latest(self) -> Progress:
        return self._entries[-1]

    def report(
        self, phase: Phase | None = None, *, staged: int = 0, written: int = 0, total: int | None = None
    ) -> None:
        """Add an entry: another phase, further bytes staged or written. Called from any thread."""
        with self._lock:
            last = self._entries[-1]
            entry = replace(
                last,
                phase=phase or last.phase,
                bytes_staged=last.bytes_staged + staged,
                bytes_written=last.bytes_written + written,
                bytes_total=last.bytes_total if total is None else total,
                elapsed_s=time.perf_counter() - self._began,
            )
            self._entries.append(entry)
            wakers, self._wakers = self._wakers, []
        for wake in wakers:
            wake()

    async def follow(self) -> AsyncIterator[Progress]:
        """Yield every entry from the first on, then new ones as they come, until the save has ended."""
        position = 0
        loop = asyncio.get_running_loop()
        while True:
            news = asyncio.Event()
            with self._lock:
                entries = self._entries[position:]
                if not entries:
                    self._wakers.append(lambda news=news: _call_soon(loop, news.set))  # type: ignore[misc]
            for entry in entries:
                yield entry
                if entry.phase in ("done", "failed", "cancelled"):
                    return
            position += len(entries)
            if not entries:
                await news.wait()


def _call_soon(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    with suppress(RuntimeError):  # that loop is closed: nobody waits there any more
        loop.call_soon_threadsafe(function)
