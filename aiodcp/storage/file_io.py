"""What `LocalStorage` asks of the file system: pwrite, preadv, fsync, durable directories.

A coroutine is one call of aiofiles' threads. What blocks is for calls that do several such things in one: to ask a
thread takes as long as to write a small file, or to fsync it on a fast disk.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

from aiofiles.os import wrap

from .._log import SafeLogger
from .base import WRITE_ALIGNMENT

log: SafeLogger = SafeLogger(__name__)


# Bytes of one system call: under the kernel's limit of 0x7ffff000, and little enough to be done soon when the
# save is cancelled. Measured on one NVMe disk: 8 MiB is 5 % slower than 64 MiB, more gains nothing.
CALL_NBYTES = 64 << 20

IOV_MAX = 1024  # buffers of one preadv: the limit of Linux

_cannot_sync: set[int] = set()  # devices whose file systems cannot fsync a directory: logged once


def is_block_aligned(offset: int, data: memoryview) -> bool:
    """Whether O_DIRECT takes this: offset, length and address in whole blocks. Source: open(2)."""
    if offset % WRITE_ALIGNMENT or data.nbytes % WRITE_ALIGNMENT or not data.nbytes or data.readonly:
        return False
    return ctypes.addressof(ctypes.c_char.from_buffer(data)) % WRITE_ALIGNMENT == 0


@wrap
def write_all(fd: int, data: memoryview, offset: int) -> None:
    written = 0
    while written < data.nbytes:  # a short write is legal
        written += os.pwrite(fd, data[written : written + CALL_NBYTES], offset + written)


@wrap
def read_all(fd: int, buffers: list[memoryview], offset: int) -> None:
    pending = [buffer for buffer in reversed(buffers) if buffer.nbytes]
    while pending:
        batch, room = [], CALL_NBYTES
        for buffer in pending[: -IOV_MAX - 1 : -1]:
            batch.append(buffer[:room])
            room -= batch[-1].nbytes
            if not room:
                break
        count = os.preadv(fd, batch, offset)
        if not count:
            raise EOFError(f"the file ends at byte {offset}, {sum(b.nbytes for b in pending)} more bytes are expected")
        offset += count
        while count:
            buffer = pending.pop()
            if buffer.nbytes > count:
                pending.append(buffer[count:])
            count -= min(count, buffer.nbytes)


def fsync_directory(path: str) -> None:
    """Make the names in a directory durable. Blocks."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS):
            raise
        device = os.fstat(fd).st_dev
        if device not in _cannot_sync:
            _cannot_sync.add(device)
            log.warning(
                "%s: this file system does not support fsync on directories: new files may be lost in a crash", path
            )
    finally:
        os.close(fd)


def make_durable_directory(path: str) -> bool:
    """Make the directory and its parents, each name durable in the one above it; return whether it was missing.

    Blocks.
    """
    missing = []
    directory = Path(path).absolute()
    while not directory.is_dir():
        missing.append(directory)
        directory = directory.parent
    for new in reversed(missing):
        try:
            new.mkdir(exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, "is a file, not a directory", str(new)) from None
        fsync_directory(str(new.parent))
    return bool(missing)


@wrap
def list_directories(root: str) -> list[str]:
    try:
        with os.scandir(root) as entries:
            return sorted(entry.name for entry in entries if entry.is_dir())
    except (FileNotFoundError, NotADirectoryError):
        return []


@wrap
def remove_tree(path: str) -> None:
    if os.path.islink(path):  # what it leads to may belong to others: remove only what a checkpoint is made of
        for name in os.listdir(path):
            if name.endswith(".distcp"):
                os.unlink(os.path.join(path, name))
        os.unlink(path)
        return
    shutil.rmtree(path, onerror=_unless_missing)


def _unless_missing(function: object, path: str, problem: tuple[type, BaseException, object]) -> None:
    """Go on where another process has removed something first, such as its lease."""
    if not isinstance(problem[1], FileNotFoundError):
        raise problem[1]


realpath: Callable[[str], Awaitable[str]] = wrap(os.path.realpath)


def unlink(path: str) -> None:
    """Remove a file, if it is there. Blocks."""
    with suppress(NotADirectoryError):  # then it is not there, either
        Path(path).unlink(missing_ok=True)


@wrap
def file_sizes(path: str, names: Sequence[str]) -> dict[str, int]:
    """Return the sizes of files that are still there."""
    sizes: dict[str, int] = {}
    for name in names:
        with suppress(FileNotFoundError):  # removed meanwhile
            sizes[name] = os.stat(os.path.join(path, name)).st_size
    return sizes
