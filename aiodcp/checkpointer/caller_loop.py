"""What the caller's event loop gives to the engine's, and waiting for it while that loop is there."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Generic, TypeVar

from ..errors import SaveError

T = TypeVar("T")

CHECK_INTERVAL_S = 1.0  # how often it is checked whether the caller's event loop is still there
LOOP_GONE_S = 5.0  # for which an event loop may stand between two calls of `run_until_complete`


class HandOver(Generic[T]):
    """One value, or the error instead of it, from the event loop on which this is made to the engine's."""

    def __init__(self) -> None:
        self._given: Future[T] = Future()
        self._loop = asyncio.get_running_loop()

    def is_over(self) -> bool:
        """Whether a value or an error was given."""
        return self._given.done()

    def give(self, value: T) -> bool:
        """Give the value; return False if it comes too late, after an error."""
        with suppress(InvalidStateError):
            self._given.set_result(value)
            return True
        return False

    def fail(self, error: Exception) -> None:
        """Give an error instead, unless something was given already."""
        with suppress(InvalidStateError):
            self._given.set_exception(error)

    async def wait(self) -> T:
        """Wait for the value, on the engine's loop.

        Raises:
            SaveError: the caller's loop is closed, or has stood still for `LOOP_GONE_S`: it will give nothing.
            Exception: the error that was given.
        """
        waiting = asyncio.wrap_future(self._given)
        watch = LoopWatch(self._loop)
        try:
            while not waiting.done():
                await asyncio.wait({waiting}, timeout=CHECK_INTERVAL_S)
                if not waiting.done():
                    watch.check()
            return waiting.result()
        finally:
            waiting.cancel()


class LoopWatch:
    """Whether an event loop is still there to do what is expected of it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._still_since: float | None = None

    def check(self) -> None:
        """Raise `SaveError` if the loop is gone."""
        if self._loop.is_running():
            self._still_since = None
            return
        if self._still_since is None:
            self._still_since = time.monotonic()
        if self._loop.is_closed() or time.monotonic() - self._still_since > LOOP_GONE_S:
            state = "closed" if self._loop.is_closed() else "stopped"
            raise SaveError(f"the event loop that requested this save is {state}: the state can no longer be captured")
