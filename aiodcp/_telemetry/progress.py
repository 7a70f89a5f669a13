"""How far a save has come, for any number of readers on any loops."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from .._engine.broadcast import FORKED, call_soon
from ..errors import ClosedError

Phase = Literal["plan", "stage", "write", "commit", "done", "failed", "cancelled"]


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

    def __init__(self, on_report: Callable[[], None] = lambda: None) -> None:
        """Begin; `on_report` is called with each entry, in whatever thread."""
        self._on_report = on_report
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._began = time.perf_counter()
        self._entries = [Progress(phase="plan")]
        self._wakers: list[Callable[[], object]] = []

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
        self._on_report()

    async def follow(self) -> AsyncIterator[Progress]:
        """Yield every entry from the first on, then new ones as they come, until the save has ended."""
        position = 0
        loop = asyncio.get_running_loop()
        while True:
            if os.getpid() != self._pid:
                raise ClosedError(FORKED)
            news = asyncio.Event()
            with self._lock:
                entries = self._entries[position:]
                if not entries:
                    self._wakers.append(partial(call_soon, loop, news.set))
            for entry in entries:
                yield entry
                if entry.phase in ("done", "failed", "cancelled"):
                    return
            position += len(entries)
            if not entries:
                await news.wait()
