"""`aiodcp ls` and `aiodcp gc`: the steps of a root, as a person looks at them. No torch here."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio

from ._names import METADATA_NAME, is_leftover, step_of, step_place
from ._retain import Retention
from ._steps import list_steps, metrics_of, read_note, remove_leftovers, remove_step
from ._tables import number, plural, size, table
from .errors import ArgumentError, LoadError, NotACheckpointError
from .storage import LocalStorage


def look(root: str) -> list[dict[str, Any]]:
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
        place = step_place(root, step)
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
                rows[-1]["metrics"] = metrics_of(await read_note(storage, place))
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


def collect(root: str, retention: Retention, *, dry_run: bool) -> dict[str, Any]:
    """Remove the steps that are not to be kept, and what interrupted saves have left; return which.

    Raises:
        ArgumentError: it is no directory of steps, or a process that saves there is alive.
        OSError: a step cannot be removed.
    """
    _check_root(root)
    retention.check()
    return anyio.run(_collect, root, retention, dry_run)


async def _collect(root: str, retention: Retention, dry_run: bool) -> dict[str, Any]:
    storage = LocalStorage()
    async with storage.claim(root, alone=False):  # there may be none there yet, of which to be alone
        pass
    async with storage.claim(root, alone=True) as alone:
        if not alone:
            raise ArgumentError("root", f"a process that saves below {root} is alive, and removes steps by itself")
        doomed = retention.doomed((await list_steps(storage, root)).steps)
        if dry_run:
            leftovers = [row["step"] for row in await _look(root) if not row["complete"]]
        else:
            leftovers = await remove_leftovers(storage, root, lambda name: False, is_leftover)
            for step in doomed:
                await remove_step(storage, step_place(root, step), set())
    return {"removed": doomed, "leftovers": leftovers}
