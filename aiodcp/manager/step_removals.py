"""Steps removed because someone says so."""

from __future__ import annotations

from ..checkpointer.session import Session
from ..errors import BusyError, NotACheckpointError, WriteError
from ..storage.error_mapping import write_errors
from .arguments import check_step
from .catalog import StepCatalog
from .reporter import Reporter

_REMOVED, _LEASED, _ABSENT = b"removed", b"leased", b"absent"


class StepRemovals:
    """The removals of one manager that are not by its retention."""

    def __init__(self, session: Session, catalog: StepCatalog, reporter: Reporter) -> None:
        self._session = session
        self._catalog = catalog
        self._reporter = reporter

    async def delete(self, step: int) -> None:
        """Implement `CheckpointManager.delete`."""
        check_step(step)
        flows, catalog = self._session.flows, self._catalog
        flows.check_open()
        path = catalog.path(step)
        problem = BusyError(path) if catalog.is_in_use(step) else None

        async def remove() -> bytes:
            with write_errors(path):
                if not await catalog.storage.list_files(path):
                    return _ABSENT
                return _REMOVED if await catalog.delete(step) else _LEASED

        answer = await flows.ask("delete a step", remove, problem=problem)
        if answer == _LEASED:
            raise WriteError(path, "another process has a lease of it, and reads it: delete it later")
        catalog.forget(step)
        if answer == _ABSENT:
            raise NotACheckpointError(path)
        if flows.is_coordinator:
            self._reporter.removed(step, None)
