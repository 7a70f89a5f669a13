"""A root of steps: which of them are complete, what is recorded of each, and how one is removed. No torch here.

root/step-100/.metadata    a step is complete when its `.metadata` is there
root/step-200/__0_....     the data of a save that goes on, or was interrupted
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
from anyio import CancelScope

from .._engine.task_groups import single_error
from .._format.naming import METADATA_NAME, is_our_leftover, save_id_of
from .._load.read_custom_metadata import read_dated_custom_metadata
from .._log import SafeLogger
from ..errors import LoadError, NotACheckpointError, ReadError
from ..storage.base import Storage, remove_all
from ..storage.leases import unless_leased
from .step_names import StepNames

log: SafeLogger = SafeLogger(__name__)

DEFAULT_NAMES = StepNames()


LOOKS_AT_ONCE = 16  # at steps: a shared file system answers each in milliseconds, and many at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A complete checkpoint of a root.

    Attributes:
        step: its number.
        commit_number: larger than those of all steps that were there when it was committed; 0 if none was recorded, as
            by others than a manager.
        after: steps that were there when it was committed, as far as was known.
        uncounted: of these, those without a number, as far as was known.
        saved_at: when it was committed, in seconds of `time.time()`: as recorded, or else when its `.metadata` was
            written; 0 if the storage does not know. For people: clocks of two hosts differ.
        metrics: of it, by name.
    """

    step: int
    commit_number: int = 0
    after: frozenset[int] = frozenset()
    uncounted: frozenset[int] = frozenset()
    saved_at: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What there is below a root.

    Attributes:
        steps: the complete ones, in order.
        unreadable: those whose `.metadata` is there and cannot be read, and why.
        numbers: all that there are, complete or not, also those that were not looked at.
    """

    steps: list[Step]
    unreadable: dict[int, str]
    numbers: frozenset[int]


async def list_steps(
    storage: Storage,
    root: str,
    names: StepNames = DEFAULT_NAMES,
    *,
    exclude: Collection[int] = (),
    newest: int | None = None,
) -> Found:
    """Look which steps are complete, of all but those to `exclude`; of these only the `newest` so many.

    Raises:
        ReadError: storage does not list the root.
    """
    found: list[Step] = []
    unreadable: dict[int, str] = {}
    limit = anyio.Semaphore(LOOKS_AT_ONCE)

    async def look(step: int) -> None:
        async with limit:
            try:
                found.append(await read_step(storage, root, step, names))
            except NotACheckpointError:
                return
            except LoadError as error:  # one bad sector is not the end of a run
                unreadable[step] = str(error)

    numbers = await _numbers(storage, root, names)
    wanted = [step for step in numbers if step not in exclude]
    await _for_each(look, wanted if newest is None else wanted[-newest:])
    return Found(
        steps=sorted(found, key=lambda each: each.step),
        unreadable=dict(sorted(unreadable.items())),
        numbers=frozenset(numbers),
    )


async def read_step(storage: Storage, root: str, step: int, names: StepNames = DEFAULT_NAMES) -> Step:
    """Return what the custom metadata of a step says.

    Raises:
        NotACheckpointError, CorruptError, ReadError: see `read_custom_metadata`.
    """
    metadata, modified_at = await read_dated_custom_metadata(storage, names.path(root, step))
    number = metadata.get("commit_number")
    return Step(
        step=step,
        commit_number=number if type(number) is int and 0 < number < 1 << 63 else 0,
        after=_numbers_in(metadata.get("committed_after")),
        uncounted=_numbers_in(metadata.get("uncounted")),
        saved_at=_number(metadata.get("saved_at")) or modified_at or 0.0,
        metrics=metrics_of(metadata),
    )


def _numbers_in(value: object) -> frozenset[int]:
    return frozenset(each for each in value if type(each) is int) if isinstance(value, list) else frozenset()


def metrics_of(metadata: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics in custom metadata; what is not a number is left out."""
    metrics = metadata.get("metrics")
    if not isinstance(metrics, dict):
        return {}
    numbers = {name: _number(value) for name, value in metrics.items()}
    return {name: value for name, value in numbers.items() if value is not None}


def _number(value: object) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:  # an int that no float can be
        return None


