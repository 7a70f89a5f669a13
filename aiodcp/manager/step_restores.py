"""Restoring a step: which one is the latest, and which is taken when that one is damaged."""

from __future__ import annotations

from collections.abc import AsyncGenerator, MutableMapping, Sequence
from functools import partial
from typing import Any, Literal

from torch.distributed.checkpoint.planner import LoadPlanner

from .._load.options import LoadOptions
from .._load.report import LoadReport
from .._telemetry.progress_bar import NoBar
from ..checkpointer.session import Session
from ..errors import ArgumentError, CorruptError, LoadError, RankError, ReadError
from .arguments import InitialLoad, check_step
from .catalog import StepCatalog
from .reporter import Reporter
from .watch import After, StepFollower, WatchedStep, check_watch, follow


class RestoredStep(int):
    """The step that `restore` has loaded, a number, with what was left out of it or converted.

    Attributes:
        report: as `Checkpointer.load` returns it.
    """

    report: LoadReport

    def __new__(cls, step: int, report: LoadReport) -> RestoredStep:
        made = super().__new__(cls, step)
        made.report = report
        return made

    def __reduce__(self) -> tuple[type[RestoredStep], tuple[int, LoadReport]]:
        return RestoredStep, (int(self), self.report)

    def __repr__(self) -> str:
        return int.__repr__(self)


class StepRestores:
    """The restores of one manager."""

    def __init__(self, session: Session, catalog: StepCatalog, reporter: Reporter) -> None:
        self._session = session
        self._catalog = catalog
        self._reporter = reporter

    async def refresh(self) -> None:
        """Look again which steps are complete, and know the same on all ranks."""
        since = self._catalog.change_count()
        self._catalog.update(await self._session.flows.ask("list steps", self._catalog.list_complete), since)

    def watch(self, after: After, poll_s: float | None) -> AsyncGenerator[WatchedStep, None]:
        """Implement `CheckpointManager.watch`."""
        check_watch(after, poll_s)
        self._session.flows.check_open()
        follower = StepFollower(self._session.storage, self._catalog.root, after, self._catalog.names)

        async def look(*, at_all: bool) -> list[WatchedStep]:
            self._session.flows.check_open()
            return await self._session.flows.run(partial(follower.look, at_all=at_all))

        return follow(follower, look, poll_s)

    async def restore(
        self,
        state_dict: MutableMapping[str, Any],
        step: int | Literal["latest", "best"],
        *,
        fall_back: bool,
        planner: LoadPlanner | None,
        options: LoadOptions,
    ) -> RestoredStep | None:
        """Implement `CheckpointManager.restore`."""
        if step not in ("latest", "best"):
            check_step(step)
        if step == "best" and self._catalog.retention.keep_best is None:
            raise ArgumentError("step", '"best" needs keep_best=, which names the metric')
        self._session.flows.check_open()
        await self._session.flows.wait_for_saves()
        await self.refresh()
        candidates = self._candidates(step, fall_back=fall_back)
        with self._catalog.use(*candidates):
            for number in candidates:
                try:
                    with self._reporter.restoring(number) as bar:
                        path = self._catalog.path(number)
                        report = await self._session.loads.load(state_dict, path, planner, options, bar)
                    return RestoredStep(number, report)
                except (CorruptError, RankError) as error:
                    if number == candidates[-1] or not _is_damage(error):
                        raise
                    self._catalog.mark_damaged(number)
                    self._reporter.fell_back(number, error)
        return None

    async def load_initial(self, state_dict: MutableMapping[str, Any], initial: InitialLoad) -> None:
        """Load what a run begins with.

        Raises:
            ArgumentError: `initial` is no `InitialLoad`.
        """
        if not isinstance(initial, InitialLoad):
            raise ArgumentError("initial", f"must be an InitialLoad, got {type(initial).__name__}")
        options = LoadOptions(
            strict=initial.strict,
            cast=initial.cast,
            weights_only=initial.weights_only,
            check_crc=True,
            rename=initial.rename,
            include=initial.include,
            exclude=initial.exclude,
        )
        await self._session.loads.load(state_dict, initial.checkpoint_id, None, options, NoBar())

    def _candidates(self, step: int | Literal["latest", "best"], *, fall_back: bool) -> Sequence[int]:
        """Return which steps to try, one after the other."""
        numbers = [each.step for each in self._catalog.newest]
        if step == "latest":
            self._refuse_to_pass_over(fall_back=fall_back)
        if isinstance(step, int):
            numbers = [step, *(numbers[numbers.index(step) + 1 :] if step in numbers else ())]
        elif step == "best":
            numbers = self._catalog.retention.best(self._catalog.known)
        return numbers if fall_back else numbers[:1]

    def _refuse_to_pass_over(self, *, fall_back: bool) -> None:
        """Refuse to take an older step for the latest because the latest cannot be read."""
        unreadable, last = self._catalog.unreadable, next(iter(self._catalog.newest), None)
        if last is None:
            suspects = list(unreadable)
        elif last.commit_number:  # those that it knew of are older
            suspects = [step for step in unreadable if step not in last.after]
        else:
            suspects = [step for step in unreadable if step > last.step]
        if suspects and (last is None or not fall_back):
            step = max(suspects)
            path = self._catalog.path(step)
            raise ReadError(path, f"this may be the latest step: {unreadable[step]}")


def _is_damage(error: LoadError) -> bool:
    """Whether what is stored is damaged, as this rank found or another one."""
    kinds = {failure.kind for failure in error.failures} if isinstance(error, RankError) else {type(error).__name__}
    return kinds == {CorruptError.__name__}
