"""`aiodcp gc`: steps removed by hand. No torch here."""

from __future__ import annotations

from typing import Any

import anyio

from .._format.naming import is_leftover
from ..errors import ArgumentError
from ..manager.retention import Retention
from ..manager.steps import list_steps, remove_leftovers, remove_step, step_path
from ..storage.local import LocalStorage
from .ls import _check_root, _look


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
                await remove_step(storage, step_path(root, step), set())
    return {"removed": doomed, "leftovers": leftovers}
