"""The thread in which the application's own functions are called, so that none of them can hold up a save."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVarTuple

from .._log import SafeLogger

log = SafeLogger(__name__)

Ts = TypeVarTuple("Ts")

NAME = "aiodcp-callbacks"


class CallbackThread:
    """Calls functions one after the other, in the order in which that was asked for.

    The thread lives for as long as there is something to call.
    """

    def __init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._home = os.getpid()
        self._lock = threading.Lock()
        self._calls: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._pid = 0  # of the process in which the thread runs; 0 when there is none

    def call(self, function: Callable[[*Ts], object], *args: *Ts) -> None:
        """Have `function` called soon; what it raises is logged. From any thread; never blocks."""
        if self._home != os.getpid():  # forked: what is waiting is the parent's, and the lock may be held for ever
            self._begin()
        with self._lock:
            self._calls.append((function, args))
            if self._pid == os.getpid():
                return
            self._pid = os.getpid()
        try:
            threading.Thread(target=self._run, name=NAME, daemon=True).start()
        except RuntimeError:  # no thread can be started, at the interpreter's exit or for want of memory
            self._run()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._calls:
                    self._pid = 0
                    return
                function, args = self._calls.popleft()
            try:
                function(*args)
            except BaseException:  # SystemExit, too: it would end this thread, and nothing else
                log.exception("%r raised", function)
            del function, args  # or the last call's would live on


callbacks = CallbackThread()
"""For functions that belong to no manager."""
