"""The commit: `.metadata`, written last, names every file; what nothing names any more is removed after it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import anyio
from anyio import CancelScope

from .._format.naming import METADATA_NAME, is_leftover
from .._format.seal import FOOT_NBYTES
from .._log import SafeLogger
from ..errors import SaveError, WriteError
from ..storage.base import Storage, remove_all
from ..storage.error_mapping import write_errors

log = SafeLogger(__name__)


class UncommittedFiles:
    """What a save has brought to storage so far, which is removed if it fails.

    Attributes:
        names: of the files that were begun.
        are_written: whether all of them are complete.
        may_be_committed: whether the commit has been begun.
        are_given_up: whether all ranks know that they are not committed, as far as is known.
        lock: keeps others from clearing them up, if this rank is to do that.
    """

    def __init__(self, checkpoint_id: str, save_id: str) -> None:
        self.checkpoint_id = checkpoint_id
        self.save_id = save_id
        self.names: list[str] = []
        self.are_written = False
        self.may_be_committed = False
        self.are_given_up = False
        self.lock: Callable[[], Awaitable[None]] | None = None
        self._locking = anyio.Lock()

    async def lock_once(self) -> None:
        """Lock them before the first is written: in a phase, so that all ranks hear of it if that fails."""
        async with self._locking:
            if self.lock is not None:
                await self.lock()
                self.lock = None


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


async def refuse_existing(storage: Storage, checkpoint_id: str) -> None:
    """Raise `WriteError` if there is a checkpoint."""
    path = storage.describe(checkpoint_id, METADATA_NAME)
    try:
        with write_errors(path):
            async with storage.open(checkpoint_id, METADATA_NAME):
                pass
    except WriteError as error:
        if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            return
        raise
    raise WriteError(path, "there is a checkpoint already, and overwrite=False")


@dataclass(frozen=True, slots=True, kw_only=True)
class Replaced:
    """What a commit leaves to be removed.

    Attributes:
        names: files of the checkpoint that was replaced, and of saves that failed.
        foot: the last bytes of the metadata that has replaced it, with the checksums of all of it.
    """

    names: Sequence[str] = ()
    foot: bytes = b""


async def commit(storage: Storage, checkpoint_id: str, content: bytes, files: set[str]) -> Replaced:
    """Make `content`, whose data is in `files`, the checkpoint's metadata.

    Raises:
        SaveError: the data is gone: another process saves to the same place, and took it for leftovers. There is no
            checkpoint then: what names data that is not there is none.

    Cancellation: none; once it has begun it is finished.
    """
    with CancelScope(shield=True):
        found = await storage.list_files(checkpoint_id)  # before what is there is replaced
        if missing := await _find_missing(storage, checkpoint_id, files, found):
            raise SaveError(_describe_missing(missing))
        await storage.put(checkpoint_id, METADATA_NAME, content)
        try:
            found = await storage.list_files(checkpoint_id)
            missing = await _find_missing(storage, checkpoint_id, files, found)
        except OSError as error:  # it is committed and durable
            log.warning("%s: committed, and could not be listed afterwards: %s", storage.describe(checkpoint_id), error)
            found, missing = [], []
        if missing:
            await _revert(storage, checkpoint_id, content)
            raise SaveError(_describe_missing(missing))
    left = [name for name in found if is_leftover(name) and name not in files and not is_live(name)]
    return Replaced(names=left, foot=content[-FOOT_NBYTES:])


async def _find_missing(storage: Storage, checkpoint_id: str, files: set[str], found: Sequence[str]) -> list[str]:
    """Return which files are not there. A listing may be some seconds old, of network file systems: to open is not."""
    gone: list[str] = []
    for file in sorted(files.difference(found)):
        try:
            async with storage.open(checkpoint_id, file):
                pass
        except (FileNotFoundError, NotADirectoryError):
            gone.append(storage.describe(checkpoint_id, file))
    return gone


def _describe_missing(gone: Sequence[str]) -> str:
    more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
    return f"{gone[0]}{more} disappeared: is another process saving to this checkpoint?"


async def _revert(storage: Storage, checkpoint_id: str, content: bytes) -> None:
    """Remove the metadata that has just been written, unless another process has replaced it since."""
    with _errors_logged(storage, checkpoint_id):
        try:
            found = await storage.get(checkpoint_id, METADATA_NAME)
        except FileNotFoundError:
            return
        if found == content:
            await storage.remove(checkpoint_id, METADATA_NAME, durable=True)


async def may_be_committed(storage: Storage, checkpoint_id: str, save_id: str) -> bool:
    """After a commit that failed, return whether it took place nevertheless, as far as can be known.

    A rename may be done and the fsync after it fail: then the new checkpoint is there, and its data must stay.

    Cancellation: none.
    """
    with CancelScope(shield=True):
        try:
            committed = save_id.encode() in await storage.get(checkpoint_id, METADATA_NAME)
        except FileNotFoundError:
            committed = False
        except OSError:
            committed = True  # unknown, so assume it: the next save to this path removes what is left over
    return committed


async def remove_replaced(storage: Storage, checkpoint_id: str, replaced: Replaced) -> None:
    """Remove it, unless another process has committed there meanwhile: then it may be that one's data.

    Cancellation: none.
    """
    if not replaced.names:
        return
    with CancelScope(shield=True), _errors_logged(storage, checkpoint_id):
        foot = bytearray(len(replaced.foot))
        async with storage.open(checkpoint_id, METADATA_NAME) as reader:
            if reader.nbytes >= len(foot):
                await reader.read_into(reader.nbytes - len(foot), [memoryview(foot)])
        if foot != replaced.foot:
            log.warning("%s: another process has committed here meanwhile", storage.describe(checkpoint_id))
            return
        await remove_all(storage, checkpoint_id, replaced.names)


async def remove_files(storage: Storage, checkpoint_id: str, names: Sequence[str]) -> None:
    """Remove files that no checkpoint names any more.

    Cancellation: none.
    """
    with CancelScope(shield=True), _errors_logged(storage, checkpoint_id):
        await remove_all(storage, checkpoint_id, names)


async def remove_if_empty(storage: Storage, checkpoint_id: str) -> None:
    """After a failed save, remove the directory if nothing is in it.

    Cancellation: none.
    """
    with CancelScope(shield=True), _errors_logged(storage, checkpoint_id):
        await storage.remove_if_empty(checkpoint_id)


@contextmanager
def _errors_logged(storage: Storage, checkpoint_id: str) -> Iterator[None]:
    """What cannot be removed costs space, and fails no save: the next one to the same place tries again."""
    try:
        yield
    except OSError as error:
        log.warning("%s: old files could not be removed: %s", storage.describe(checkpoint_id), error)
