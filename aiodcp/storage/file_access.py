"""Which files of a checkpoint may be opened: regular ones, inside it."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from ..errors import UnsafeError


def open_regular(path: str, flags: int) -> int:
    """Open a file that can be read at once: to open a FIFO waits for a writer, perhaps for ever."""
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return fd


def check_inside(checkpoint_id: str, name: str) -> None:
    """Raise `UnsafeError` if a file's name leads out of its checkpoint."""
    path = os.path.join(checkpoint_id, name)
    real = Path(os.path.realpath(path))
    root = Path(os.path.realpath(checkpoint_id))
    if real.is_relative_to(root):
        return
    for above in (root, *root.parents):
        if above.parent.name == "snapshots" and real.is_relative_to(above.parent.parent / "blobs"):
            return
    raise UnsafeError(path, "", f"resolves to {real}, which is outside the checkpoint")


def open_direct(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
