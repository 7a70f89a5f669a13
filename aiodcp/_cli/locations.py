"""Where a checkpoint or a root lies that is named on the command line. No torch here."""

from __future__ import annotations

from pathlib import Path

from .._format.naming import METADATA_NAME
from ..errors import ArgumentError
from ..storage.base import Storage
from ..storage.local import LocalStorage


def storage_of(location: str) -> Storage:
    """Return the storage that a location is in.

    Raises:
        ArgumentError: there is none for such a URL.
    """
    storage = LocalStorage()
    storage.resolve(location)
    return storage


def storage_of_root(root: str) -> Storage:
    """Return the storage that a directory of steps is in.

    Raises:
        ArgumentError: it is not a directory, or a URL for which there is no storage.
    """
    storage = storage_of(root)
    if isinstance(storage, LocalStorage) and not Path(root).is_dir():
        raise ArgumentError("root", f"{root} is not a directory")
    return storage


async def refuse_checkpoint(storage: Storage, root: str) -> None:
    """Raise `ArgumentError` if `root` is not a directory of steps but a checkpoint."""
    if METADATA_NAME in await storage.list_files(root):
        raise ArgumentError("root", f"{root} is a checkpoint, not a directory of steps: see `aiodcp show`")
