"""Waiting, on the engine's loop, for what the caller does on its own."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import TypeVar

from ..errors import SaveError

T = TypeVar("T")

LOOK_S = 1.0  # how often closing looks whether anything moves

LOOP_GONE_S = 5.0  # for which an event loop may stand between two calls of `run_until_complete`


def answer(asked: Future[T], given: T | Exception) -> bool:
    """Answer a flow that waits, unless it has been answered already; tell whether this was the answer."""
    with suppress(InvalidStateError):
        if isinstance(given, Exception):
            asked.set_exception(given)
        else:
            asked.set_result(given)
        return True
    return False


async def from_caller(asked: Future[T], loop: asyncio.AbstractEventLoop) -> T:
    """Wait for what the caller does on its own event loop.

    Raises:
        SaveError: that loop is closed, or has stood still for `LOOP_GONE_S`: it will not be done any more.
    """
    waiting = asyncio.wrap_future(asked)
    watch = LoopWatch(loop)
    try:
        while not waiting.done():
            await asyncio.wait({waiting}, timeout=LOOK_S)
            if not waiting.done():
                watch.look()
        return waiting.result()
    finally:
        waiting.cancel()


class LoopWatch:
    """Whether an event loop is still there to do what is expected of it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._still_since: float | None = None

    def look(self) -> None:
        """Raise `SaveError` if the loop is gone."""
        if self._loop.is_running():
            self._still_since = None
            return
        if self._still_since is None:
            self._still_since = time.monotonic()
        if self._loop.is_closed() or time.monotonic() - self._still_since > LOOP_GONE_S:
            state = "closed" if self._loop.is_closed() else "stopped"
            raise SaveError(f"the event loop that asked for this save is {state}: there is no state to save")
