"""Host memory to stage into: page-aligned, on huge pages, touched before it is needed, kept between saves."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from contextlib import suppress
from pathlib import Path
from weakref import finalize

import torch

from ._log import log
from .errors import StageError

# Bytes populated by one system call: a thread that is wanted back is late by a tenth of a second at most.
# Measured: first touch of a fresh VM's memory, 2.3 s a GiB on 4 KiB pages and as much on huge ones.
POPULATE_NBYTES = 64 << 20
_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: for all devices
_MADV_POPULATE_WRITE = 23  # Linux 5.14; the constant is not in Python's mmap. Source: madvise(2)

_warned = False  # of memory that cannot be pinned: told once

_libc = ctypes.CDLL(None, use_errno=True)  # mmap.madvise() holds the GIL while it populates; this does not
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Arena:
    """One stretch of anonymous memory, given back when the last reference goes.

    Attributes:
        nbytes: its size in bytes.
        memory: all of it, as bytes.
        tensor: all of it, as a uint8 tensor that shares the memory.
        address: of its first byte; a multiple of the page size.
    """

    def __init__(self, nbytes: int) -> None:
        free = free_nbytes()
        if nbytes > free:  # Linux would promise the memory all the same, and kill the process when it is touched
            raise StageError(nbytes, f"only {free} bytes of host memory are free for the staging buffer")
        try:
            mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise StageError(nbytes, f"no host memory, {free} bytes are free: {error}") from error
        self.nbytes = nbytes
        self.memory = memoryview(mapping)
        self.tensor = torch.frombuffer(mapping, dtype=torch.uint8)
        self.address = self.tensor.data_ptr()
        self._pin_tried = False
        # Advice: a kernel that does not take it is no error. A child that is forked while a save is staged (a data
        # loader's worker) would make every page be copied: measured, 1 GiB staged in 2.6 s instead of 0.09 s.
        _libc.madvise(self.address, nbytes, mmap.MADV_HUGEPAGE)
        _libc.madvise(self.address, nbytes, mmap.MADV_DONTFORK)

    def pin(self) -> None:
        """Register the memory with CUDA, so that devices copy from and to it by themselves. Releases the GIL.

        Where the system refuses to lock so much memory a warning says so, once, and copies are slower.
        """
        if self._pin_tried or not torch.cuda.is_available():
            return
        self._pin_tried = True
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        code = int(cudart.cudaHostRegister(self.address, self.nbytes, _REGISTER_PORTABLE))
        if code == 0:
            # Before the memory is unmapped: that is when the last tensor that shares it goes, and this goes first.
            finalize(self, _unpin, self.address).atexit = False
            return
        with suppress(RuntimeError):  # takes CUDA's note of the error, which the next kernel would be blamed for
            torch.zeros(1, device="cuda")
        global _warned
        if not _warned:
            _warned = True
            log.warning(
                "%d bytes of host memory could not be pinned (cudaHostRegister: error %d; see `ulimit -l`): copies "
                "from and to CUDA devices take longer",
                self.nbytes,
                code,
            )

    def populate(self) -> None:
        """Touch every page now, so that the first copy does not pay for it. Releases the GIL.

        Raises:
            StageError: the system has not that much memory.
        """
        for start in range(0, self.nbytes, POPULATE_NBYTES):
            nbytes = min(POPULATE_NBYTES, self.nbytes - start)
            if _libc.madvise(self.address + start, nbytes, _MADV_POPULATE_WRITE) == 0:
                continue
            if ctypes.get_errno() == errno.EINVAL:  # an older kernel: pages come when they are touched
                return
            problem = f"{os.strerror(ctypes.get_errno())}, {free_nbytes()} bytes are free"
            raise StageError(self.nbytes, problem)


def _unpin(address: int) -> None:
    code = int(torch.cuda.cudart().cudaHostUnregister(address))  # type: ignore[no-untyped-call]
    if code != 0:
        log.warning("pinned host memory could not be released (cudaHostUnregister: error %d)", code)


def free_nbytes() -> int:
    """Return the bytes of memory that can be had, the page cache's included. Source: proc(5), MemAvailable."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name == "MemAvailable":
            return 1024 * int(rest.split()[0])
    raise StageError(0, "/proc/meminfo does not tell how much memory is free")


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous host tensor; valid as long as the tensor is."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
