"""Bounds on waits, once it is known when the process will be ended."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from .._engine.broadcast import call_soon


class Deadline:
    """When waits must be over, as far as that is known."""

    def __init__(self, left_s: Callable[[], float | None]) -> None:
        """Begin; `left_s` returns the seconds until the process is ended, or None while that is not known."""
        self._left_s = left_s
        self._waits: dict[object, tuple[asyncio.AbstractEventLoop, Callable[[], None]]] = {}

    @asynccontextmanager
    async def in_time(self, limit_s: float | None = None, *, spare_s: float = 0.0) -> AsyncIterator[asyncio.Timeout]:
        """Cancel the block after `limit_s`, and `spare_s` before the process is ended, also if that is heard of later.

        Raises:
            TimeoutError: that was done.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(limit_s) as limit:
            key = object()

            def cut() -> None:
                left_s = self._left_s()
                if key in self._waits and left_s is not None:
                    until = loop.time() + max(0.0, left_s - spare_s)
                    when = limit.when()
                    if not limit.expired() and (when is None or until < when):
                        limit.reschedule(until)

            self._waits[key] = loop, cut
            try:
                cut()
                yield limit
            finally:
                del self._waits[key]

    def is_known(self) -> bool:
        """Whether it is known when the process will be ended."""
        return self._left_s() is not None

    def cut_short(self) -> None:
        """Bound all that is waited for: it is known now when the process will be ended. From any thread."""
        for loop, cut in list(self._waits.values()):
            call_soon(loop, cut)
