"""The steps of one root as a manager knows them: which are complete, in use, and to be removed."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from math import inf, nextafter

import anyio.lowlevel

from ._milestone import Milestone
from ._names import step_place
from ._retain import Retention
from ._steps import Step, in_order, list_steps, remove_leftovers, remove_step
from .errors import CheckpointError, ClosedError
from .storage import Storage

_log = logging.getLogger("aiodcp")


class Catalog:
    """One rank's view. What is committed is taken in by the engine's thread, all else is the caller's."""

    def __init__(self, storage: Storage, root: str, retention: Retention) -> None:
        self.storage = storage
        self.root = root
        self.retention = retention
        self._lock = threading.Lock()
        self.has_looked = False
        self._known: tuple[Step, ...] = ()
        self._damaged: set[int] = set()
        self._changes: list[Step | int] = []  # what was taken in, and numbers of what was doomed, since the beginning
        self._in_use: Counter[int] = Counter()  # by step, how many save or restore it: not to be removed
        self._doomed: deque[int] = deque()
        self._removing: dict[int, Milestone] = {}  # reached when the step is removed, or cannot be

    @property
    def known(self) -> tuple[Step, ...]:
        """The complete steps, in order.

        Raises:
            ClosedError: nobody has looked yet.
        """
        if not self.has_looked:
            raise ClosedError("the CheckpointManager does not know its steps yet: use it inside `async with` or `with`")
        return self._known

    @property
    def newest(self) -> list[Step]:
        """The complete steps, from the one that was committed last."""
        return in_order(self.known)[::-1]

    def mark(self) -> int:
        """Return what `learn` is to be told of when the look began."""
        return len(self._changes)

    def learn(self, data: bytes, mark: int) -> None:
        """Take what `look` has found, on whatever rank, for what there is, but for what has changed since `mark`."""
        with self._lock:
            seen = [Step(step=step, saved_at=at, metrics=metrics) for step, at, metrics in json.loads(data)]
            found = {each.step: each for each in seen}
            for change in self._changes[mark:]:
                if isinstance(change, Step):
                    found[change.step] = change
                else:
                    found.pop(change, None)
            self._set(found.values())
            self.has_looked = True

    def take_in(self, step: int, metrics: Mapping[str, float]) -> None:
        """Know of a step that is committed now."""
        with self._lock:
            last = max((each.saved_at for each in self._known), default=0.0)
            self._add(Step(step=step, saved_at=max(time.time(), nextafter(last, inf)), metrics=metrics))

    def _add(self, step: Step) -> None:
        self._damaged.discard(step.step)
        self._changes.append(step)
        self._set([*(each for each in self._known if each.step != step.step), step])

    def _set(self, steps: Iterable[Step]) -> None:
        self._known = tuple(sorted(steps, key=lambda each: each.step))

    def doom(self, *, removes: bool) -> None:
        """Forget the steps that are not to be kept; `prune` removes them, on the rank that does so."""
        with self._lock:
            good = [each for each in self._known if each.step not in self._damaged]
            doomed = [step for step in self.retention.doomed(good) if not self._in_use[step]]
            self._changes += doomed
            self._set([each for each in self._known if each.step not in doomed])
            if removes:
                self._removing.update({step: Milestone(f"removal of step {step}") for step in doomed})
                self._doomed += doomed

    def distrust(self, step: int) -> None:
        """Count a step that is damaged not among those that are kept instead of others; it stays until it is saved."""
        with self._lock:
            self._damaged.add(step)

    @contextmanager
    def use(self, *steps: int) -> Iterator[None]:
        """Keep steps from being removed while the block runs."""
        self.hold(*steps)
        try:
            yield
        finally:
            self.let_go(*steps)

    def hold(self, *steps: int) -> None:
        with self._lock:
            self._in_use.update(steps)

    def let_go(self, *steps: int) -> None:
        with self._lock:
            self._in_use.subtract(steps)

    async def until_removed(self, step: int) -> None:
        """Wait for the end of a step's removal, if there is one."""
        if (removed := self._removing.get(step)) is not None:
            await removed

    # --- on the engine's loop

    async def look(self) -> bytes:
        """Look which steps are complete, and return that for `learn`."""
        found = await list_steps(self.storage, self.root)
        there = [each for each in found if each.step not in self._removing]
        return json.dumps([[each.step, each.saved_at, dict(each.metrics)] for each in there]).encode()

    async def clear_up(self, is_live: Callable[[str], bool]) -> list[int]:
        """Remove what interrupted saves have left, unless another process may be saving; return these steps."""
        try:
            async with self.storage.claim(self.root, alone=True) as alone:
                return await remove_leftovers(self.storage, self.root, is_live) if alone else []
        except OSError as error:  # they cost space, and no more
            _log.warning("%s: what interrupted saves have left could not be removed: %s", self.root, error)
            return []

    async def prune(self, tell: Callable[[int, OSError | None], None]) -> None:
        """Remove the steps that are doomed, one after the other, and `tell` of each, or why it cannot be removed.

        Cancellation: takes effect between two steps; the next manager removes the others.
        """
        while self._doomed:
            await anyio.lowlevel.checkpoint()
            step = self._doomed.popleft()
            refused: OSError | None = None
            try:
                await remove_step(self.storage, step_place(self.root, step))
            except OSError as error:
                refused = error
                with suppress(CheckpointError):  # then it stays forgotten, and is found by the next manager
                    await self._put_back(step)
            finally:
                self._removing.pop(step).reach()
            tell(step, refused)

    async def _put_back(self, step: int) -> None:
        for each in await list_steps(self.storage, self.root):
            if each.step == step:
                with self._lock:
                    self._add(each)
