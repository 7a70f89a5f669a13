"""`aiodcp ls`: the steps of a root, as a person looks at them. No torch here."""

from __future__ import annotations

import time
from typing import Any

import anyio

from .._engine.task_groups import single_error
from .._format.naming import METADATA_NAME, is_leftover
from .._load.read_custom_metadata import read_dated_custom_metadata
from ..errors import ArgumentError, LoadError, NotACheckpointError
from ..manager.step_names import find_names
from ..manager.steps import LOOKS_AT_ONCE, metrics_of
from ..storage.base import Storage
from .locations import locate_root, refuse_checkpoint
from .text_tables import duration, number, plural, size, table


def list_rows(root: str) -> list[dict[str, Any]]:
    """Return what there is of each step, in order: complete ones, and what unfinished or interrupted saves have left.

    Of a directory that has no steps but roots of some below it, those of all roots.

    Raises:
        ArgumentError: it is not a directory, or a checkpoint.
    """
    return anyio.run(_list, *locate_root(root))


async def _list(storage: Storage, root: str) -> list[dict[str, Any]]:
    return await rows_of(storage, root) or await roots_below(storage, root)


async def rows_of(storage: Storage, root: str) -> list[dict[str, Any]]:
    """As `list_rows`, from a storage."""
    await refuse_checkpoint(storage, root)
    rows: list[dict[str, Any]] = []
    limit = anyio.Semaphore(LOOKS_AT_ONCE)

    async def look(step: int) -> None:
        async with limit:
            row = await _row(storage, names.path(root, step), step)
        if row is not None:
            rows.append(row)

    children = await storage.list_children(root)
    names = find_names(children)
    with single_error():
        async with anyio.create_task_group() as group:
            for name in children:
                if (step := names.step_of(name)) is not None:
                    group.start_soon(look, step)
    return sorted(rows, key=lambda row: row["step"])


async def roots_below(storage: Storage, parent: str) -> list[dict[str, Any]]:
    """Return the rows of all roots right below a directory that is none itself, each with the root's name."""
    rows: list[dict[str, Any]] = []
    for name in await storage.list_children(parent):
        path = f"{parent}/{name}"
        try:
            await refuse_checkpoint(storage, path)
        except ArgumentError:
            continue
        rows += [{"root": name, **row} for row in await rows_of(storage, path)]
    return rows


async def _row(storage: Storage, path: str, step: int) -> dict[str, Any] | None:
    """Return what there is of a step; None if there are only files of the user's own."""
    sizes = await storage.file_sizes(path)
    complete = METADATA_NAME in sizes
    if sizes and not complete and not any(map(is_leftover, sizes)):
        return None
    row: dict[str, Any] = {
        "step": step,
        "complete": complete,
        "saved_at": None,
        "nbytes": sum(sizes.values()),
        "files": len(sizes),
        "metrics": {},
        "problem": "",
    }
    if complete:
        await _add_metadata(storage, path, row)
    return row


async def _add_metadata(storage: Storage, path: str, row: dict[str, Any]) -> None:
    """Add what the custom metadata says, and when it was written."""
    try:
        custom_metadata, row["saved_at"] = await read_dated_custom_metadata(storage, path)
        row["metrics"] = metrics_of(custom_metadata)
    except NotACheckpointError:  # removed meanwhile
        return
    except LoadError as error:
        row["problem"] = str(error)


def format_steps(rows: list[dict[str, Any]], now: float | None = None) -> str:
    """Return the table of `aiodcp ls`."""
    cells = []
    has_roots = any("root" in row for row in rows)
    now = time.time() if now is None else now
    for row in rows:
        when = "incomplete"
        if row["complete"]:
            saved_at = row["saved_at"]
            when = "?" if saved_at is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(saved_at))
        metrics = row["problem"] or ", ".join(f"{name} {number(value)}" for name, value in row["metrics"].items())
        age = "" if row["saved_at"] is None else duration(now - row["saved_at"])
        cells.append([str(row["step"]), when, age, size(row["nbytes"]), str(row["files"]), metrics])
        if has_roots:
            cells[-1].insert(0, row["root"])
    total = f"{plural(len(rows), 'step')}, {size(sum(row['nbytes'] for row in rows))}"
    titles = [*(["root"] if has_roots else []), ">step", "saved", ">age", ">size", ">files", "metrics"]
    return f"{table(titles, cells)}\n{total}" if rows else "no steps"
