"""What a trainer needs around a `Checkpointer`: steps, which of them to keep, where to go on, when to stop."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from math import isfinite
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar, overload

from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner

from .._engine.milestone import Milestone, MilestoneSource
from .._engine.sync_bridge import SyncContext, sync_method
from .._load.options import LoadOptions, Rename
from .._load.report import LoadReport
from .._log import SafeLogger
from ..checkpointer.arguments import check_custom_metadata, check_id
from ..checkpointer.checkpoint import Checkpoint
from ..checkpointer.checkpointer import Checkpointer
from ..checkpointer.joint import JointCheckpoint, joint_after
from ..errors import (
    ArgumentError,
    BusyError,
    CorruptError,
    LoadError,
    NotACheckpointError,
    RankError,
    ReadError,
    SaveCancelled,
)
from ..storage.error_mapping import write_errors
from .arguments import OnBusy, check_metrics, check_own_custom_metadata, check_step
from .catalog import StepCatalog
from .events import Event, Stats
from .preemption import Preemption
from .reporter import Reporter, SaveRecord
from .retention import Best, Retention
from .steps import step_path

log = SafeLogger(__name__)


CLEAR_UP_S = 1.0  # of the time that preemption leaves: to remove what was written of a save that is given up

if TYPE_CHECKING:  # at run time TypeVars have no defaults before Python 3.13
    from typing_extensions import TypeVar as TypeVarWithDefault

    SaveT = TypeVarWithDefault("SaveT", bound=Checkpoint | None, default=Checkpoint)
else:
    SaveT = TypeVar("SaveT")


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

    __repr__ = int.__repr__


class CheckpointManager(SyncContext, Generic[SaveT]):
    """Checkpoints of a training run, one a step, below one root.

        async with aiodcp.CheckpointManager("checkpoints", keep_last=3, save_interval=100) as manager:
            start = await manager.restore(state) or 0
            for step in range(start + 1, steps + 1):
                ...
                if manager.should_save(step):
                    await manager.save(step, state, metrics={"loss": loss})

    A step is `root/step-<n>`, as torchtitan's, and complete when its `.metadata` is there. What interrupted saves have
    left is never listed, and removed with the first save, unless another process that saves below this root is alive.

    Without an event loop the same calls are `with`, `save_sync`, `restore_sync`, `refresh_sync` and `close`.

    Of several ranks all open the manager and make the same calls; one of them, the coordinator, lists and removes.

    Args:
        root: the directory of the steps; made with the first of them.
        checkpointer: saves and loads; one that is not open yet. By default `Checkpointer()`.
        keep_last: how many of the newest steps to keep; None for all. The rest is removed in the background, after a
            commit and never before, and never the newest.
        keep_every: keep, besides, every step that is a multiple of this.
        keep_best: keep, besides, the step with the best of a metric, ("loss", "min") or ("accuracy", "max"); a third
            item says how many.
        save_interval: steps between those for which `should_save` is true.
        on_busy: what a save does while another is in flight: see `Checkpointer.save`.
        on_error: "raise" the failure of a save, where nobody awaited it, from the next one or on leaving; or "warn",
            by the log and an event, and go on: a store that is down now and then does not end the run.
        signals: that ask the run to stop, such as `signal.SIGTERM`: see `preempted`. Heard from entering to leaving,
            in the main thread. A second one does what it would have done.
        grace_s: seconds from when that is heard until the process will be ended. Leaving the manager then gives up a
            save that would not be done in time.
        deadline: when the process will be ended in any case, in seconds of `time.time()`: heard `grace_s` before.
        progress: show a bar on the coordinator's standard error, if that is a terminal and the extra `cli` (rich) is
            installed, for saves and loads that take longer than a second.
        on_event: called with each `Event`, one after the other, in the thread `aiodcp-callbacks`. What it raises is
            logged; leaving the manager waits ten seconds at most for the last call.
    """

    @overload
    def __init__(
        self: CheckpointManager[Checkpoint],
        root: str | os.PathLike[str],
        *,
        checkpointer: Checkpointer | None = ...,
        keep_last: int | None = ...,
        keep_every: int | None = ...,
        keep_best: Best | None = ...,
        save_interval: int | None = ...,
        on_busy: Literal["wait", "raise"] = ...,
        on_error: Literal["raise", "warn"] = ...,
        signals: Sequence[signal.Signals] = ...,
        grace_s: float = ...,
        deadline: float | None = ...,
        progress: bool = ...,
        on_event: Callable[[Event], None] | None = ...,
    ) -> None: ...

    @overload
    def __init__(
        self: CheckpointManager[Checkpoint | None],
        root: str | os.PathLike[str],
        *,
        checkpointer: Checkpointer | None = ...,
        keep_last: int | None = ...,
        keep_every: int | None = ...,
        keep_best: Best | None = ...,
        save_interval: int | None = ...,
        on_busy: OnBusy,
        on_error: Literal["raise", "warn"] = ...,
        signals: Sequence[signal.Signals] = ...,
        grace_s: float = ...,
        deadline: float | None = ...,
        progress: bool = ...,
        on_event: Callable[[Event], None] | None = ...,
    ) -> None: ...

    def __init__(
        self,
        root: str | os.PathLike[str],
        *,
        checkpointer: Checkpointer | None = None,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: Best | None = None,
        save_interval: int | None = None,
        on_busy: OnBusy = "wait",
        on_error: Literal["raise", "warn"] = "raise",
        signals: Sequence[signal.Signals] = (),
        grace_s: float = 30.0,
        deadline: float | None = None,
        progress: bool = False,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        root = check_id(root, "root")
        if checkpointer is not None and not isinstance(checkpointer, Checkpointer):
            raise ArgumentError("checkpointer", f"a {type(checkpointer).__name__} is no Checkpointer")
        retention = Retention(keep_last=keep_last, keep_every=keep_every, keep_best=keep_best)
        retention.check()
        if save_interval is not None and (type(save_interval) is not int or save_interval < 1):
            raise ArgumentError("save_interval", f"{save_interval!r} is not a number of steps")
        if on_busy not in ("wait", "skip", "raise"):
            raise ArgumentError("on_busy", f'{on_busy!r} is none of "wait", "skip", "raise"')
        if on_error not in ("raise", "warn"):
            raise ArgumentError("on_error", f'{on_error!r} is neither "raise" nor "warn"')
        for each in signals:
            if not isinstance(each, signal.Signals):
                raise ArgumentError("signals", f"{each!r} is no signal.Signals")
        if type(grace_s) not in (int, float) or not 0 < grace_s < float("inf"):
            raise ArgumentError("grace_s", f"{grace_s!r} is not a number of seconds")
        if deadline is not None and type(deadline) not in (int, float):
            raise ArgumentError("deadline", f"{deadline!r} is not a number of seconds, as time.time()'s")
        if deadline is not None and not isfinite(deadline):
            raise ArgumentError("deadline", f"{deadline!r} is no time; None means that there is none")
        if on_event is not None and not callable(on_event):
            raise ArgumentError("on_event", f"{on_event!r} cannot be called")
        self.checkpointer = checkpointer if checkpointer is not None else Checkpointer()
        try:
            self.checkpointer._storage.resolve(root)
        except ArgumentError as error:
            raise ArgumentError("root", error.problem) from None
        self._catalog = StepCatalog(self.checkpointer._storage, root, retention)
        self._save_interval = save_interval
        self._on_busy: OnBusy = on_busy
        self._on_error = on_error
        self._progress = progress
        self._report = Reporter(on_event, self.path)
        self._preemption = Preemption(signals=signals, grace_s=grace_s, deadline=deadline)
        self._told_of_preemption = False
        self._is_open = False
        self._last: Checkpoint | None = None
        self.checkpointer._on_retry = self._report.retried
        self._claimed = False
        self._limits: dict[object, Callable[[], object]] = {}  # what bounds each wait, once preemption is heard of

    def __repr__(self) -> str:
        steps = f"steps {self.steps()}" if self._catalog.has_looked else "not entered yet"
        return f"<CheckpointManager of {self._catalog.root!r}, {steps}>"

    async def __aenter__(self) -> Self:
        await self.checkpointer.__aenter__()
        service = self.checkpointer._service
        self.lend_runner(self.checkpointer)
        try:
            self._catalog.root = self._catalog.storage.resolve(self._catalog.root)
            self._report.rank = service.line.members[service.line.rank] if service.line else 0
            self._report.shows = self._progress and service.is_coordinator
            self._report.feed.begin()
            problem: Exception | None = None
            try:
                self._listen()
            except ArgumentError as error:  # the other ranks are to hear of it
                problem = error
            mark = self._catalog.mark()
            self._catalog.learn(await service.ask("list steps", self._catalog.look, problem=problem), mark)
        except BaseException:
            self._preemption.close()
            await self.checkpointer.__aexit__(None, None, None)
            raise
        self._is_open = True
        return self

    def _listen(self) -> None:
        line = self.checkpointer._service.line
        if self._preemption.has_started:
            self._preemption = self._preemption.anew()
            self._told_of_preemption = False
        self._preemption.on_heard = self._cut_short
        before: dict[int, Any] = {signal.SIGINT: self._sigint} if self._runner is not None else {}
        try:
            if line is None:
                self._preemption.start(before)
            else:
                self._preemption.start(before, store=line.store, rank=line.rank, size=line.size, root=line.root)
        except (ValueError, OSError) as error:
            raise ArgumentError("signals", f"cannot be heard here: {error}") from error

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._leave(None, error)

    async def aclose(self, timeout: float | None = None) -> None:
        """Leave the manager before its block ends: wait for the save in flight, and let go of everything.

        Args:
            timeout: seconds to wait at most. A save that is not done by then is given up: it leaves nothing, and the
                checkpoint before it stays the newest. A commit that has begun is finished, which is one small file.
                By default what preemption leaves, or for as long as it takes.

        Raises:
            SaveCancelled: the save was given up; not with `on_error="warn"`, which tells it in the log.
            SaveError: the save failed, and nobody had awaited it; likewise.
        """
        await self._leave(timeout, None)

    async def _leave(self, limit_s: float | None, error: BaseException | None) -> None:
        if not self._is_open:
            return
        self.checkpointer._service.refuse_inside("to leave the manager")
        self._is_open = False
        gave_up = False
        try:
            async with self._in_time(limit_s, spare_s=CLEAR_UP_S) as limit:
                await self.checkpointer.__aexit__(type(error) if error else None, error, None)
        except TimeoutError:
            gave_up = limit.expired()
            if not gave_up:
                raise
        finally:
            self._claimed = False
            self._preemption.close()
            await self._report.feed.flush()
            self._report.feed.end()
        last = self._last
        if gave_up and last is not None and last._uploaded.error() is not None and self._on_error == "raise":
            given_up = SaveCancelled(last.checkpoint_id)
            if error is None:
                raise given_up
            error.add_note(f"aiodcp: besides, {given_up}: there was no time left for it")

    @asynccontextmanager
    async def _in_time(self, limit_s: float | None = None, *, spare_s: float = 0.0) -> AsyncIterator[asyncio.Timeout]:
        """Cancel the block after `limit_s`, and `spare_s` before the process is ended, also if that is heard of later.

        Raises:
            TimeoutError: that was done.
        """
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(limit_s) as limit:

            def cut() -> None:
                left_s = self._preemption.left_s
                if key in self._limits and left_s is not None:
                    until = loop.time() + max(0.0, left_s - spare_s)
                    when = limit.when()
                    if not limit.expired() and (when is None or until < when):
                        limit.reschedule(until)

            key = object()
            self._limits[key] = partial(loop.call_soon_threadsafe, cut)
            try:
                cut()
                yield limit
            finally:
                del self._limits[key]

    def _cut_short(self) -> None:
        """Bound all that is waited for: it is heard that the process will be ended. In any thread."""
        for cut in list(self._limits.values()):
            with suppress(RuntimeError):  # that loop is closed
                cut()

    # --- when to stop

    @property
    def preempted(self) -> Milestone:
        """Reached when the run is to stop: await it, or look at `preempted.done()` after `should_save`.

        Asked for by one of `signals`, by the `deadline` or by `preempt`, on any rank. In one process it is reached at
        once. Ranks that train in step ask `should_save` after each step; it is reached on all of them at the same one,
        within about a second, and `should_save` is true for it: save, and leave the loop.
        """
        return self._preemption.preempted

    def preempt(self, reason: str = "asked for") -> None:
        """Ask the run to stop, on all ranks: as a signal does. From any thread."""
        self._preemption.ask(reason)

    # --- what there is

    def steps(self) -> list[int]:
        """Return the complete steps, oldest first, as this manager knows them: see `refresh`.

        Raises:
            ClosedError: the manager has never been entered, and has not looked.
        """
        return [each.step for each in self._catalog.known]

    @property
    def latest(self) -> int | None:
        """The newest complete step: the one committed last, also when the run had gone back to an earlier one."""
        return next((each.step for each in self._catalog.newest), None)

    @property
    def best(self) -> int | None:
        """The step with the best of the metric that `keep_best` names; of equal ones the newest."""
        return next(iter(self._catalog.retention.best(self._catalog.known)), None)

    def metrics(self, step: int) -> dict[str, float]:
        """Return what was told of a step when it was saved.

        Raises:
            NotACheckpointError: the step is not there, or not complete.
        """
        for each in self._catalog.known:
            if each.step == step:
                return dict(each.metrics)
        raise NotACheckpointError(self.path(step))

    def path(self, step: int) -> str:
        """Return where the checkpoint of a step is, or will be."""
        return step_path(self._catalog.root, step)

    @property
    def stats(self) -> Stats:
        """What has been done so far."""
        return self._report.stats

    def events(self) -> AsyncIterator[Event]:
        """Iterate over what happens from now on, until the manager is left."""
        return self._report.feed.follow()

    async def refresh(self) -> list[int]:
        """Look again which steps are complete, as others may save there, and return them. All ranks call it.

        Raises:
            ReadError: storage refused.
        """
        mark = self._catalog.mark()
        self._catalog.learn(await self.checkpointer._service.ask("list steps", self._catalog.look), mark)
        return self.steps()

    # --- saving

    def should_save(self, step: int) -> bool:
        """Whether a step is to be saved: a multiple of `save_interval`, or the one at which the run is to stop.

        With several ranks, and once the run is asked to stop, it waits until they agree on a step: a second or so.
        """
        if self._preemption.stops_at(step):
            if not self._told_of_preemption:
                self._told_of_preemption = True
                self._report.preempted(step, self._preemption.reason, self._preemption.left_s or 0.0)
            return True
        return self._save_interval is not None and step > 0 and step % self._save_interval == 0

    @overload
    async def save(
        self,
        step: int,
        state_dict: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = ...,
        custom_metadata: Mapping[str, Any] | None = ...,
        planner: SavePlanner | None = ...,
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
            on_busy: instead of the manager's.

        Returns:
            The save; None if it is skipped.

        Raises:
            CaptureError: a value cannot be saved; names it.
            BusyError: see `on_busy`.
            SaveError: an earlier save failed and nobody had awaited it; not with `on_error="warn"`.

        Cancellation: while it waits its turn, gives the turn up.
        """
        saving = self._report.save(step)
        numbers: dict[str, float] = {}
        checkpoint: Checkpoint | None = None
        self._catalog.hold(step)
        try:
            async with self._in_time():
                checkpoint = await self.checkpointer._save(
                    state_dict,
                    self.path(step),
                    partial(self._begin_to_save, step, metrics, custom_metadata, numbers),
                    planner=planner,
                    on_busy=on_busy or self._on_busy,
                )
        except BusyError:
            self._report.skipped(step)
            raise
        except TimeoutError as error:  # no time is left, and the save before is still in flight
            raise SaveCancelled(self.path(step)) from error
        finally:
            if checkpoint is None:
                self._catalog.let_go(step)
        if checkpoint is None:
            self._report.skipped(step)
            return None
        if self._on_error == "warn":
            checkpoint._mark_retrieved()
        self._last = checkpoint
        self._report.began(saving, checkpoint.timeline)

        def ended(error: Exception | None) -> None:  # in the engine's thread, most likely
            self._end(saving, numbers, [checkpoint], error)

        checkpoint._uploaded.when_done(ended)
        self.checkpointer._service.in_background(self._see_through, step, checkpoint)
        return checkpoint

    async def _begin_to_save(
        self,
        step: int,
        metrics: Mapping[str, float] | None,
        custom_metadata: Mapping[str, Any] | None,
        numbers: dict[str, float],
    ) -> Callable[[], bytes]:
        """Check what is given, make sure that nobody removes what is to be written, and return what makes the note.

        The metrics as they are now go into `numbers`.
        """
        numbers.update(check_metrics(metrics))
        own = {"step": check_step(step), "metrics": numbers}
        own.update(json.loads(check_custom_metadata(check_own_custom_metadata(custom_metadata))))  # as it is now
        if self._is_coordinator and not self._claimed:  # until it is left: nobody clears up meanwhile
            await self.checkpointer._service.run(self._clear_up)  # and not sooner: who only reads removes nothing
            with write_errors(self._catalog.storage.locate(self._catalog.root)):
                claim = self._catalog.storage.claim(self._catalog.root, alone=False)
                await self.checkpointer._service.run(self.checkpointer._service.held.enter_async_context, claim)
            self._claimed = True
        await self._catalog.until_removed(step)
        if self._is_coordinator:
            await self.checkpointer._service.run(self._catalog.look_for_others)

        def note() -> bytes:  # at the commit: commits have their numbers in the order in which they are made
            return check_custom_metadata({**own, **self._catalog.count_commit(step), "saved_at": time.time()})

        return note

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
        self.checkpointer._service.check_open()
        saving = self._report.save(step)
        numbers: dict[str, float] = {}
        first = partial(self._begin_to_save, step, metrics, custom_metadata, numbers)

        def ended(joint: JointCheckpoint, error: Exception | None) -> None:  # in the engine's thread, most likely
            self._end(saving, numbers, list(joint.participants.values()), error)

        self._catalog.hold(step)
        try:
            async with self._in_time():
                async with joint_after(self.checkpointer, self.path(step), first, ended) as joint:
                    self.checkpointer._service.in_background(self._prune_after, step, joint._ended)
                    yield joint
        except TimeoutError as error:
            if self._preemption.left_s is None:
                raise
            raise SaveCancelled(self.path(step)) from error  # no time is left

    def _end(
        self, saving: SaveRecord, metrics: Mapping[str, float], parts: list[Checkpoint], error: Exception | None
    ) -> None:
        """Take note of how a save has ended."""
        self._catalog.let_go(saving.step)
        if error is None:
            self._catalog.add(saving.step, metrics)
            self._catalog.mark_for_removal(removes=self._is_coordinator)
        self._report.ended(saving, parts, error)

    async def _see_through(self, step: int, checkpoint: Checkpoint) -> None:
        """Show how far a save has come, and remove what is not to be kept after it."""
        await self._report.show(step, checkpoint)
        await self._prune_after(step, checkpoint._uploaded)

    async def _prune_after(self, step: int, ended: MilestoneSource) -> None:
        await ended.settled()
        if ended.error() is not None and await self._catalog.look_again(step):
            log.warning("step %d: its save failed when it was committed already: it is there", step)
            self._catalog.mark_for_removal(removes=self._is_coordinator)
        await self._catalog.prune(self._report.removed)

    # --- restoring

    async def restore(
        self,
        state_dict: MutableMapping[str, Any],
        step: int | Literal["latest", "best"] = "latest",
        *,
        fall_back: bool = False,
        planner: LoadPlanner | None = None,
        strict: bool = True,
        cast: bool = False,
        rename: Rename | None = None,
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
            planner, strict, cast, rename, weights_only, check_crc: as for `Checkpointer.load`.

        Returns:
            The step, a number, which has the report as its attribute; None if there is none yet, for "latest" and
            "best".

        Raises:
            NotACheckpointError: the step is not there, or not complete.
            ReadError: a step is there that may be the latest and cannot be read, and `fall_back` is false; or none can.
            LoadError: see `Checkpointer.load`.
        """
        if step not in ("latest", "best"):
            check_step(step)
        if step == "best" and self._catalog.retention.keep_best is None:
            raise ArgumentError("step", 'which is "best" is said by keep_best=')

        options = LoadOptions(strict=strict, cast=cast, weights_only=weights_only, check_crc=check_crc, rename=rename)
        self.checkpointer._service.check_open()
        await self.checkpointer._service.wait_for_saves()
        await self.refresh()
        numbers = [each.step for each in self._catalog.newest]
        if step == "latest":
            self._refuse_to_pass_over(fall_back=fall_back)
        if isinstance(step, int):
            numbers = [step, *(numbers[numbers.index(step) + 1 :] if step in numbers else ())]
        elif step == "best":
            numbers = self._catalog.retention.best(self._catalog.known)
        if not fall_back:
            numbers = numbers[:1]
        with self._catalog.use(*numbers):
            for number in numbers:
                try:
                    with self._report.restoring(number) as shown:
                        report = await self.checkpointer.load_shown(
                            state_dict, self.path(number), shown, planner, options
                        )
                    return RestoredStep(number, report)
                except (CorruptError, RankError) as error:
                    if number == numbers[-1] or not _is_damage(error):
                        raise
                    self._catalog.mark_damaged(number)
                    self._report.fell_back(number, error)
        return None

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
            raise ReadError(self.path(step), f"it may be the latest step, and cannot be read: {unreadable[step]}")

    # --- without an event loop

    save_sync = sync_method(save)
    restore_sync = sync_method(restore)
    refresh_sync = sync_method(refresh)
    close = sync_method(aclose)

    async def _clear_up(self) -> None:
        for step in await self._catalog.clear_up(self.checkpointer._service.is_saving):
            self._report.cleared(step)

    @property
    def _is_coordinator(self) -> bool:
        return self.checkpointer._service.is_coordinator


def _is_damage(error: LoadError) -> bool:
    """Whether what is stored is damaged, as this rank found or another one."""
    kinds = {failure.kind for failure in error.failures} if isinstance(error, RankError) else {type(error).__name__}
    return kinds == {CorruptError.__name__}
