"""When to stop: on a signal, at a deadline, or when asked to; and at which step, so that all ranks stop at the same.

One rank may hear of it and the others not, and ranks that train in step must not wait for each other at different
steps. So they agree, by way of torch.distributed's store, without the threads that train:

    a rank hears     sets the flag
    every rank       sees it within a second, says which step it has last been asked about, and freezes: whoever is
                     asked about a later step waits
    coordinator      when all have said theirs: the step after the latest of them is the one
    every rank       hears of it, and thaws; asked about that step, or a later one, it says yes

The frozen wait for no rank's training, so nothing can wait for them in turn.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any

from .._engine.milestone import Milestone, MilestoneSource
from .._log import SafeLogger
from ..errors import ClosedError

log = SafeLogger(__name__)


POLL_S = 1.0  # how often a rank looks at the store: 4,096 of them ask it as many times a second

_AGREE_POLL_S = 0.1

_LONGEST_WAIT_S = 3600.0  # a queue does not wait for ever so long

AGREE_S = 30.0  # after which a rank that is asked waits no longer for the others: some of them are gone


class Preemption:
    """One rank's view, and the thread that looks.

    Attributes:
        preempted: reached when this rank is to stop; who waits for it longer than this listens is let go.
        reason: why, in words; empty until it is known.
        has_started: whether it has ever listened.
        on_heard: called when it is heard that the process will be ended, from the thread that looks.
    """

    def __init__(self, *, signals: Sequence[signal.Signals], grace_s: float, deadline: float | None) -> None:
        """Prepare; nothing happens before `start`.

        Args:
            signals: to hear.
            grace_s: seconds from when it is heard until the process is ended.
            deadline: when the process will be ended, in seconds of `time.time()`: heard `grace_s` before.
        """
        self._milestone = MilestoneSource("preempted")
        self.preempted = Milestone(self._milestone)
        self.reason = ""
        self.has_started = False
        self.on_heard: Callable[[], None] = lambda: None
        self._signals = list(dict.fromkeys(signals))
        self._grace_s = grace_s
        self._deadline = deadline
        self._stop_by: float | None = None
        self._news: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # a signal may interrupt even its own `put`
        self._before: dict[signal.Signals, Any] = {}
        self._pid = os.getpid()
        self._is_closed = False
        self._lock = threading.Lock()
        self._answered = -1  # up to which step the answer was no
        self._frozen = False
        self._decided = threading.Event()
        self._at = 0
        self._thread: threading.Thread | None = None
        self._store: Any = None
        self._rank = self._root = 0
        self._size = 1

    def anew(self) -> Preemption:
        """Return one that has heard nothing yet."""
        return Preemption(signals=self._signals, grace_s=self._grace_s, deadline=self._deadline)

    def start(
        self, before: Mapping[int, Any], *, store: Any = None, rank: int = 0, size: int = 1, root: int = 0
    ) -> None:
        """Begin to listen. In the main thread, if there are signals to hear.

        Args:
            before: handlers to put back in the end, where they are not the ones that are set now.
            store: shared by the ranks; None if there is one.
            rank, size, root: this rank, how many there are, the coordinator.

        Raises:
            ValueError, OSError: signals can only be heard in the main thread, and not all of them can.
        """
        self.has_started = True
        self._store, self._rank, self._size, self._root = store, rank, size, root
        try:
            for each in self._signals:
                handler = before.get(each, signal.getsignal(each))
                self._before[each] = (
                    handler if handler is not None else signal.SIG_DFL
                )  # None: not Python's to put back
                signal.signal(each, self._on_signal)
        except (ValueError, OSError):
            self.close()
            raise
        self._thread = threading.Thread(target=self._listen, name="aiodcp-preempt", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no longer, and hand the signals back."""
        self._is_closed = True
        self._milestone.abandon(ClosedError("the manager was left, and the run was not preempted"))
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
        """Seconds until the process is ended; None if nobody has said so."""
        return None if self._stop_by is None else max(0.0, self._stop_by - time.monotonic())

    def stops_at(self, step: int) -> bool:
        """Whether to stop at a step, or at one before. Waits for the ranks to agree, once it has been heard."""
        if self._size == 1:
            return self._milestone.done()
        with self._lock:
            if not self._frozen and step > self._answered:
                self._answered = step
                return False
            if not self._decided.is_set() and step <= self._answered:
                return False
        if not self._decided.wait(AGREE_S):
            log.error("stopping at step %d: the ranks have not agreed on one within %.0f s", step, AGREE_S)
            self._at = step
        if step < self._at:
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
        if self._size > 1:
            self._agree()
        else:
            self._milestone.reach()

    def _next_look_s(self) -> float | None:
        waits = [] if self._store is None else [POLL_S]
        if self._deadline is not None:
            waits.append(min(_LONGEST_WAIT_S, max(0.0, self._deadline - self._grace_s - time.time())))
        return min(waits, default=None)

    def _look(self) -> str:
        """Return what is to be heard: the deadline, or another rank."""
        if self._deadline is not None and time.time() >= self._deadline - self._grace_s:
            return "the deadline"
        if self._store is None:
            return ""
        try:
            return self._store.get("preempt/reason").decode() if self._store.check(["preempt/reason"]) else ""
        except RuntimeError as error:  # the process that holds the store is gone, and the ranks with it
            log.warning("cannot hear of preemption from other ranks any more: %s", error)
            self._store, self._size = None, 1
            return ""

    def _hear(self, reason: str) -> None:
        with self._lock:
            self._frozen = True
        left_s = self._grace_s
        if self._deadline is not None:
            left_s = min(left_s, max(0.0, self._deadline - time.time()))
        self._stop_by = time.monotonic() + left_s
        self.reason = reason
        log.warning("rank %d: to be stopped within %.1f s: %s", self._rank, left_s, reason)
        self.on_heard()

    def _agree(self) -> None:
        try:
            self._store.set("preempt/reason", self.reason)
            self._store.set(f"preempt/step/{self._rank}", str(self._answered))
            if self._rank == self._root:
                keys = [f"preempt/step/{rank}" for rank in range(self._size)]
                if self._until_there(keys):
                    latest = max(int(self._store.get(key)) for key in keys)
                    self._store.set("preempt/at", str(latest + 1))
            if self._until_there(["preempt/at"]):
                self._at = int(self._store.get("preempt/at"))
                self._decided.set()
                if self._at == 0:  # no rank asks about steps
                    self._milestone.reach()
        except RuntimeError as error:
            log.warning("the ranks cannot agree on a step to stop at: %s", error)
            self._decided.set()

    def _until_there(self, keys: list[str]) -> bool:
        """Wait for keys of the store; return False when closed before."""
        while not self._store.check(keys):
            try:
                if self._news.get(timeout=_AGREE_POLL_S) is None:
                    self._news.put(None)
                    return False
            except queue.Empty:
                continue
        return True
