"""What a manager knows of its steps, and of what it has done."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final

from ..errors import NotACheckpointError
from .catalog import StepCatalog
from .events import Event, Stats
from .reporter import Reporter
from .step_restores import StepRestores
from .watch import After, WatchedStep, sync_iterator


class StepView:
    """The read side of a `CheckpointManager`."""

    _catalog: StepCatalog
    _reporter: Reporter
    _restores: StepRestores

    def steps(self) -> list[int]:
        """Return the complete steps, oldest first, as this manager knows them: see `refresh`.

        Raises:
            ClosedError: the manager has never been entered, and has not looked.
        """
        return [each.step for each in self._catalog.known]

    @property
    def latest(self) -> int | None:
        """The most recently committed step, even after the run was rolled back."""
        return next((each.step for each in self._catalog.newest), None)

    @property
    def best(self) -> int | None:
        """The step with the best of the metric that `keep_best` names; of equal ones the newest."""
        return next(iter(self._catalog.retention.best(self._catalog.known)), None)

    def metrics(self, step: int) -> dict[str, float]:
        """Return the metrics that a step was saved with.

        Raises:
            NotACheckpointError: the step is not there, or not complete.
        """
        for each in self._catalog.known:
            if each.step == step:
                return dict(each.metrics)
        raise NotACheckpointError(self.path(step))

    def path(self, step: int) -> str:
        """Return where the checkpoint of a step is, or will be."""
        return self._catalog.path(step)

    @property
    def stats(self) -> Stats:
        """What has been done so far."""
        return self._reporter.stats

    def events(self) -> AsyncIterator[Event]:
        """Iterate over what happens from now on, until the manager is left."""
        return self._reporter.follow()

    def watch(self, *, after: After = None, poll_s: float | None = None) -> AsyncGenerator[WatchedStep, None]:
        """Iterate over steps as they are committed, by any process, until the manager is left: see `aiodcp.watch`."""
        return self._restores.watch(after, poll_s)

    watch_sync: Final = sync_iterator(watch)
