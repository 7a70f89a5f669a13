"""What one `Checkpointer` is doing, and since when nothing has moved: for waits that are to end some time."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

SHOWN = 5


class Activity:
    """Kept by the flows; read by whoever waits for them. From any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: dict[object, tuple[str, float]] = {}
        self._moved_at = time.monotonic()

    def note_progress(self) -> None:
        """Note that something has been done."""
        self._moved_at = time.monotonic()

    def idle_s(self) -> float:
        """Seconds since something has been done."""
        return time.monotonic() - self._moved_at

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Note that `what` is under way while the block runs."""
        key = object()
        self.note_progress()
        with self._lock:
            self._under_way[key] = what, self._moved_at
        try:
            yield
        finally:
            with self._lock:
                del self._under_way[key]
            self.note_progress()

    def __str__(self) -> str:
        now = time.monotonic()
        with self._lock:
            under_way = list(self._under_way.values())
        shown = [f"{what} (for {now - began:.0f} s)" for what, began in under_way[-SHOWN:]]
        if len(under_way) > SHOWN:
            shown.append(f"{len(under_way) - SHOWN} more")
        return ", ".join(shown) or "nothing"
