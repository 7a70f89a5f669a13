"""How long whoever closes waits for what is under way, and when that is given up."""

from __future__ import annotations

import time
from typing import Protocol

from .._engine.activity import Activity
from .._log import SafeLogger
from ..errors import CheckpointError, ClosedError, SaveError

log: SafeLogger = SafeLogger(__name__)

CHECK_INTERVAL_S = 1.0  # how often it is checked whether anything moves
CANCEL_TIMEOUT_S = 10.0  # for what is given up to end: a copy or a write under way is waited for


class Drained(Protocol):
    """What is waited for."""

    def give_up(self, reason: CheckpointError | None = None) -> None:
        """Cancel it; `reason` is why, if it is to fail with that."""

    def abandon(self, error: CheckpointError) -> None:
        """Wake all who wait for it, with `error`."""


class Drain:
    """One wait for the end of all flows."""

    def __init__(self, activity: Activity, drained: Drained, *, max_idle_s: float) -> None:
        """Begin to wait.

        Args:
            activity: says whether anything moves.
            drained: what is waited for.
            max_idle_s: seconds for which nothing may move before it is given up.
        """
        self._activity = activity
        self._drained = drained
        self._still_s = max_idle_s
        self._given_up_at: float | None = None
        self._why = ""
        activity.note_progress()

    def give_up(self, why: str, reason: CheckpointError | None = None) -> None:
        """Give up what is under way, once."""
        if self._given_up_at is None:
            self._given_up_at, self._why = time.monotonic(), why
            self._drained.give_up(reason)

    def check(self) -> None:
        """Give up what does not move, and raise `ClosedError` when that does not end either."""
        if self._given_up_at is None and self._activity.idle_s() > self._still_s:
            why = f"no progress for {self._still_s:.0f} s: {self._activity}"
            log.error("closing cancels the work in flight: %s", why)
            self.give_up(why, SaveError(f"cancelled while closing: {why}"))
        if self._given_up_at is not None and time.monotonic() - self._given_up_at > CANCEL_TIMEOUT_S:
            stuck = ClosedError(f"closed with work still in flight: {self._activity} ({self._why})")
            self._drained.abandon(stuck)
            raise stuck
