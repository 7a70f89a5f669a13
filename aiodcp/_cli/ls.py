"""`aiodcp ls`: the steps of a root, as a person looks at them. No torch here."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio

from .._format.naming import METADATA_NAME, is_leftover
from .._load.read_custom_metadata import read_custom_metadata
from ..errors import ArgumentError, LoadError, NotACheckpointError
from ..manager.steps import metrics_of, step_of, step_path
from ..storage.local import LocalStorage
from .text_tables import number, plural, size, table


def list_rows(root: str) -> list[dict[str, Any]]:
    """Return what there is of each step, in order: complete ones and what saves under way or interrupted have left.

    Raises:
        ArgumentError: it is no directory, or a checkpoint.
    """
    _check_root(root)
    return anyio.run(_look, root)


def _check_root(root: str) -> None:
    if not Path(root).is_dir():
        raise ArgumentError("root", f"{root} is no directory")
    if Path(root, METADATA_NAME).exists():
        raise ArgumentError("root", f"{root} is a checkpoint, not a directory of steps: see `aiodcp show`")


async def _look(root: str) -> list[dict[str, Any]]:
    storage = LocalStorage()
    rows: list[dict[str, Any]] = []
    for name in await storage.places(root):
        step = step_of(name)
        if step is None:
            continue
        place = step_path(root, step)
        stats = {}
        for file in await storage.names(place):
            with suppress(FileNotFoundError):  # a save goes on meanwhile
                stats[file] = os.stat(os.path.join(place, file))
        complete = METADATA_NAME in stats
        if stats and not complete and not any(map(is_leftover, stats)):
            continue  # files of the user's own
        rows.append(
            {
                "step": step,
                "complete": complete,
                "saved_at": stats[METADATA_NAME].st_mtime if complete else None,
                "nbytes": sum(stat.st_size for stat in stats.values()),
                "files": len(stats),
                "metrics": {},
                "problem": "",
            }
        )
        if complete:
            try:
                rows[-1]["metrics"] = metrics_of(await read_custom_metadata(storage, place))
            except NotACheckpointError:  # removed meanwhile
                continue
            except LoadError as error:
                rows[-1]["problem"] = str(error)
    return sorted(rows, key=lambda row: row["step"])


def format_steps(rows: list[dict[str, Any]]) -> str:
    """Return the table of `aiodcp ls`."""
    cells = []
    for row in rows:
        when = (
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["saved_at"])) if row["complete"] else "not complete"
        )
        metrics = row["problem"] or ", ".join(f"{name} {number(value)}" for name, value in row["metrics"].items())
        cells.append([str(row["step"]), when, size(row["nbytes"]), str(row["files"]), metrics])
    total = f"{plural(len(rows), 'step')}, {size(sum(row['nbytes'] for row in rows))}"
    return f"{table(['>step', 'saved', '>size', '>files', 'metrics'], cells)}\n{total}" if rows else "no steps"
