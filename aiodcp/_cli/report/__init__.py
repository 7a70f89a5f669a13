"""`aiodcp report`: the saves of a root as one page that needs no network. No torch here."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import anyio

from ...errors import WriteError
from ...manager.history import read_history
from ...storage.base import Storage
from ...storage.error_mapping import read_errors
from ..locations import locate_root
from ..ls import rows_of
from .page import page_of
from .runs import runs_of


def write_report(root: str, out: str) -> str:
    """Write the report on a root to a file, and return the file's path.

    Raises:
        ArgumentError: the root is not a directory, or is a checkpoint.
        ReadError: storage failed.
        WriteError: the file cannot be written.
    """
    storage, where = locate_root(root)
    rows, events = anyio.run(_read, storage, where)
    path = Path(out)
    try:
        path.write_text(page_of(storage.describe(where), rows, runs_of(events), now=time.time()), encoding="utf-8")
    except OSError as error:
        raise WriteError(str(path), str(error)) from error
    return str(path)


async def _read(storage: Storage, root: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    rows = await rows_of(storage, root)
    with read_errors(storage.describe(root)):
        return rows, await read_history(storage, root)
