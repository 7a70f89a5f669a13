"""When to stop: on a signal, at a deadline, when asked to, or when another rank stops."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from .._distributed.stop_agreement import StopAgreement
from .._engine.milestone import MilestoneSource
from .._engine.threads import start_thread
from .._log import SafeLogger
from ..errors import ClosedError

log: SafeLogger = SafeLogger(__name__)

_LONGEST_WAIT_S = 3600.0  # a queue does not wait for ever so long


class Preemption:
    """One rank's view, and the thread that listens.

    Attributes:
        reason: why this rank is to stop, in words; empty until it is known.
    """

    def __init__(
        self,
        preempted: MilestoneSource,
        *,
        signals: Sequence[signal.Signals],
        before: Mapping[int, Any],
        grace_s: float,
        deadline: float | None,
        agreement: StopAgreement | None,
        on_heard: Callable[[], None],
    ) -> None:
        """Begin to listen. In the main thread, if there are signals to hear.

        Args:
            preempted: reached when this rank is to stop; those who still wait for it on closing are let go.
            signals: to hear.
            before: handlers to put back in the end, where they are not the ones that are set now.
            grace_s: seconds from when it is heard until the process is ended.
            deadline: when the process will be ended, in seconds of `time.time()`: heard `grace_s` before.
            agreement: with the other ranks; None if there are none.
            on_heard: called when it is heard that the process will be ended, from the thread that listens.

        Raises:
            ValueError, OSError: signals can only be heard in the main thread, and not all of them can.
        """
        self._milestone = preempted
        self.reason: str = ""
        self._grace_s = grace_s
        self._deadline = deadline
        self._agreement = agreement
        self._on_heard = on_heard
        self._stop_by: float | None = None
        self._news: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # a signal may interrupt even its own `put`
        self._before: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()
        self._is_closed = False
        self._thread: threading.Thread | None = None
        try:
            for each in dict.fromkeys(signals):
                handler = before.get(each, signal.getsignal(each))
                # None is a handler that was not set by Python, and cannot be put back by it.
                self._before[each] = handler if handler is not None else signal.SIG_DFL
                signal.signal(each, self._on_signal)
        except (ValueError, OSError):
            self.close()
            raise
        self._thread = start_thread("preempt", self._listen)

    def close(self) -> None:
        """Listen no longer, and hand the signals back. Once is enough."""
        self._is_closed = True
        self._milestone.abandon(ClosedError("the manager was closed before the run was preempted"))
        for each in self._before:
            if signal.getsignal(each) == self._on_signal:  # nobody has taken it over meanwhile
                signal.signal(each, self._handler_before(each))
        if self._thread is not None:
            self._news.put(None)
            self._thread.join()
            self._thread = None

    def _handler_before(self, number: signal.Signals) -> Any:
        """Return what handled a signal before: not another one's handler that has been closed meanwhile."""
        handler = self._before[number]
        other = getattr(handler, "__self__", None)
        if isinstance(other, Preemption) and other._is_closed:
            return other._handler_before(number)
        return handler

    def ask(self, reason: str) -> None:
        """Ask all ranks to stop. From any thread, and from a signal's handler."""
        self._news.put(reason)

    @property
    def left_s(self) -> float | None:
        """Seconds until the process is ended; None if that is not known."""
        return None if self._stop_by is None else max(0.0, self._stop_by - time.monotonic())

    def stops_at(self, step: int) -> bool:
        """Whether to stop at a step, or at one before. Waits for the ranks to agree, once it has been heard."""
        if self._agreement is None:
            return self._milestone.done()
        if not self._agreement.stops_at(step):
            return False
        self._milestone.reach()
        return True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        signal.signal(number, self._handler_before(signal.Signals(number)))  # a second one does what it did before
        if self._is_closed or os.getpid() != self._pid:  # left, or a forked child's: not ours to hear any more
            os.kill(os.getpid(), number)
        else:
            self.ask(f"signal {signal.Signals(number).name}")

    # --- the thread

    def _listen(self) -> None:
        while not self.reason:
            try:
                news = self._news.get(timeout=self._next_look_s())
            except queue.Empty:
                news = self._look()
            if news is None:
                return
            if news:
                self._hear(news)
        if self._agreement is None or self._agreement.agree(self.reason, self._sleep):
            self._milestone.reach()

    def _sleep(self, seconds: float) -> bool:
        """Sleep; return False when closed before."""
        try:
            if self._news.get(timeout=seconds) is None:
                self._news.put(None)
                return False
        except queue.Empty:
            pass
        return True

    def _next_look_s(self) -> float | None:
        waits = [] if self._agreement is None else [self._agreement.look_s]
        if self._deadline is not None:
            waits.append(min(_LONGEST_WAIT_S, max(0.0, self._deadline - self._grace_s - time.time())))
        return min(waits, default=None)

    def _look(self) -> str:
        """Return what is to be heard: the deadline, or another rank."""
        if self._deadline is not None and time.time() >= self._deadline - self._grace_s:
            return "the deadline"
        if self._agreement is None:
            return ""
        try:
            return self._agreement.reason_of_others()
        except RuntimeError as error:
            log.warning("can no longer receive preemption requests from other ranks: %s", error)
            self._agreement = None
            return ""

    def _hear(self, reason: str) -> None:
        if self._agreement is not None:
            self._agreement.freeze()
        left_s = self._grace_s
        if self._deadline is not None:
            left_s = min(left_s, max(0.0, self._deadline - time.time()))
        self._stop_by = time.monotonic() + left_s
        self.reason = reason
        log.warning("preemption requested, %.1f s left: %s", left_s, reason)
        self._on_heard()
