"""The steps of one root as a manager knows them: which are complete, in use, and to be removed."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import anyio.lowlevel

from .._engine.milestone import MilestoneSource
from .._log import SafeLogger
from ..errors import ClosedError, LoadError, NotACheckpointError, ReadError
from ..storage.base import Storage
from ..storage.leases import unless_leased
from .retention import Retention
from .step_names import StepNames
from .steps import Step, in_order, list_steps, read_step, remove_leftovers, remove_step

log: SafeLogger = SafeLogger(__name__)


RECHECKED = 64  # newest steps that are read again before each save, since other processes may have saved them

PAST_UNREADABLE = 1 << 20


class StepCatalog:
    """One rank's view. What is committed is taken in by the engine's thread, all else is the caller's."""

    def __init__(
        self,
        storage: Storage,
        root: str,
        retention: Retention,
        names: StepNames,
        *,
        latest_by: Literal["commit", "number"],
    ) -> None:
        self.storage = storage
        self.root = root
        self.retention = retention
        self.names = names
        self._latest_by = latest_by
        self._lock = threading.Lock()
        self.has_looked: bool = False
        self._known: tuple[Step, ...] = ()
        self.unreadable: dict[int, str] = {}  # steps that are there and cannot be read, and why
        self._last_number = 0  # of a commit
        self._seen: list[Step] = []  # of others, not known here, and there when it was last looked
        self._numbers: dict[int, int] = {}  # by step, the number that is on the way to storage
        self._damaged: set[int] = set()
        self._changes: list[Step | int] = []  # steps that were added, and numbers of those that were marked for removal
        self._in_use: Counter[int] = Counter()  # by step, how many save or restore it: not to be removed
        self._to_remove: deque[int] = deque()
        self._removing: dict[int, MilestoneSource] = {}  # reached when the step is removed, or cannot be
        self._half_removed: dict[int, set[str]] = {}  # steps that are none any more, with names that are to be removed

    @property
    def known(self) -> tuple[Step, ...]:
        """The complete steps, in order.

        Raises:
            ClosedError: the storage has not been listed yet.
        """
        if not self.has_looked:
            raise ClosedError("the CheckpointManager has not been entered: use it inside `async with` or `with`")
        return self._known

    def path(self, step: int) -> str:
        """Return where the checkpoint of a step is, or will be."""
        return self.names.path(self.root, step)

    @property
    def newest(self) -> list[Step]:
        """The complete steps, from the latest one: the one that was committed last, or has the largest number."""
        return list(self.known[::-1]) if self._latest_by == "number" else in_order(self.known)[::-1]

    def change_count(self) -> int:
        """Return how many changes there were, which `update` is given with what `list_complete` has found since."""
        return len(self._changes)

    def update(self, data: bytes, since: int) -> None:
        """Take over what `list_complete` has found, on any rank, but for what has changed since change `since`."""
        with self._lock:
            seen = json.loads(data)
            for step, why in seen["unreadable"]:
                if step not in self.unreadable:
                    log.warning("%s is unreadable, and is not listed as a step: %s", self.path(step), why)
            self.unreadable = dict(seen["unreadable"])
            found = {
                step: Step(
                    step=step,
                    commit_number=number,
                    after=frozenset(after),
                    uncounted=frozenset(uncounted),
                    saved_at=at,
                    metrics=metrics,
                )
                for step, number, after, uncounted, at, metrics in seen["steps"]
            }
            for change in self._changes[since:]:
                if isinstance(change, Step):
                    found[change.step] = change
                else:
                    found.pop(change, None)
            self._set(found.values())
            self.has_looked = True

    def count_commit(self, step: int) -> dict[str, int | list[int]]:
        """Return what to record of the order of a commit that is made now, later than anything that is known."""
        with self._lock:
            # An unreadable step may have a number that is not known: it is left behind by far.
            self._last_number += PAST_UNREADABLE if self.unreadable else 1
            self._numbers[step] = self._last_number
            after, uncounted = self._there(step)
            return {
                "commit_number": self._last_number,
                "committed_after": sorted(after),
                "uncounted": sorted(uncounted),
            }

    def _there(self, step: int) -> tuple[frozenset[int], frozenset[int]]:
        """Return the steps that are there, but for one that is being saved, and of these those without a number."""
        there = [each for each in (*self._known, *self._seen) if each.step != step]
        unknown = frozenset(self.unreadable) - {step}
        return (
            unknown.union(each.step for each in there),
            unknown.union(each.step for each in there if not each.commit_number),
        )

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Know of a step that is committed now."""
        with self._lock:
            number = self._numbers.pop(step, self._last_number + 1)
            after, uncounted = self._there(step)
            self._add(
                Step(
                    step=step,
                    commit_number=number,
                    after=after,
                    uncounted=uncounted,
                    saved_at=time.time(),
                    metrics=metrics,
                )
            )

    def _add(self, step: Step) -> None:
        self._damaged.discard(step.step)
        self.unreadable.pop(step.step, None)
        self._changes.append(step)
        self._set([*(each for each in self._known if each.step != step.step), step])

    def _set(self, steps: Iterable[Step]) -> None:
        self._known = tuple(sorted(steps, key=lambda each: each.step))
        self._last_number = max((self._last_number, *(each.commit_number for each in self._known)))

    def mark_for_removal(self, *, removes: bool) -> None:
        """Forget the steps that are not to be kept; `prune` removes them, on the rank that does so."""
        with self._lock:
            good = [each for each in self._known if each.step not in self._damaged]
            latest = next((each.step for each in self.newest), None)
            to_remove = [step for step in self.retention.to_remove(good, latest=latest) if not self._in_use[step]]
            self._changes += to_remove
            self._set([each for each in self._known if each.step not in to_remove])
            if removes:
                self._removing.update({step: MilestoneSource(f"removal of step {step}") for step in to_remove})
                self._to_remove += to_remove

    def mark_damaged(self, step: int) -> None:
        """Count a step that is damaged not among those that are kept instead of others; it stays until it is saved."""
        with self._lock:
            self._damaged.add(step)

    @contextmanager
    def use(self, *steps: int) -> Iterator[None]:
        """Keep steps from being removed while the block runs."""
        self.acquire(*steps)
        try:
            yield
        finally:
            self.release(*steps)

    def acquire(self, *steps: int) -> None:
        with self._lock:
            self._in_use.update(steps)

    def release(self, *steps: int) -> None:
        with self._lock:
            self._in_use.subtract(steps)

    async def until_removed(self, step: int) -> None:
        """Wait for the end of a step's removal, if there is one."""
        if (removed := self._removing.get(step)) is not None:
            await removed.settled()

    # --- on the engine's loop

    async def list_complete(self) -> bytes:
        """Look which steps are complete, and return that for `update`."""
        found = await list_steps(self.storage, self.root, self.names, exclude=set(self._removing))
        steps = [
            [
                each.step,
                each.commit_number,
                sorted(each.after),
                sorted(each.uncounted),
                each.saved_at,
                dict(each.metrics),
            ]
            for each in found.steps
        ]
        return json.dumps({"steps": steps, "unreadable": list(found.unreadable.items())}).encode()

    async def note_other_steps(self) -> None:
        """Look what others have committed since: the next commit is later than that, too."""
        known = [each.step for each in self.newest]
        try:
            found = await list_steps(self.storage, self.root, self.names, exclude={*known[RECHECKED:], *self._removing})
        except ReadError as error:
            log.warning("cannot check for steps saved by other processes: %s", error)
            return
        with self._lock:
            now = {each.step: each for each in found.steps}
            known_steps = {each.step for each in self._known}
            self._seen = [each for each in found.steps if each.step not in known_steps]
            self._set([now.get(each.step, each) for each in self._known])
            self._last_number = max((self._last_number, *(each.commit_number for each in found.steps)))

    async def find_if_committed(self, step: int) -> bool:
        """After a save that failed, return whether it was committed all the same; then the step is known."""
        number = self._numbers.pop(step, None)
        if number is None:  # it had not come to that
            return False
        try:
            found = await read_step(self.storage, self.root, step, self.names)
        except LoadError:
            return False
        if found.commit_number != number:
            return False
        with self._lock:
            self._add(found)
        return True

    async def clear_up(self, is_live: Callable[[str], bool]) -> list[int] | None:
        """Remove leftovers of interrupted saves, and return these steps; None if another process may be saving."""
        try:
            async with self.storage.lock(self.root, exclusive=True) as alone:
                if not alone:
                    return None
                return await remove_leftovers(self.storage, self.root, is_live, step_names=self.names)
        except OSError as error:  # they cost space, and no more
            log.warning("%s: leftovers of interrupted saves could not be removed: %s", self.root, error)
            return []

    async def prune(self, report: Callable[[int, OSError | None], None]) -> None:
        """Remove the steps that are marked for it, and `report` each, with the error if it cannot be removed.

        Cancellation: takes effect between two steps; the next manager removes the others.
        """
        for step in list(self._half_removed):
            await self._remove(step, self._half_removed.pop(step), report)
        while self._to_remove:
            step = self._to_remove.popleft()
            try:
                await self._remove(step, set(), report)
            finally:
                self._removing.pop(step).reach()

    async def delete(self, step: int) -> bool:
        """Remove one step, whatever is to be kept; return False if it is leased.

        Raises:
            OSError: storage failed.
        """
        path = self.path(step)
        async with unless_leased(self.storage, path) as is_free:
            if is_free:
                await remove_step(self.storage, path, set())
            return is_free

    def forget(self, step: int) -> None:
        """Know of a step no longer: it is removed."""
        with self._lock:
            self._changes.append(step)
            self.unreadable.pop(step, None)
            self._set([each for each in self._known if each.step != step])

    def is_in_use(self, step: int) -> bool:
        """Whether the step is being saved or restored."""
        return self._in_use[step] > 0

    async def _remove(self, step: int, seen: set[str], report: Callable[[int, OSError | None], None]) -> None:
        await anyio.lowlevel.checkpoint()
        path = self.path(step)
        try:
            async with unless_leased(self.storage, path) as is_free:
                if not is_free and not seen:  # what is half removed is no step any more
                    log.debug("%s is leased, and is removed later", path)
                    await self._put_back(step, seen)
                    return
                await remove_step(self.storage, path, seen)
        except OSError as error:
            await self._put_back(step, seen)
            report(step, error)
        else:
            report(step, None)

    async def _put_back(self, step: int, seen: set[str]) -> None:
        """Try again later to remove a step: it is known again, or half of it is there, which is none."""
        try:
            found = await read_step(self.storage, self.root, step, self.names)
        except NotACheckpointError:
            self._half_removed[step] = seen
        except LoadError as error:
            log.warning("%s: cannot tell whether the step still exists: %s", self.path(step), error)
        else:
            with self._lock:
                self._add(found)
