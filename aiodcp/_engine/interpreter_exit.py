"""The end of the interpreter: what is still to be done then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from weakref import WeakSet

FINISH_LIMIT_S = 10.0

_finishing: WeakSet[threading.Thread] = WeakSet()


def at_exit(function: Callable[[], None]) -> None:
    """Have `function` called when the interpreter ends, while all threads still run: `atexit` comes too late.

    Functions are called in the opposite order, so this one before `concurrent.futures` refuses all work, as the
    application's own storage may need it. Source: Lib/threading.py, `_shutdown`.
    """
    with suppress(RuntimeError):  # it is ending already: what is opened now is not waited for
        threading._register_atexit(function)  # type: ignore[attr-defined]


def finish_at_exit(thread: threading.Thread) -> None:
    """Have the end wait for a thread, within bounds: one that comes back from C++ later aborts the process."""
    _finishing.add(thread)


def _finish() -> None:
    until = time.monotonic() + FINISH_LIMIT_S
    for thread in list(_finishing):
        thread.join(max(0.0, until - time.monotonic()))


at_exit(_finish)
