"""A progress bar on a terminal, for what takes long; nothing elsewhere. The bar is rich's, if that is installed."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from .._log import SafeLogger

log = SafeLogger(__name__)


SHOWN_AFTER_S = 1.0  # what is over sooner needs no bar

_on_show = threading.Lock()  # a terminal has room for one


class Bar(Protocol):
    """How far something has come, in bytes. From any thread."""

    def total(self, nbytes: int) -> None: ...
    def advance(self, nbytes: int) -> None: ...


class NoBar:
    """Shows nothing."""

    def total(self, nbytes: int) -> None:
        return

    def advance(self, nbytes: int) -> None:
        return


class RichBar:
    """Shows itself when the first bytes come after `SHOWN_AFTER_S`, unless another bar is on show."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._total: int | None = None
        self._done = 0
        self._progress: Any = None
        self._is_closed = False

    def total(self, nbytes: int) -> None:
        self._total = nbytes

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            if self._is_closed:
                return
            try:
                if self._progress is None and time.monotonic() >= self._began + SHOWN_AFTER_S:
                    self._show()
                if self._progress is not None:
                    self._progress.update(self._progress.task_ids[0], completed=self._done, total=self._total)
            except Exception:  # the terminal is gone: that is not to fail what the bar shows
                self._is_closed = True
                log.exception("the progress bar failed")

    def _show(self) -> None:
        if not _on_show.acquire(blocking=False):
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

        columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True)]
        progress = Progress(*columns, TransferSpeedColumn(), console=Console(file=sys.stderr), transient=True)
        progress.start()
        progress.add_task(self._title, total=self._total)
        self._progress = progress

    def close(self) -> None:
        with self._lock:
            self._is_closed = True
            if self._progress is not None:
                try:
                    self._progress.stop()
                except Exception:
                    log.exception("the progress bar failed")
                self._progress = None
                _on_show.release()


@contextmanager
def bar(title: str, *, wanted: bool = True) -> Iterator[Bar]:
    """Show a bar on standard error while the block runs, if that is a terminal and rich is installed."""
    if not wanted or not _can_show():
        yield NoBar()
        return
    shown = RichBar(title)
    try:
        yield shown
    finally:
        shown.close()


def _can_show() -> bool:
    if not sys.stderr.isatty():
        return False
    try:
        import rich  # noqa: F401 - whether it is there
    except ImportError:
        return False
    return True
