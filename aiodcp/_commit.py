"""The commit: `.metadata`, written last, names every file; what nothing names any more is removed after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from anyio import CancelScope

from ._capture import Path
from ._log import log
from ._names import METADATA_NAME, data_file, is_leftover
from ._plan import GlobalPlan
from .errors import CaptureError, SaveError
from .metadata import (
    STORAGE_TYPES,
    ContainerNotes,
    Field,
    Metadata,
    MetadataIndex,
    StorageInfo,
    StorageMeta,
    Template,
    TensorStorageMetadata,
    build_metadata,
)
from .storage import Storage

_live: set[str] = set()  # ids of the saves that are under way in this process; they are in their data files' names


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Where a frozen value lies in the data file, in bytes."""

    offset: int
    nbytes: int


class CommitRecord:
    """`.metadata` for all saves of the same plans: only ids, file names and the places of frozen values differ."""

    def __init__(self, *plans: GlobalPlan) -> None:
        """Make the record of one state's plan, or of several states' that are committed together, in their order.

        Raises:
            CaptureError: two of them have a value of the same name.
        """
        checkpoint_id, save_id = Field(0, text=True), Field(1, text=True)
        used = [checkpoint_id, save_id]
        stored: dict[MetadataIndex, StorageInfo] = {}
        opaque: list[str] = []
        self._writers = [
            (part, rank)
            for part, plan in enumerate(plans)
            for rank, share in enumerate(plan.shares)
            if share.staged or share.frozen
        ]
        for part, rank in self._writers:
            share, file = plans[part].shares[rank], Field(len(used), text=True)
            used.append(file)
            for item, frame, offset in zip(share.staged, share.layout.frames, share.layout.offsets, strict=True):
                stored[item.index] = StorageInfo(file.stand_in, offset, frame.item_nbytes)  # type: ignore[arg-type]
        for file, (part, rank) in zip(used[2:], self._writers, strict=True):
            share = plans[part].shares[rank]
            for item in share.frozen:
                offset_field, nbytes_field = Field(len(used)), Field(len(used) + 1)
                used += [offset_field, nbytes_field]
                stored[item.index] = StorageInfo(
                    file.stand_in,  # type: ignore[arg-type]
                    offset_field.stand_in,  # type: ignore[arg-type]
                    nbytes_field.stand_in,  # type: ignore[arg-type]
                )
            opaque += [item.index.fqn for item in share.frozen if item.tensor_data is not None]
        meta = StorageMeta(checkpoint_id.stand_in, save_id.stand_in)  # type: ignore[arg-type]
        notes = ContainerNotes()
        for plan in plans:
            notes.empty += plan.notes.empty
            notes.int_keys += plan.notes.int_keys
        metadata = build_metadata(*_join(plans), stored, meta, opaque, notes)
        _refuse_incomplete(metadata)
        self._template = Template(metadata, used)

    def render(self, checkpoint_id: str, save_id: str, frozen: Sequence[Sequence[Sequence[Item]]]) -> bytes:
        """Return `.metadata`'s content for one save, given the places of frozen values, by plan and by rank."""
        files = [data_file(rank, save_id, part) for part, rank in self._writers]
        items = [item for part, rank in self._writers for item in frozen[part][rank]]
        places = [number for item in items for number in (item.offset, item.nbytes)]
        return self._template.render([checkpoint_id, save_id, *files, *places])

    def in_order_of_files(self, save_id: str, numbers: Sequence[Sequence[int]]) -> list[int]:
        """Return numbers, given by plan and by rank, in the order of the names of the data files that they are of."""
        named = sorted((data_file(rank, save_id, part), numbers[part][rank]) for part, rank in self._writers)
        return [number for _, number in named]

    def files(self, save_id: str) -> set[str]:
        """Return the names of all data files of a save."""
        return {data_file(rank, save_id, part) for part, rank in self._writers}


def _join(plans: Sequence[GlobalPlan]) -> tuple[Metadata, dict[str, Path] | None]:
    """Return names, shapes and chunks of all plans, and the keys that lead to them."""
    if len(plans) == 1:
        return plans[0].metadata, plans[0].paths
    entries: dict[str, STORAGE_TYPES] = {}
    paths: dict[str, Path] = {}
    for plan in plans:
        for fqn, entry in plan.metadata.state_dict_metadata.items():
            if entries.setdefault(fqn, entry) is not entry:
                raise CaptureError(fqn, "two participants have a value of this name")
        paths.update(plan.paths or {})
    return Metadata(entries), paths


