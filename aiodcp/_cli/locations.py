"""Where a root lies that is named on the command line. No torch here."""

from __future__ import annotations

from pathlib import Path

from .._format.naming import METADATA_NAME
from ..errors import ArgumentError
from ..storage.auto import locate
from ..storage.base import Storage
from ..storage.object_urls import scheme_of


def locate_root(root: str) -> tuple[Storage, str]:
    """Return the storage that a directory of steps is in, and its id there.

    Raises:
        ArgumentError: it is not a directory, or a URL for which there is no storage.
    """
    storage, path = locate(root)
    if scheme_of(path) is None and not Path(path).is_dir():
        raise ArgumentError("root", f"{root} is not a directory")
    return storage, path


async def refuse_checkpoint(storage: Storage, root: str) -> None:
    """Raise `ArgumentError` if `root` is not a directory of steps but a checkpoint."""
    try:
        async with storage.open(root, METADATA_NAME):
            raise ArgumentError("root", f"{root} is a checkpoint, not a directory of steps: see `aiodcp show`")
    except (FileNotFoundError, NotADirectoryError):
        return
