"""What a trainer needs around a `Checkpointer`: steps, which of them to keep, where to go on, when to stop."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

from torch.distributed.checkpoint.planner import LoadPlanner, SavePlanner

from ._checkpoint import Checkpoint
from ._commit import is_live
from ._events import (
    Event,
    Feed,
    FellBack,
    LeftoverRemoved,
    RemovalFailed,
    Restored,
    SaveBegan,
    SaveFailed,
    SaveFinished,
    SaveSkipped,
    StepRemoved,
)
from ._milestone import Milestone
from ._names import step_place
from ._retain import Best, Retention
from ._steps import Step, list_steps, remove_leftovers, remove_step
from .checkpointer import Checkpointer, check_id
from .errors import ArgumentError, BusyError, CheckpointError, CorruptError, RankError

OnBusy = Literal["wait", "skip", "raise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """What a manager has done since it was entered.

    Attributes:
        saved, failed, skipped: checkpoints asked for, by what became of them.
        removed: that were not to be kept.
        waited_s: seconds for which saves waited for the one before.
        age_s: seconds since the last commit; None if there was none.
    """

    saved: int
    failed: int
    skipped: int
    removed: int
    waited_s: float
    age_s: float | None


class CheckpointManager:
    """Checkpoints of a training run, one a step, below one root.

        async with aiodcp.CheckpointManager("checkpoints", keep_last=3, save_interval=100) as manager:
            start = await manager.restore(state) or 0
            for step in range(start + 1, steps + 1):
                ...
                if manager.should_save(step):
                    await manager.save(step, state, metrics={"loss": loss})

    A step is `root/step-<n>`, as torchtitan's, and complete when its `.metadata` is there. What interrupted saves have
    left is never listed, and removed on entering, unless another process that saves below this root is alive.

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
        on_event: called with each `Event`, in a thread of the library's: it must not block.
    """

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
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        root = check_id(root, "root")
        if checkpointer is not None and not isinstance(checkpointer, Checkpointer):
            raise ArgumentError("checkpointer", f"a {type(checkpointer).__name__} is no Checkpointer")
        self._retention = Retention(keep_last=keep_last, keep_every=keep_every, keep_best=keep_best)
        self._retention.check()
        if save_interval is not None and (type(save_interval) is not int or save_interval < 1):
            raise ArgumentError("save_interval", f"{save_interval!r} is not a number of steps")
        if on_busy not in ("wait", "skip", "raise"):
            raise ArgumentError("on_busy", f'{on_busy!r} is none of "wait", "skip", "raise"')
        if on_error not in ("raise", "warn"):
            raise ArgumentError("on_error", f'{on_error!r} is neither "raise" nor "warn"')
        if on_event is not None and not callable(on_event):
            raise ArgumentError("on_event", f"{on_event!r} cannot be called")
        self.checkpointer = checkpointer if checkpointer is not None else Checkpointer()
        self._root = root
        self._save_interval = save_interval
        self._on_busy: OnBusy = on_busy
        self._on_error = on_error
        self._feed = Feed(on_event)
        self._lock = threading.Lock()  # around what the engine's thread changes
        self._known: tuple[Step, ...] = ()
        self._in_use: Counter[int] = Counter()  # by step, how many save or restore it: not to be removed
        self._doomed: deque[int] = deque()
        self._removing: dict[int, Milestone] = {}  # steps that are to be removed: reached when that is done
        self._claimed = False
        self._saved = self._failed = self._skipped = self._removed = 0
        self._waited_s = 0.0
        self._last_commit: float | None = None

    def __repr__(self) -> str:
        return f"<CheckpointManager of {self._root!r}, steps {self.steps()}>"

    async def __aenter__(self) -> CheckpointManager:
        await self.checkpointer.__aenter__()
        try:
            self._root = self.checkpointer._storage.resolve(self._root)
            self._set_known(await self.checkpointer._ask("list steps", self._clear_and_list))
        except BaseException:
            await self.checkpointer.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await self.checkpointer.__aexit__(kind, error, trace)
        finally:
            self._claimed = False
            self._feed.end()

    # --- what there is

    def steps(self) -> list[int]:
        """Return the complete steps, oldest first, as this manager knows them: see `refresh`."""
        return [each.step for each in self._known]

    @property
    def latest(self) -> int | None:
        """The newest complete step."""
        return self._known[-1].step if self._known else None

    @property
    def best(self) -> int | None:
        """The step with the best of the metric that `keep_best` names; of equal ones the newest."""
        return next(iter(self._retention.best(self._known)), None)

    def metrics(self, step: int) -> dict[str, float]:
        """Return what was told of a step when it was saved."""
        return next((dict(each.metrics) for each in self._known if each.step == step), {})

    def path(self, step: int) -> str:
        """Return where the checkpoint of a step is, or will be."""
        return step_place(self._root, step)

    @property
    def stats(self) -> Stats:
        """What has been done so far."""
        age_s = None if self._last_commit is None else time.monotonic() - self._last_commit
        return Stats(
            saved=self._saved,
            failed=self._failed,
            skipped=self._skipped,
            removed=self._removed,
            waited_s=self._waited_s,
            age_s=age_s,
        )

    def events(self) -> AsyncIterator[Event]:
        """Iterate over what happens from now on, until the manager is left."""
        return self._feed.follow()

    async def refresh(self) -> list[int]:
        """Look again which steps are complete, as others may save there, and return them. All ranks call it.

        Raises:
            ReadError: storage refused.
        """
        self._set_known(await self.checkpointer._ask("list steps", self._list))
        return self.steps()

    # --- saving

    def should_save(self, step: int) -> bool:
        """Whether a step is to be saved: a multiple of `save_interval`."""
        return self._save_interval is not None and step > 0 and step % self._save_interval == 0

    async def save(
        self,
        step: int,
        state_dict: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        planner: SavePlanner | None = None,
        on_busy: OnBusy | None = None,
    ) -> Checkpoint | None:
        """Begin to save a step, as `Checkpointer.save` does. One that is there already is replaced.

        Args:
            step: its number, from 0 on.
            state_dict: as for `Checkpointer.save`.
            metrics: numbers to be kept with it, for `keep_best` and `metrics()`.
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
        _check_step(step)
        numbers = _check_metrics(metrics)
        await self._begin_to_save(step)
        began = time.perf_counter()
        checkpoint: Checkpoint | None = None
        try:
            checkpoint = await self.checkpointer.save(
                state_dict,
                self.path(step),
                planner=planner,
                custom_metadata={"step": step, "metrics": numbers},
                on_busy=on_busy or self._on_busy,
            )
        except BusyError:
            self._skip(step)
            raise
        finally:
            if checkpoint is None:
                self._in_use[step] -= 1
        if checkpoint is None:
            self._skip(step)
            return None
        self._follow(step, checkpoint, numbers, began)
        return checkpoint

    async def _begin_to_save(self, step: int) -> None:
        self.checkpointer._check_open()
        self._in_use[step] += 1
        try:
            if self._is_coordinator and not self._claimed:  # until it is left: nobody clears up meanwhile
                claim = self.checkpointer._storage.claim(self._root, alone=False)
                await self.checkpointer._on_engine(self.checkpointer._held.enter_async_context, claim)
                self._claimed = True
            if (removed := self._removing.get(step)) is not None:
                await removed
        except BaseException:
            self._in_use[step] -= 1
            raise

    def _skip(self, step: int) -> None:
        self._skipped += 1
        self._feed.publish(SaveSkipped(**self._of(step)))

    def _follow(self, step: int, checkpoint: Checkpoint, metrics: Mapping[str, float], began: float) -> None:
        captured = checkpoint.timeline.between("capture")
        assert captured is not None
        waited_s = captured[0] - began
        self._waited_s += waited_s
        self._feed.publish(SaveBegan(**self._of(step), waited_s=waited_s, held_s=captured[1] - captured[0]))
        if self._on_error == "warn":
            checkpoint.staged.forgive()
            checkpoint.uploaded.forgive()
        staged: list[float] = []
        checkpoint.staged.when_done(lambda: staged.append(time.perf_counter()))

        def ended() -> None:  # in the engine's thread
            error = checkpoint.uploaded.error()
            if error is None:
                self._take_in(Step(step=step, metrics=metrics))
                timeline, now = checkpoint.timeline, time.perf_counter()
                event = SaveFinished(
                    **self._of(step),
                    nbytes=checkpoint.progress.bytes_written,
                    held_s=timeline.held_s,
                    staged_s=staged[0] - captured[1],
                    seconds=now - captured[0],
                    phases={name: timeline.seconds(name) for name in {span.name: 0 for span in timeline.spans}},
                )
                self._feed.publish(event)
            else:
                self._failed += 1
                self._feed.publish(SaveFailed(**self._of(step), error=error))
            self._in_use[step] -= 1
            if error is None:
                self._doom()

        checkpoint.uploaded.when_done(ended)
        self.checkpointer._in_background(self._prune_after, checkpoint)

    def _take_in(self, step: Step) -> None:
        self._saved += 1
        self._last_commit = time.monotonic()
        with self._lock:
            others = [each for each in self._known if each.step != step.step]
            self._known = tuple(sorted([*others, step], key=lambda each: each.step))

    # --- removing

    def _doom(self) -> None:
        """Forget the steps that are not to be kept."""
        with self._lock:
            doomed = [step for step in self._retention.doomed(self._known) if not self._in_use[step]]
            self._known = tuple(each for each in self._known if each.step not in doomed)
            if self._is_coordinator:
                self._removing.update({step: Milestone(f"removal of step {step}") for step in doomed})
                self._doomed += doomed

    async def _prune_after(self, checkpoint: Checkpoint) -> None:
        await checkpoint.uploaded.settled()
        while self._doomed:
            await self._remove(self._doomed.popleft())

    async def _remove(self, step: int) -> None:
        try:
            await remove_step(self.checkpointer._storage, self.path(step))
        except OSError as error:
            self._feed.publish(RemovalFailed(**self._of(step), error=error))
            with suppress(CheckpointError):  # then it stays forgotten, and is found by the next manager
                for each in await list_steps(self.checkpointer._storage, self._root):
                    if each.step == step:
                        self._put_back(each)
        else:
            self._removed += 1
            self._feed.publish(StepRemoved(**self._of(step)))
        finally:
            if (removed := self._removing.pop(step, None)) is not None:
                removed.reach()

    def _put_back(self, step: Step) -> None:
        with self._lock:
            self._known = tuple(sorted([*self._known, step], key=lambda each: each.step))

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
        weights_only: bool = True,
        check_crc: bool = True,
    ) -> int | None:
        """Load a step into `state_dict`, as `Checkpointer.load` does. All ranks call it.

        Args:
            state_dict: what is wanted.
            step: which; by default the newest that is complete.
            fall_back: when what is stored is damaged, go on with the step before (for "best": the next best), and so
                on. Tensors that had been loaded already are loaded again.
            planner, strict, cast, weights_only, check_crc: as for `Checkpointer.load`.

        Returns:
            The step; None if there is none yet, for "latest" and "best".

        Raises:
            NotACheckpointError: the step is not there, or not complete.
            LoadError: see `Checkpointer.load`.
        """
        if step not in ("latest", "best"):
            _check_step(step)
        if step == "best" and self._retention.keep_best is None:
            raise ArgumentError("step", 'which is "best" is said by keep_best=')

        await self.refresh()
        newest_first = self.steps()[::-1]
        if isinstance(step, int):
            numbers = [step, *(each for each in newest_first if each < step)]
        else:
            numbers = self._retention.best(self._known) if step == "best" else newest_first
        if not fall_back:
            numbers = numbers[:1]
        self._in_use.update(numbers)
        try:
            for number in numbers:
                began = time.perf_counter()
                try:
                    await self.checkpointer.load(
                        state_dict,
                        self.path(number),
                        planner=planner,
                        strict=strict,
                        cast=cast,
                        weights_only=weights_only,
                        check_crc=check_crc,
                    )
                except (CorruptError, RankError) as error:
                    if number == numbers[-1] or not _is_damage(error):
                        raise
                    self._feed.publish(FellBack(**self._of(number), error=error))
                else:
                    self._feed.publish(Restored(**self._of(number), seconds=time.perf_counter() - began))
                    return number
        finally:
            self._in_use.subtract(numbers)
        return None

    # --- the steps, on the coordinator

    async def _clear_and_list(self) -> bytes:
        storage = self.checkpointer._storage
        async with storage.claim(self._root, alone=True) as alone:
            if alone:
                for step in await remove_leftovers(storage, self._root, is_live):
                    self._feed.publish(LeftoverRemoved(**self._of(step)))
        return await self._list()

    async def _list(self) -> bytes:
        return _dump(await list_steps(self.checkpointer._storage, self._root))

    def _set_known(self, data: bytes) -> None:
        with self._lock:
            self._known = tuple(
                Step(step=number, metrics=metrics)
                for number, metrics in json.loads(data)
                if number not in self._removing
            )

    @property
    def _is_coordinator(self) -> bool:
        return self.checkpointer._skips.decides

    def _of(self, step: int) -> dict[str, Any]:
        return {"step": step, "rank": self.checkpointer._rank, "checkpoint_id": self.path(step)}


def _dump(steps: list[Step]) -> bytes:
    return json.dumps([[each.step, dict(each.metrics)] for each in steps]).encode()


def _is_damage(error: CorruptError | RankError) -> bool:
    """Whether what is stored is damaged, as this rank found or another one."""
    kinds = {failure.kind for failure in error.failures} if isinstance(error, RankError) else {CorruptError.__name__}
    return kinds == {CorruptError.__name__}


def _check_step(step: object) -> int:
    if type(step) is not int or step < 0:
        raise ArgumentError("step", f"{step!r} is not a step: a number from 0 on")
    return step


def _check_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    if metrics is None:
        return {}
    try:
        return {str(name): float(value) for name, value in metrics.items()}
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError("metrics", f"{metrics!r} are no numbers by name: {error}") from error
