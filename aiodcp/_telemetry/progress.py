"""How far a save has come, for any number of readers on any loops."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Literal

from .._engine.broadcast import Broadcast

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
        self._lock = threading.Lock()
        self._began = time.perf_counter()
        self._entries: Broadcast[Progress] = Broadcast(replay=True)
        self._latest = Progress(phase="plan")
        self._entries.publish(self._latest)

    def restart(self) -> None:
        """Count `elapsed_s` from now."""
        self._began = time.perf_counter()

    @property
    def latest(self) -> Progress:
        return self._latest

    def report(
        self, phase: Phase | None = None, *, staged: int = 0, written: int = 0, total: int | None = None
    ) -> None:
        """Add an entry: another phase, further bytes staged or written. Called from any thread."""
        with self._lock:
            last = self._latest
            self._latest = replace(
                last,
                phase=phase or last.phase,
                bytes_staged=last.bytes_staged + staged,
                bytes_written=last.bytes_written + written,
                bytes_total=last.bytes_total if total is None else total,
                elapsed_s=time.perf_counter() - self._began,
            )
            self._entries.publish(self._latest)
            if self._latest.phase in ("done", "failed", "cancelled"):
                self._entries.close()
        self._on_report()

    async def follow(self) -> AsyncIterator[Progress]:
        """Yield every entry from the first on, then new ones as they come, until the save has ended.

        Raises:
            ClosedError: this process was forked from the one that saves.
        """
        async for entry in self._entries.follow():
            yield entry
