"""The commit: `.metadata`, written last, names every file; what nothing names any more is removed after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from anyio import CancelScope

from .._format.naming import METADATA_NAME, is_leftover
from .._log import SafeLogger
from ..errors import SaveError
from ..storage.base import Storage

log = SafeLogger(__name__)


class UncommittedFiles:
    """What a save has brought to storage so far, which is removed if it fails.

    Attributes:
        files: begun.
        written: whether all that has been begun is complete.
        committing: whether the commit may have been seen to.
    """

    def __init__(self, checkpoint_id: str, save_id: str) -> None:
        self.checkpoint_id = checkpoint_id
        self.save_id = save_id
        self.files: list[str] = []
        self.written = False
        self.committing = False


_live: set[str] = set()  # ids of the saves that are under way in this process; they are in their data files' names


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