def _refuse_incomplete(metadata: Metadata) -> None:
    """Refuse to commit a checkpoint of which a piece is written by nobody."""
    for fqn, entry in metadata.state_dict_metadata.items():
        offsets = [chunk.offsets for chunk in entry.chunks] if isinstance(entry, TensorStorageMetadata) else [None]
        for offset in offsets:
            if MetadataIndex(fqn, offset) not in metadata.storage_data:
                raise SaveError(f"{fqn}: planned, but nothing writes its piece at {offset}")


@contextmanager
def live(save_id: str) -> Iterator[None]:
    """Keep other saves of this process from taking a save's files for leftovers while the block runs."""
    _live.add(save_id)
    try:
        yield
    finally:
        _live.discard(save_id)


def is_live(name: str) -> bool:
    """Whether a file of this name belongs to a save that is under way in this process."""
    return any(save_id in name for save_id in _live)


async def commit(storage: Storage, checkpoint_id: str, record: bytes, files: set[str]) -> None:
    """Make `record`, whose data is in `files`, the checkpoint.

    Raises:
        SaveError: the data is gone: another process saves to the same place, and took it for a leftover. There is no
            checkpoint then: what names data that is not there is none.

    Cancellation: none; once it has begun it is finished.
    """
    with CancelScope(shield=True):
        if gone := await _gone(storage, checkpoint_id, files):  # before what is there is replaced
            raise SaveError(_tell_gone(gone))
        await storage.put(checkpoint_id, METADATA_NAME, record)
        try:
            gone = await _gone(storage, checkpoint_id, files)
        except OSError as error:  # it is committed and durable
            log.warning("%s: cannot be listed after the commit: %s", storage.locate(checkpoint_id), error)
            return
        if gone:
            await _take_back(storage, checkpoint_id, record)
            raise SaveError(_tell_gone(gone))


async def _gone(storage: Storage, checkpoint_id: str, files: set[str]) -> list[str]:
    """Return which files are not there. A listing may be some seconds old, of network file systems: to open is not."""
    gone: list[str] = []
    for file in sorted(files.difference(await storage.names(checkpoint_id))):
        try:
            async with storage.open(checkpoint_id, file):
                pass
        except (FileNotFoundError, NotADirectoryError):
            gone.append(storage.locate(checkpoint_id, file))
    return gone


def _tell_gone(gone: Sequence[str]) -> str:
    more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
    return f"{gone[0]}{more} is gone: does another process save there too?"


async def _take_back(storage: Storage, checkpoint_id: str, record: bytes) -> None:
    """Remove the metadata that has just been written, unless another process has replaced it since."""
    with _told_in_the_log(storage, checkpoint_id):
        try:
            found = await storage.get(checkpoint_id, METADATA_NAME)
        except FileNotFoundError:
            return
        if found == record:
            await storage.remove(checkpoint_id, METADATA_NAME, durable=True)


async def may_be_committed(storage: Storage, checkpoint_id: str, save_id: str) -> bool:
    """After a commit that failed, tell whether it took place nevertheless, as far as can be known.

    A rename may be done and the fsync after it fail: then the new checkpoint is there, and its data must stay.

    Cancellation: none.
    """
    with CancelScope(shield=True):
        try:
            committed = save_id.encode() in await storage.get(checkpoint_id, METADATA_NAME)
        except FileNotFoundError:
            committed = False
        except OSError:
            committed = True  # for all that is known: the next save to this place removes what is left over
    return committed


async def find_replaced(storage: Storage, checkpoint_id: str, files: set[str]) -> list[str]:
    """Return the files of the checkpoint that was replaced and of saves that failed: all data but `files`.

    Cancellation: none.
    """
    with CancelScope(shield=True), _told_in_the_log(storage, checkpoint_id):
        return [
            name
            for name in await storage.names(checkpoint_id)
            if is_leftover(name) and name not in files and not is_live(name)
        ]
    return []


async def remove_files(storage: Storage, checkpoint_id: str, names: Sequence[str]) -> None:
    """Remove files that no checkpoint names any more.

    Cancellation: none.
    """
    with CancelScope(shield=True), _told_in_the_log(storage, checkpoint_id):
        for name in names:
            await storage.remove(checkpoint_id, name)


async def forget_empty(storage: Storage, checkpoint_id: str) -> None:
    """After a failed save, forget a place that holds nothing.

    Cancellation: none.
    """
    with CancelScope(shield=True), _told_in_the_log(storage, checkpoint_id):
        await storage.discard(checkpoint_id)


@contextmanager
def _told_in_the_log(storage: Storage, checkpoint_id: str) -> Iterator[None]:
    """What cannot be cleared away costs space, and fails no save: the next one to the same place tries again."""
    try:
        yield
    except OSError as error:
        log.warning("%s: old files could not be removed: %s", storage.locate(checkpoint_id), error)
