"""From the `OSError`s of a storage to the errors of this library."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import CorruptError, LoadError, ReadError, WriteError


@contextmanager
def foreign_exits() -> Iterator[None]:
    """Make an `OSError` of what would end the library's tasks or its event loop, and is a storage's own affair.

    A client written in Rust may panic, which is no `Exception`; and one that cancels a request of its own, such as a
    watchdog, raises the error by which tasks here are cancelled.
    """
    try:
        yield
    except (Exception, GeneratorExit):
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise OSError(errno.ECANCELED, "the storage has cancelled its own call") from error
    except BaseException as error:
        raise OSError(f"the storage raised {error!r}") from error


@contextmanager
def write_errors(path: str) -> Iterator[None]:
    """Make a `WriteError` of what a storage raises."""
    try:
        yield
    except OSError as error:
        raise WriteError(path, str(error)) from error


@contextmanager
def read_errors(path: str) -> Iterator[None]:
    try:
        yield
    except LoadError:
        raise
    except EOFError as error:
        raise CorruptError(path, "", f"truncated: {error}") from error
    except OSError as error:
        raise ReadError(path, str(error)) from error
