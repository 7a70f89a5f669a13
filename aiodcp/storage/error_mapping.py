"""From the `OSError`s of a storage to the errors of this library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import CorruptError, LoadError, ReadError, WriteError


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
