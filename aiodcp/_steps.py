"""A root of steps: which of them are complete, what is noted of each, and how one is removed. No torch here.

root/step-100/.metadata    a step is complete when its `.metadata` is there
root/step-200/__0_....     the data of a save that goes on, or was interrupted
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import anyio
from anyio import CancelScope

from ._names import METADATA_NAME, is_leftover, step_of, step_place
from ._note import FOOT_NBYTES, TAIL_NBYTES, decode_note, note_nbytes
from .errors import NotACheckpointError, ReadError, one_error
from .storage import Storage

LOOKS_AT_ONCE = 16  # at steps: a shared file system answers each in milliseconds, and many at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A complete checkpoint of a root.

    Attributes:
        step: its number.
        saved_at: when it was committed, in seconds of `time.time()`: as noted of it, or else when its `.metadata` was
            written; 0 if the storage cannot tell.
        metrics: what was noted of it, by name.
    """

    step: int
    saved_at: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)


async def read_note(storage: Storage, checkpoint_id: str) -> dict[str, Any]:
    """Return what is noted of a checkpoint.

    Raises:
        NotACheckpointError: there is no committed checkpoint.
        ReadError: storage refused.
    """
    note, _ = await read_dated_note(storage, checkpoint_id)
    return note


async def read_dated_note(storage: Storage, checkpoint_id: str) -> tuple[dict[str, Any], float | None]:
    """Return what is noted of a checkpoint, and when it was committed as the storage knows it.

    Raises:
        NotACheckpointError: there is no committed checkpoint.
        ReadError: storage refused.
    """
    path = storage.locate(checkpoint_id, METADATA_NAME)
    try:
        async with storage.open(checkpoint_id, METADATA_NAME) as reader:
            modified_at: float | None = getattr(reader, "modified_at", None)
            tail = memoryview(bytearray(min(TAIL_NBYTES, reader.nbytes)))
            await reader.read_into(reader.nbytes - len(tail), [tail])
            wanted = min(note_nbytes(bytes(tail[-FOOT_NBYTES:])), reader.nbytes)
            if wanted > len(tail):
                tail = memoryview(bytearray(wanted))
                await reader.read_into(reader.nbytes - wanted, [tail])
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotACheckpointError(checkpoint_id) from error
    except (OSError, EOFError) as error:
        raise ReadError(path, str(error)) from error
    return decode_note(bytes(tail)), modified_at


async def list_steps(storage: Storage, root: str) -> list[Step]:
    """Return the complete steps, in order.

    Raises:
        ReadError: storage refused.
    """
    found: list[Step] = []
    limit = anyio.Semaphore(LOOKS_AT_ONCE)

    async def look(step: int) -> None:
        async with limit:
            try:
                note, modified_at = await read_dated_note(storage, step_place(root, step))
            except NotACheckpointError:
                return
            saved_at = _number(note.get("saved_at")) or modified_at or 0.0
            found.append(Step(step=step, saved_at=saved_at, metrics=metrics_of(note)))

    await _for_each(look, await _numbers(storage, root))
    return sorted(found, key=lambda each: each.step)


def metrics_of(note: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a note; what is no number is none."""
    metrics = note.get("metrics")
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
    """Return steps in the order in which they were committed: a run may have gone back to an earlier one."""
    return sorted(steps, key=lambda each: (each.saved_at, each.step))


async def remove_step(storage: Storage, checkpoint_id: str) -> None:
    """Remove a checkpoint, in an order in which a crash leaves no half of it that looks whole.

    Files of the user's beside it, such as a tokenizer's, are that checkpoint's, and removed with it.

    Raises:
        OSError: storage refused; what is left is no checkpoint any more, or a whole one.

    Cancellation: none; once it has begun it is finished.
    """
    with CancelScope(shield=True):
        await storage.remove(checkpoint_id, METADATA_NAME, durable=True)
        await storage.remove_tree(checkpoint_id)


async def remove_leftovers(storage: Storage, root: str, is_live: Callable[[str], bool]) -> list[int]:
    """Remove what interrupted saves have left in steps that are not complete, and return these steps.

    Args:
        storage: where.
        root: of the steps. Its user makes sure that no other process saves there.
        is_live: tells of a file whether a save of this process is writing it.

    Raises:
        OSError: storage refused.
    """
    removed: list[int] = []
    limit = anyio.Semaphore(LOOKS_AT_ONCE)

    async def look(step: int) -> None:
        place = step_place(root, step)
        async with limit:
            names = await storage.names(place)
            if METADATA_NAME in names or any(map(is_live, names)) or (names and not any(map(is_leftover, names))):
                return
            with CancelScope(shield=True):
                await _remove_data(storage, place, names)
            removed.append(step)

    await _for_each(look, await _numbers(storage, root))
    return sorted(removed)


async def _remove_data(storage: Storage, checkpoint_id: str, names: Sequence[str]) -> None:
    for name in names:
        if is_leftover(name):
            await storage.remove(checkpoint_id, name)
    await storage.discard(checkpoint_id, made_by_anyone=True)


async def _numbers(storage: Storage, root: str) -> list[int]:
    try:
        names = await storage.places(root)
    except OSError as error:
        raise ReadError(storage.locate(root), str(error)) from error
    return sorted(step for step in map(step_of, names) if step is not None)


async def _for_each(look: Callable[[int], Coroutine[Any, Any, None]], steps: Sequence[int]) -> None:
    with one_error():
        async with anyio.create_task_group() as group:
            for step in steps:
                group.start_soon(look, step)
