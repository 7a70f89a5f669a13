"""What a trainer needs around a `Checkpointer`: steps, which of them to keep, where to go on, when to stop."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Self, TypeVar, Unpack, overload

from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner

from .._engine.milestone import Milestone
from .._engine.sync_bridge import SyncContext, sync_method
from .._load.options import LoadOptions, Rename
from .._state.name_patterns import Names
from ..checkpointer.arguments import OnBusy, check_id
from ..checkpointer.checkpoint import Checkpoint
from ..checkpointer.checkpointer import Checkpointer, session_of
from ..checkpointer.joint import JointCheckpoint
from ..errors import ArgumentError, SaveCancelled
from .arguments import InitialLoad, ManagerArguments, Options
from .catalog import StepCatalog
from .deadline import Deadline
from .events import Event
from .history import History
from .pacing import Pacing
from .reporter import Reporter
from .retention import Best, Retention
from .step_names import STEP_FORMAT, StepNames
from .step_removals import StepRemovals
from .step_restores import RestoredStep, StepRestores
from .step_saves import StepSaves
from .step_view import StepView
from .steps import Step
from .stopping import Stopping

CLEAR_UP_S = 1.0  # of the time that preemption leaves: to remove what was written of a save that is given up

if TYPE_CHECKING:  # at run time TypeVars have no defaults before Python 3.13
    from typing_extensions import TypeVar as TypeVarWithDefault

    SaveT = TypeVarWithDefault("SaveT", bound=Checkpoint | None, default=Checkpoint)
else:
    SaveT = TypeVar("SaveT")


class CheckpointManager(StepView, SyncContext, Generic[SaveT]):
    """Checkpoints of a training run, one a step, below one root.

        async with aiodcp.CheckpointManager("checkpoints", keep_last=3, save_interval=100) as manager:
            start = await manager.restore(state) or 0
            for step in range(start + 1, steps + 1):
                ...
                if manager.should_save(step):
                    await manager.save(step, state, metrics={"loss": loss})

    A step is `root/step-<n>`, as torchtitan's, and complete when its `.metadata` is there. Leftovers of interrupted
    saves are never listed, and are removed with the first save, unless another process that saves below this root is
    alive.

    Without an event loop the same calls are `with`, `save_sync`, `restore_sync`, `refresh_sync`, `delete_sync` and
    `close`.

    Of several ranks all open the manager and make the same calls; one of them, the coordinator, lists and removes.

    Args:
        root: the directory of the steps; made with the first of them.
        checkpointer: saves and loads; one that is not open yet. By default `Checkpointer()`.
        step_format: what a step's directory is called: "checkpoint-{step}", "iter_{step:07d}".
        keep_last: how many of the newest steps to keep; None for all. The others are removed in the background, after a
            commit and never before it, and never the newest.
        keep_every: also keep every step that is a multiple of this.
        keep_best: also keep the step with the best value of a metric, ("loss", "min") or ("accuracy", "max"); a third
            item says how many.
        keep_for_s: keep the steps of the last so many seconds; instead of `keep_last` or beside it.
        keep_every_s: also keep one step for every so many seconds.
        keep_if: also keep the steps for which this function of a `Step` is true.
        save_interval, save_every_s: steps, or seconds, from one save to the next, for `should_save`.
        save_first, last_step: also for step 1, and for the last one.
        latest_by: which step is `latest`: the one that was committed last, also after going back, or as torchtitan has
            it the one with the largest "number".
        on_busy: what a save does while another is in flight: see `Checkpointer.save`.
        on_error: "raise" the failure of a save that was not awaited, from the next save or on leaving; or "warn", in
            the log and by an event, and go on: an occasional outage of the storage does not end the run.
        signals: that ask the run to stop, such as `signal.SIGTERM`: see `preempted`. Handled while the manager is open,
            in the main thread. A second one has its original effect.
        grace_s: seconds from a signal until the process will be ended. Leaving the manager then gives up a
            save that would not be done in time.
        deadline: when the process will be ended in any case, in seconds of `time.time()`: heard `grace_s` before.
        progress: show a bar on the coordinator's standard error, if that is a terminal and the extra `cli` (rich) is
            installed, for saves and loads that take longer than a second.
        history: keep what the coordinator has seen below the root, for `aiodcp report`.
        on_event: called with each `Event`, one after the other, in the thread `aiodcp-callbacks`. What it raises is
            logged; leaving the manager waits ten seconds at most for the last call.
    """

    @overload
    def __init__(
        self: CheckpointManager[Checkpoint],
        root: str | os.PathLike[str],
        *,
        on_busy: Literal["wait", "raise"] = ...,
        **options: Unpack[ManagerArguments],
    ) -> None: ...

    @overload
    def __init__(
        self: CheckpointManager[Checkpoint | None],
        root: str | os.PathLike[str],
        *,
        on_busy: OnBusy,
        **options: Unpack[ManagerArguments],
    ) -> None: ...

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        checkpointer: Checkpointer | None = None,
        step_format: str = STEP_FORMAT,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: Best | None = None,
        keep_for_s: float | None = None,
        keep_every_s: float | None = None,
        keep_if: Callable[[Step], bool] | None = None,
        save_interval: int | None = None,
        save_every_s: float | None = None,
        save_first: bool = False,
        last_step: int | None = None,
        latest_by: Literal["commit", "number"] = "commit",
        on_busy: OnBusy = "wait",
        on_error: Literal["raise", "warn"] = "raise",
        signals: Sequence[signal.Signals] = (),
        grace_s: float = 30.0,
        deadline: float | None = None,
        progress: bool = False,
        history: bool = True,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.checkpointer: Checkpointer = checkpointer if checkpointer is not None else Checkpointer()
        self._options = Options(
            root=check_id(root, "root"),
            checkpointer=self.checkpointer,
            retention=Retention(
                keep_last=keep_last,
                keep_every=keep_every,
                keep_best=keep_best,
                keep_for_s=keep_for_s,
                keep_every_s=keep_every_s,
                keep_if=keep_if,
            ),
            names=StepNames(step_format),
            latest_by=latest_by,
            save_interval=save_interval,
            save_every_s=save_every_s,
            save_first=save_first,
            last_step=last_step,
            on_busy=on_busy,
            on_error=on_error,
            signals=signals,
            grace_s=grace_s,
            deadline=deadline,
            progress=progress,
            history=history,
            on_event=on_event,
        )
        self._session = session_of(self.checkpointer)
        self._assemble(self._options)
        self._is_open = False

    def _assemble(self, options: Options) -> None:
        session = self._session
        self._catalog = StepCatalog(
            session.storage, options.root, options.retention, options.names, latest_by=options.latest_by
        )
        steps_between = session.saves.trace.steps_between if options.history else None
        history = steps_between and History(session.storage, lambda: self._catalog.root, steps_between)
        self._reporter = Reporter(options.on_event, self.path, options.names.step_of, history)
        self._deadline = Deadline(lambda: self._stopping.left_s)
        self._stopping = Stopping(options, on_heard=self._deadline.cut_short, report=self._reporter.preempted)
        warns = options.on_error == "warn"
        self._saves = StepSaves(session, self._catalog, self._reporter, self._deadline, warns=warns)
        self._restores = StepRestores(session, self._catalog, self._reporter)
        self._removals = StepRemovals(session, self._catalog, self._reporter)
        self._pacing = Pacing(None, self._session.stop_agreement, leads=False)

    def __repr__(self) -> str:
        steps = f"steps {self.steps()}" if self._catalog.has_looked else "not entered yet"
        return f"<CheckpointManager of {self._catalog.root!r}, {steps}>"

    async def __aenter__(self) -> Self:
        await self.checkpointer.__aenter__()
        flows = self._session.flows
        self.lend_runner(self.checkpointer)
        try:
            self._catalog.root = self._catalog.storage.resolve(self._catalog.root)
            self._reporter.begin(rank=flows.world_rank, shows=self._options.progress and flows.is_coordinator)
            self._session.on_retry(self._reporter.retried)
            problem: Exception | None = None
            try:
                before: dict[int, Any] = {signal.SIGINT: self._sigint} if self._runner is not None else {}
                agree = self._session.stop_agreement
                self._stopping.begin(agree(), before)
                self._pacing = Pacing(self._options.save_every_s, agree, leads=flows.is_coordinator)
            except (ValueError, OSError) as error:  # the other ranks are to hear of it
                problem = ArgumentError("signals", f"cannot install signal handlers here: {error}")
                problem.__cause__ = error
            since = self._catalog.change_count()
            self._catalog.update(await flows.ask("list steps", self._catalog.list_complete, problem=problem), since)
        except BaseException:
            self._stopping.close()
            self._pacing.close()
            self._session.on_retry(None)
            await self.checkpointer.__aexit__(None, None, None)
            raise
        self._is_open = True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._leave(None, error)

    async def aclose(self, timeout: float | None = None) -> None:
        """Leave the manager before its block ends: wait for the save in flight, and release everything.

        Args:
            timeout: seconds to wait at most. A save that is not done by then is given up: it leaves nothing, and the
                checkpoint before it stays the newest. A commit that has begun is finished, which is one small file.
                By default what preemption leaves, or for as long as it takes.

        Raises:
            SaveCancelled: the save was given up; not with `on_error="warn"`, which reports it in the log.
            SaveError: the save failed, and was not awaited; likewise.
        """
        await self._leave(timeout, None)

    async def _leave(self, limit_s: float | None, error: BaseException | None) -> None:
        if not self._is_open:
            return
        self._session.flows.refuse_inside("leave the manager")
        self._is_open = False
        gave_up = False
        try:
            async with self._deadline.in_time(limit_s, spare_s=CLEAR_UP_S) as limit:
                await self.checkpointer.__aexit__(type(error) if error else None, error, None)
        except TimeoutError:
            gave_up = limit.expired()
            if not gave_up:
                raise
        finally:
            self._saves.close()
            self._session.on_retry(None)
            self._stopping.close()
            self._pacing.close()
            await self._reporter.end()
        last = self._saves.last
        if gave_up and last is not None and last.uploaded.error() is not None and self._options.on_error == "raise":
            given_up = SaveCancelled(last.checkpoint_id)
            if error is None:
                raise given_up
            error.add_note(f"aiodcp: in addition, {given_up}: not enough time was left to finish it")

    # --- when to stop

    @property
    def preempted(self) -> Milestone:
        """Reached when the run is to stop: await it, or look at `preempted.done()` after `should_save`.

        Asked for by one of `signals`, by the `deadline` or by `preempt`, on any rank. In one process it is reached at
        once. Ranks that train in step ask `should_save` after each step; it is reached on all of them at the same one,
        within about a second, and `should_save` is true for it: save, and leave the loop.
        """
        return self._stopping.milestone

    def preempt(self, reason: str = "preempt() was called") -> None:
        """Ask the run to stop, on all ranks: as a signal does. From any thread."""
        self._stopping.ask(reason)

    async def refresh(self) -> list[int]:
        """List the complete steps again, since other processes may save there, and return them. All ranks call it.

        Raises:
            ReadError: storage failed.
        """
        await self._restores.refresh()
        return self.steps()

    # --- saving

    def should_save(self, step: int) -> bool:
        """Whether a step is to be saved: by its number, by the clock, or since the run is to stop at it.

        With several ranks all ask, and hear the same. Once the run is asked to stop, or it is time to save, it waits
        until they agree on a step: a second or so.
        """
        options = self._options
        stops, is_due = self._stopping.stops_at(step), self._pacing.is_due(step)
        by_number = options.save_interval is not None and step > 0 and step % options.save_interval == 0
        at_end = (options.save_first and step == 1) or step == options.last_step
        return stops or is_due or by_number or at_end

    @overload
    async def save(
        self,
        step: int,
        state_dict: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = ...,
        custom_metadata: Mapping[str, Any] | None = ...,
        planner: SavePlanner | None = ...,
        overwrite: bool = ...,
    ) -> SaveT: ...

    @overload
    async def save(
        self,
        step: int,
        state_dict: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = ...,
        custom_metadata: Mapping[str, Any] | None = ...,
        planner: SavePlanner | None = ...,
        overwrite: bool = ...,
        on_busy: Literal["wait", "raise"],
    ) -> Checkpoint: ...

    @overload
    async def save(
        self,
        step: int,
        state_dict: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = ...,
        custom_metadata: Mapping[str, Any] | None = ...,
        planner: SavePlanner | None = ...,
        overwrite: bool = ...,
        on_busy: OnBusy | None = ...,
    ) -> Checkpoint | None: ...

    async def save(
        self,
        step: int,
        state_dict: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        custom_metadata: Mapping[str, Any] | None = None,
        planner: SavePlanner | None = None,
        overwrite: bool = True,
        on_busy: OnBusy | None = None,
    ) -> Checkpoint | None:
        """Begin to save a step, as `Checkpointer.save` does. One that is there already is replaced.

        Files that you put into the step's directory beside it, such as a tokenizer's, are that step's, and removed
        with it.

        Args:
            step: its number, from 0 on.
            state_dict: as for `Checkpointer.save`.
            metrics: numbers to be kept with it, for `keep_best` and `metrics()`.
            custom_metadata: small facts in words of JSON to be committed with it, which
                `checkpointer.read_custom_metadata(manager.path(step))` returns beside the manager's own `step`,
                `saved_at`, `metrics` and what orders commits.
            planner: your own, instead of DCP's.
            overwrite: replace a step that is there already; False fails the save with `WriteError` then.
            on_busy: instead of the manager's.

        Returns:
            The save; None if it is skipped.

        Raises:
            CaptureError: a value cannot be saved; names it.
            BusyError: see `on_busy`.
            SaveError: an earlier save failed and was not awaited; not with `on_error="warn"`.

        Cancellation: while it waits for an earlier save, withdraws this one.
        """
        self._pacing.note_save()
        state = await self._saves.save(
            step,
            state_dict,
            metrics=metrics,
            custom_metadata=custom_metadata,
            planner=planner,
            overwrite=overwrite,
            on_busy=on_busy or self._options.on_busy,
        )
        return None if state is None else Checkpoint(state)

    @asynccontextmanager
    async def checkpoint(
        self,
        step: int,
        *,
        metrics: Mapping[str, float] | None = None,
        custom_metadata: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[JointCheckpoint]:
        """Save a step of several participants, which is committed when the block is left: see `joint_checkpoint`.

            async with manager.checkpoint(step) as ckpt:
                ckpt.add("model", model)
                ckpt.add("optim", optimizer)
                ckpt.add("replay", replay.snapshot)  # a function, or an async one

        Its failure is raised on leaving the block, whatever `on_error` says.

        Args:
            step: its number, from 0 on.
            metrics, custom_metadata: as for `save`.

        Raises, Cancellation: as `joint_checkpoint`.
        """
        async with self._saves.joint(step, metrics=metrics, custom_metadata=custom_metadata) as save:
            yield JointCheckpoint(save)

    # --- restoring

    async def restore(
        self,
        state_dict: MutableMapping[str, Any],
        step: int | Literal["latest", "best"] = "latest",
        *,
        fall_back: bool = False,
        initial: InitialLoad | None = None,
        planner: LoadPlanner | None = None,
        strict: bool = True,
        cast: bool = False,
        rename: Rename | None = None,
        include: Names | None = None,
        exclude: Names | None = None,
        weights_only: bool = True,
        check_crc: bool = True,
    ) -> RestoredStep | None:
        """Load a step into `state_dict`, as `Checkpointer.load` does. All ranks call it. Waits for a save in flight.

        Args:
            state_dict: what is wanted.
            step: which; by default the newest that is complete.
            fall_back: when what is stored is damaged, go on with the step before (for "best": the next best), and so
                on. Tensors that had been loaded already are loaded again. A step that is whole and does not fit, or
                needs more than `weights_only` allows, is an error all the same.
            initial: what to load instead, where there is no step yet: by default only the model of it.
            planner, strict, cast, rename, include, exclude, weights_only, check_crc: as for `Checkpointer.load`.

        Returns:
            The step, a number, which has the report as its attribute; None if there is none yet, for "latest" and
            "best", also where `initial` was loaded.

        Raises:
            NotACheckpointError: the step is not there, or not complete.
            ReadError: a step is there that may be the latest and cannot be read, and `fall_back` is false; or none can.
            LoadError: see `Checkpointer.load`.
        """
        options = LoadOptions(
            strict=strict,
            cast=cast,
            weights_only=weights_only,
            check_crc=check_crc,
            rename=rename,
            include=include,
            exclude=exclude,
        )
        restored = await self._restores.restore(state_dict, step, fall_back=fall_back, planner=planner, options=options)
        if restored is None and initial is not None:
            await self._restores.load_initial(state_dict, initial)
        return restored

    # --- removing

    async def delete(self, step: int) -> None:
        """Remove a step, whatever is to be kept. All ranks call it.

        Raises:
            NotACheckpointError: there is no such step.
            BusyError: it is being saved or restored.
            WriteError: another process has a lease of it, or storage failed.
        """
        await self._removals.delete(step)

    # --- without an event loop

    save_sync: Final = sync_method(save)
    restore_sync: Final = sync_method(restore)
    refresh_sync: Final = sync_method(refresh)
    delete_sync: Final = sync_method(delete)
    close: Final = sync_method(aclose)
