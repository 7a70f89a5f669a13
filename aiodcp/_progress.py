"""A progress bar on a terminal, for what takes long; nothing elsewhere. The bar is rich's, if that is installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

SHOWN_AFTER_S = 1.0  # what is over sooner needs no bar


class Bar(Protocol):
    """How far something has come, in bytes. From any thread."""

    def total(self, nbytes: int) -> None: ...
    def advance(self, nbytes: int) -> None: ...


class _Nothing:
    def total(self, nbytes: int) -> None:
        return

    def advance(self, nbytes: int) -> None:
        return


class _RichBar:
    def __init__(self, progress: Any, title: str) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=None)

    def total(self, nbytes: int) -> None:
        self._progress.update(self._task, total=nbytes)

    def advance(self, nbytes: int) -> None:
        self._progress.advance(self._task, nbytes)


@contextmanager
def bar(title: str) -> Iterator[Bar]:
    """Show a bar on standard error while the block runs, if that is a terminal."""
    if not sys.stderr.isatty():
        yield _Nothing()
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
    except ImportError:
        yield _Nothing()
        return
    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _RichBar(progress, title)
