"""Saves by the clock: so many seconds after the one before, on all ranks at the same step.

One process asks its clock. Of several ranks the coordinator's clock decides, and they agree on a step as they do on
the one at which a run stops: once an interval, beside the training.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .._distributed.stop_agreement import StopAgreement
from .._engine.threads import start_thread
from .._log import SafeLogger

log: SafeLogger = SafeLogger(__name__)


DUE = "time to save"


class Pacing:
    """When the next save by the clock is due."""

    def __init__(
        self, interval_s: float | None, agreement: Callable[[str], StopAgreement | None], *, leads: bool
    ) -> None:
        """Begin an interval now.

        Args:
            interval_s: seconds from save to save; None for no saves by the clock.
            agreement: returns an agreement of the ranks, by name; None if there is one process.
            leads: whether this rank's clock decides.
        """
        self._interval_s = interval_s
        self._leads = leads
        self._began_s = time.monotonic()
        self._new_agreement = agreement
        self._agreement: StopAgreement | None = None
        self._passed = threading.Event()  # the step of the agreement is passed: the next interval begins
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if interval_s is not None and (first := agreement("pace/0")) is not None:
            self._agreement = first
            self._thread = start_thread("pacing", self._listen)

    def is_due(self, step: int) -> bool:
        """Whether to save at this step. All ranks ask, in step; while they agree, it waits."""
        if self._interval_s is None or self._closed.is_set():
            return False
        if self._thread is None:
            return time.monotonic() - self._began_s >= self._interval_s
        agreement = self._agreement
        if agreement is None or not agreement.stops_at(step):
            return False
        self._agreement = None
        self._passed.set()
        return True

    def note_save(self) -> None:
        """Begin the interval anew: there is a save."""
        self._began_s = time.monotonic()

    def close(self) -> None:
        """Listen no longer."""
        self._closed.set()
        self._passed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _listen(self) -> None:
        number = 0
        while not self._closed.is_set():
            agreement = self._agreement
            assert agreement is not None
            try:
                if not self._wait_until_due(agreement):
                    return
            except RuntimeError as error:
                log.warning("saves by the clock end: the ranks cannot agree on steps any more: %s", error)
                self._agreement = None
                return
            agreement.freeze()
            agreement.agree(DUE, lambda seconds: not self._closed.wait(seconds))
            self._passed.wait()
            self._passed.clear()
            number += 1
            self._began_s = time.monotonic()
            self._agreement = self._new_agreement(f"pace/{number}")

    def _wait_until_due(self, agreement: StopAgreement) -> bool:
        """Wait for the clock, or for the rank whose clock decides; return False when closed before."""
        assert self._interval_s is not None
        while not self._closed.wait(min(agreement.look_s, self._interval_s / 4)):
            if agreement.reason_of_others():
                return True
            if self._leads and time.monotonic() - self._began_s >= self._interval_s:
                return True
        return False
