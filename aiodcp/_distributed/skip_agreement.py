"""Which saves are skipped because one is in flight: the coordinator chooses, and every rank does the same.

Ranks reach the end of a save at slightly different moments; were each to look for itself, one would skip and another
would save. So calls that may be skipped are numbered, alike on all ranks, and each decision of an operation brings with
it the number up to which the coordinator has skipped. Whoever finds no save under way, and has not heard that its call
is skipped, may go on: the coordinator skips only while a decision is still to come.
"""

from __future__ import annotations

import threading

from .._engine.milestone import MilestoneSource


class SkipAgreement:
    """One rank's view.

    Attributes:
        decides: whether this is the coordinator, or the only rank.
    """

    def __init__(self, *, decides: bool) -> None:
        self.decides = decides
        self._lock = threading.Lock()
        self._asked = 0
        self._skipped = 0  # up to which call those were skipped that found a save under way
        self._open = 0  # saves that have been asked for and whose last decision is still to come
        self._news = MilestoneSource("news")

    def open(self) -> None:
        """Count a save as under way."""
        with self._lock:
            self._open += 1

    def close(self) -> int:
        """Count one as over, and return what the others must hear of, at the latest, now."""
        with self._lock:
            self._open -= 1
            return self._tell()

    def current(self) -> int:
        """Return what the others should hear of."""
        with self._lock:
            return self._skipped

    def hear(self, skipped: int) -> None:
        """Learn what the coordinator has skipped."""
        with self._lock:
            self._skipped = max(self._skipped, skipped)
            self._tell()

    def _tell(self) -> int:
        news, self._news = self._news, MilestoneSource("news")
        news.reach()
        return self._skipped

    async def ask(self) -> bool:
        """Ask whether the save that is about to be made is to be skipped.

        Cancellation: leaves the question open; the other ranks ask it too.
        """
        with self._lock:
            self._asked += 1
            number = self._asked
            if self.decides:
                if self._open:
                    self._skipped = number
                return bool(self._open)
        while True:
            with self._lock:
                if number <= self._skipped:
                    return True
                if not self._open:
                    return False
                news = self._news
            await news.settled()
