"""Record locks on a file, one descriptor for each path."""

from __future__ import annotations

import errno
import fcntl
import os
import threading

import anyio
from aiofiles.os import wrap

from .process_locks import ProcessLocks

LOCK_NAME = ".aiodcp.lock"

_LOCK_POLL_S = 0.05

process_locks: ProcessLocks = ProcessLocks()


class _Locks:
    """One descriptor for each lock file: to close any other one would let all of the process's locks on it go."""

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._open: dict[str, tuple[int, int]] = {}  # descriptor and number of users, by path

    @wrap
    def open(self, path: str, make: bool) -> int:
        with self._mutex:
            lock, users = self._open.get(path, (-1, 0))
            if not users:
                try:
                    lock = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if make else 0), 0o666)
                except PermissionError:  # another user's: to be there with others takes reading only
                    lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._open[path] = lock, users + 1
            return lock

    @wrap
    def close(self, path: str) -> None:
        with self._mutex:
            lock, users = self._open.pop(path)
            if users > 1:
                self._open[path] = lock, users - 1
            else:
                os.close(lock)


locks: _Locks = _Locks()


async def wait_for_lock(lock: int, *, exclusive: bool) -> bool:
    """Lock, at once or not at all if `exclusive`. On a file system without locks all are shared."""
    while True:
        try:
            await _lock(lock, fcntl.LOCK_NB | (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH))
            return True
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
                return not exclusive
            if error.errno == errno.EBADF and exclusive:  # it is open for reading only
                return False
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            if exclusive:
                return False
        await anyio.sleep(_LOCK_POLL_S)


_lock = wrap(fcntl.lockf)