def in_order(steps: Sequence[Step]) -> list[Step]:
    """Return steps in the order in which they were committed: a run may have gone back to an earlier one.

    Numbers say it, and no clock. A step without a number comes after those that were committed without knowing of it.
    """
    numbered = sorted((each for each in steps if each.commit_number), key=lambda each: (each.commit_number, each.step))

    def position(step: Step) -> tuple[int, float, int]:
        if step.commit_number:
            return step.commit_number, 0.0, step.step
        before = (each.commit_number for each in numbered if step.step not in each.uncounted)
        return max(before, default=0), step.saved_at or 1.0, step.step

    return sorted(steps, key=position)


async def remove_step(storage: Storage, checkpoint_id: str, seen: set[str]) -> None:
    """Remove a checkpoint, in an order in which a crash leaves no half of it that looks whole.

    Files of the user's beside it, such as a tokenizer's, are that checkpoint's, and removed with it; what another
    process is saving to the same checkpoint id is not.

    Args:
        storage: where.
        checkpoint_id: which.
        seen: empty at first; then the names that are to be removed, for another attempt.

    Raises:
        OSError: storage failed; what is left is either not a checkpoint any more, or a whole one.

    Cancellation: none; once it has begun it is finished.
    """
    with CancelScope(shield=True):
        if not seen:
            seen.update(await _own_names(storage, checkpoint_id))
        await storage.remove(checkpoint_id, METADATA_NAME, durable=True)
        names = await storage.list_files(checkpoint_id)
        if seen.issuperset(names):
            await storage.remove_tree(checkpoint_id)
            return
        # Metadata that is there by now is what another process has committed meanwhile.
        await remove_all(storage, checkpoint_id, sorted(seen.intersection(names) - {METADATA_NAME}))


async def _own_names(storage: Storage, checkpoint_id: str) -> set[str]:
    """Return the names of a checkpoint's files: all but those of saves that its metadata does not know."""
    try:
        metadata = await storage.get(checkpoint_id, METADATA_NAME)
    except FileNotFoundError:
        metadata = b""
    names = {METADATA_NAME, *await storage.list_files(checkpoint_id)}
    others = {name for name in names if (save_id := save_id_of(name)) and save_id.encode() not in metadata}
    return names - others


async def remove_leftovers(
    storage: Storage,
    root: str,
    is_live: Callable[[str], bool],
    is_old: Callable[[str], bool] = is_our_leftover,
    step_names: StepNames = DEFAULT_NAMES,
) -> list[int]:
    """Remove leftovers of interrupted saves in steps that are not complete, and return these steps.

    Args:
        storage: where.
        root: of the steps. Its user makes sure that no other process saves there.
        is_live: returns whether a save of this process is writing a file of that name.
        is_old: returns whether a file of that name may be removed; by default data files of this library.
        step_names: what steps are called.

    Raises:
        OSError: storage cannot list the root; failures of one step are logged.
    """
    removed: list[int] = []
    limit = anyio.Semaphore(LOOKS_AT_ONCE)

    async def look(step: int) -> None:
        checkpoint_id = step_names.path(root, step)
        async with limit:
            try:
                names = await storage.list_files(checkpoint_id)
                if METADATA_NAME in names or any(map(is_live, names)) or (names and not any(map(is_old, names))):
                    return
                with CancelScope(shield=True):
                    async with unless_leased(storage, checkpoint_id) as is_free:
                        if not is_free:
                            return
                        await remove_all(storage, checkpoint_id, [name for name in names if is_old(name)])
                    await storage.remove_if_empty(checkpoint_id, made_by_anyone=True)
            except OSError as error:
                log.warning("%s: leftovers of an interrupted save cannot be removed: %s", checkpoint_id, error)
                return
            removed.append(step)

    await _for_each(look, await _numbers(storage, root, step_names))
    return sorted(removed)


async def _numbers(storage: Storage, root: str, step_names: StepNames) -> list[int]:
    try:
        names = await storage.list_children(root)
    except OSError as error:
        raise ReadError(storage.describe(root), str(error)) from error
    return sorted(step for step in map(step_names.step_of, names) if step is not None)


async def _for_each(look: Callable[[int], Coroutine[Any, Any, None]], steps: Sequence[int]) -> None:
    with single_error():
        async with anyio.create_task_group() as group:
            for step in steps:
                group.start_soon(look, step)
