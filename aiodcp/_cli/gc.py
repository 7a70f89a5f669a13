"""`aiodcp gc`: steps removed by hand. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import anyio

from .._format.naming import is_leftover
from .._log import SafeLogger
from ..errors import ArgumentError
from ..manager.retention import Retention
from ..manager.step_names import find_names
from ..manager.steps import list_steps, remove_leftovers, remove_step
from ..storage.base import Storage
from ..storage.leases import unless_leased
from ..storage.object_urls import scheme_of
from .locations import locate_root, refuse_checkpoint
from .ls import rows_of
from .text_tables import plural, size

log = SafeLogger(__name__)


def collect(root: str, retention: Retention, *, dry_run: bool) -> dict[str, Any]:
    """Remove the steps that are not to be kept, and what interrupted saves have left; return which.

    Raises:
        ArgumentError: it is not a directory of steps, or a process that saves there is alive.
        OSError: a step cannot be removed.
    """
    return anyio.run(_collect, *locate_root(root), retention, dry_run)


async def _collect(storage: Storage, root: str, retention: Retention, dry_run: bool) -> dict[str, Any]:
    await refuse_checkpoint(storage, root)
    async with storage.lock(root, exclusive=False):  # there may be no lock there yet that could be exclusive
        pass
    async with storage.lock(root, exclusive=True) as is_locked:
        if not is_locked:
            problem = f"another process is saving below {root}, and removes steps itself"
            if scheme_of(root) is not None:
                problem += "; or one was killed a minute ago or less"
            raise ArgumentError("root", problem)
        names = find_names(await storage.list_children(root))
        to_remove = retention.to_remove((await list_steps(storage, root, names)).steps)
        if dry_run:
            return _explain(to_remove, await rows_of(storage, root))
        leftovers = await remove_leftovers(storage, root, lambda name: False, is_leftover, names)
        for step in list(to_remove):
            async with unless_leased(storage, names.path(root, step)) as is_free:
                if is_free:
                    await remove_step(storage, names.path(root, step), set())
                else:
                    log.warning("step %d is leased by a process that reads it, and is kept", step)
                    to_remove.remove(step)
    return {"removed": to_remove, "leftovers": leftovers}


def _explain(to_remove: Sequence[int], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what would be removed, with the reason of each by its step."""
    why: dict[int, str] = {}
    for row in rows:
        held = f"{plural(row['files'], 'file')}, {size(row['nbytes'])}"
        if row["step"] in to_remove:
            why[row["step"]] = f"{held}; the options do not keep it"
        elif not row["complete"]:
            why[row["step"]] = f"{held}; it has no .metadata, and no process that saves here is alive"
    return {"removed": list(to_remove), "leftovers": sorted(why.keys() - set(to_remove)), "why": why}
