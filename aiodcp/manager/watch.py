"""Steps as they are committed, for evaluators and servers of models: `async for step in watch(root)`. No torch here."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import wraps
from typing import TYPE_CHECKING, Literal, ParamSpec

import anyio
from anyio.from_thread import start_blocking_portal

from .._log import SafeLogger
from ..errors import ArgumentError, ClosedError, ReadError
from ..storage.auto import AutoStorage
from ..storage.base import Storage, object_limits
from ..storage.retry import is_transient
from .step_names import STEP_FORMAT, StepNames
from .steps import Step, in_order, list_steps

if TYPE_CHECKING:
    from watchfiles import Change

log: SafeLogger = SafeLogger(__name__)

P = ParamSpec("P")

After = int | Literal["latest"] | None
"""After which step to begin: all of them, the one of that number, or all that are there."""

POLL_S, STORE_POLL_S = 1.0, 10.0  # at most, by default

FIRST_POLL = 1 / 10  # of that: what has just begun, or just committed, is looked at more often

SLOWER = 1.5  # times, from poll to poll

LOOKS_BETWEEN = 10  # at new steps only, before the known ones are looked at again: they may be committed anew

UNFINISHED = 16  # newest steps without a commit that are looked at each time; all others when all is looked at


class WatchedStep(int):
    """A step that `watch` yields: a number, with what is known of its checkpoint.

    Attributes:
        path: the checkpoint's id, to be loaded.
        saved_at: when it was committed, in seconds of `time.time()`, by the writer's clock or the storage's.
        metrics: that it was saved with, by name.
        storage: where it is.
    """

    path: str
    saved_at: float
    metrics: Mapping[str, float]
    storage: Storage

    def __new__(cls, found: Step, path: str, storage: Storage) -> WatchedStep:
        made = super().__new__(cls, found.step)
        made.path, made.saved_at, made.metrics, made.storage = path, found.saved_at, dict(found.metrics), storage
        return made

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    def __repr__(self) -> str:
        return int.__repr__(self)


class StepFollower:
    """Finds what is committed below a root from look to look."""

    def __init__(self, storage: Storage, root: str, after: After, names: StepNames) -> None:
        self.storage = storage
        self.root = root
        self._names = names
        self._after = after
        self._has_looked = False
        self._seen: dict[int, Step] = {}
        self._unreadable: dict[int, str] = {}

    async def look(self, *, at_all: bool) -> list[WatchedStep]:
        """Return the steps that were committed since the last look, in the order of their commits.

        Args:
            at_all: look at known steps too, which may have been committed anew, and at all that are not finished.

        Raises:
            ReadError: storage does not list the root.
        """
        exclude = () if at_all else self._seen
        found = await list_steps(
            self.storage, self.root, self._names, exclude=exclude, newest=None if at_all else UNFINISHED
        )
        self._note_unreadable(found.unreadable)
        self._seen = {number: step for number, step in self._seen.items() if number in found.numbers}
        fresh = {step.step for step in found.steps if _commit_of(self._seen.get(step.step)) != _commit_of(step)}
        self._seen |= {step.step: step for step in found.steps}
        ordered = [step for step in in_order([*self._seen.values()]) if step.step in fresh]
        if not self._has_looked:
            self._has_looked = True
            ordered = self._wanted(ordered)
        return [WatchedStep(step, self._names.path(self.root, step.step), self.storage) for step in ordered]

    def _wanted(self, ordered: Sequence[Step]) -> list[Step]:
        """Return, of what was there at the first look, what comes after the step that the caller has had."""
        if self._after is None:
            return list(ordered)
        if self._after == "latest":
            return []
        numbers = [step.step for step in ordered]
        if self._after in numbers:
            return list(ordered[numbers.index(self._after) + 1 :])
        return [step for step in ordered if self._after in step.after or step.step > self._after]

    def _note_unreadable(self, unreadable: Mapping[int, str]) -> None:
        for step, why in unreadable.items():
            if step not in self._unreadable:
                path = self._names.path(self.root, step)
                log.warning("%s is unreadable, and is passed over until it is not: %s", path, why)
        self._unreadable = dict(unreadable)


def _commit_of(step: Step | None) -> tuple[int, float] | None:
    """What makes two commits of one step different."""
    return (step.commit_number, step.saved_at) if step is not None else None


async def watch(
    root: str | os.PathLike[str],
    *,
    after: After = None,
    storage: Storage | None = None,
    poll_s: float | None = None,
    step_format: str = STEP_FORMAT,
) -> AsyncGenerator[WatchedStep, None]:
    """Iterate over the steps below `root`, those that are there and then each as soon as it is committed. Never ends.

        async for step in aiodcp.watch("s3://bucket/run", after=evaluated):
            await checkpointer.load(state, step.path)

    Each commit comes once, in the order of the commits, and complete: the steps of several writers, one after the other
    or restarted, are one sequence. A step that is saved again, as after going back, is a commit of its own; it is
    noticed some polls later. A root that does not exist yet is waited for. What is committed and removed between two
    looks is missed: see `lease`.

    Local commits are noticed at once if the extra `watch` is installed and the file system reports changes (inotify;
    network file systems do not report those of other hosts). Else, and in stores, they are found by looking: one
    listing each time, and one small read for each new step, from `poll_s` / 10 after a commit to `poll_s`, with jitter.

    Args:
        root: the directory, or URL, of the steps, as a `CheckpointManager`'s.
        after: go on after this step, as one who has had it; "latest": begin with what is committed from now on.
        storage: where the root is; by default where it says.
        poll_s: seconds between two looks, at most; by default 1 for directories and 10 for stores.
        step_format: what the steps are called there: see `CheckpointManager`.

    Raises:
        ArgumentError: there is no such storage.
        ReadError: storage refuses; what may well succeed later is only logged.

    Cancellation: between two steps; nothing is left behind.
    """
    check_watch(after, poll_s)
    storage = storage or AutoStorage()
    place = storage.resolve(os.fsdecode(root))
    follower = StepFollower(storage, place, after, StepNames(step_format))
    async with aclosing(follow(follower, follower.look, poll_s)) as steps:
        async for step in steps:
            yield step


def check_watch(after: object, poll_s: float | None) -> None:
    """Raise `ArgumentError` for what cannot be watched like that."""
    if after not in (None, "latest") and not isinstance(after, int):
        raise ArgumentError("after", f'must be a step, "latest" or None, got {after!r}')
    if poll_s is not None and (type(poll_s) not in (int, float) or not 0 < poll_s < float("inf")):
        raise ArgumentError("poll_s", f"must be a positive, finite number of seconds, got {poll_s!r}")


Look = Callable[..., Awaitable[list[WatchedStep]]]


async def follow(follower: StepFollower, look: Look, poll_s: float | None) -> AsyncGenerator[WatchedStep, None]:
    """Look again and again, by calling `look` as `follower.look`; until it raises `ClosedError`."""
    is_store = object_limits(follower.storage, follower.root) is not None
    longest_s = float(poll_s or (STORE_POLL_S if is_store else POLL_S))
    changes = _Changes(None if is_store else follower.root, longest_s)
    wait_s, looks, is_down = longest_s * FIRST_POLL, 0, False
    try:
        while True:
            try:
                steps = await look(at_all=looks % LOOKS_BETWEEN == 0)
            except ClosedError:
                return
            except ReadError as error:
                if not (isinstance(error.__cause__, OSError) and is_transient(error.__cause__)):
                    raise
                say = log.debug if is_down else log.warning  # once, until it answers again
                say("%s: cannot look for new steps, trying again: %s", follower.root, error)
                steps, is_down = [], True
            else:
                is_down = False
            looks += 1
            for step in steps:
                yield step
            wait_s = longest_s * FIRST_POLL if steps else min(wait_s * SLOWER, longest_s)
            await changes.wait(wait_s * random.uniform(0.75, 1.25))
    finally:
        await changes.close()


class _Changes:
    """Wakes who waits when a `.metadata` has changed, if the file system reports that."""

    def __init__(self, root: str | None, longest_s: float) -> None:
        self._root = root
        self._longest_s = longest_s
        self._events: AsyncGenerator[set[tuple[Change, str]], None] | None = None

    async def wait(self, seconds: float) -> None:
        """Return after a change, or after so many seconds; where changes are reported, after the longest time."""
        if self._events is None and self._root is not None and await anyio.Path(self._root).is_dir():
            self._events = _watch_files(self._root, self._longest_s)
            self._root = self._root if self._events is not None else None
        if self._events is None:
            await anyio.sleep(seconds)
            return
        try:
            await anext(self._events)
        except (StopAsyncIteration, OSError, RuntimeError) as error:  # no inotify left, or the root is gone
            log.debug("%s cannot be watched, and is polled: %s", self._root, error)
            self._events, self._root = None, None

    async def close(self) -> None:
        if self._events is not None:
            await self._events.aclose()


def _watch_files(root: str, longest_s: float) -> AsyncGenerator[set[tuple[Change, str]], None] | None:
    """Return what yields changes, or after `longest_s` nothing; None if the extra is not installed."""
    try:
        from watchfiles import awatch
    except ImportError:
        return None
    return awatch(
        root, watch_filter=_is_commit, debounce=100, step=20, rust_timeout=int(1000 * longest_s), yield_on_timeout=True
    )


def _is_commit(_: Change, path: str) -> bool:
    return path.endswith("/.metadata")


def sync_iterator(method: Callable[P, AsyncGenerator[WatchedStep, None]]) -> Callable[P, Iterator[WatchedStep]]:
    """Make of a method that returns steps to `async for` one for callers without an event loop."""

    @wraps(method)
    def iterate(*args: P.args, **kwargs: P.kwargs) -> Iterator[WatchedStep]:
        with start_blocking_portal("asyncio", name="aiodcp watch") as portal:
            steps = method(*args, **kwargs)
            try:
                while (step := portal.call(_next, steps)) is not None:
                    yield step
            finally:
                portal.call(steps.aclose)

    iterate.__name__ = f"{method.__name__}_sync"
    iterate.__qualname__ = f"{method.__qualname__}_sync"
    iterate.__doc__ = f"Like `async for step in {method.__name__}(...)`, for callers without an event loop: blocks."
    return iterate


async def _next(steps: AsyncIterator[WatchedStep]) -> WatchedStep | None:
    return await anext(steps, None)


watch_sync = sync_iterator(watch)
