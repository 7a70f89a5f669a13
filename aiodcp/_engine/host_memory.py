"""Host memory to stage into: page-aligned, on huge pages, touched before it is needed, kept between saves."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from weakref import WeakSet, finalize

import torch

from .._log import SafeLogger
from ..errors import StageError
from .free_memory import free_nbytes

log = SafeLogger(__name__)


# Bytes populated by one system call. While it runs, no other thread can map or unmap memory, as is done for large
# tensors. Measured: a GiB takes 0.1 s, and on a fresh VM 2 to 5 s, on 4 KiB pages as on huge ones; others waited for up
# to 0.29 s for pieces of 64 MiB, and for up to 0.05 s for these.
POPULATE_NBYTES = 4 << 20

# Bytes registered by one call, at least: current drivers refuse more than 512 GiB at once, and what succeeds of many
# calls stays pinned. Measured on an H200: 4 GiB take 0.2 s in one piece as in pieces of 64 MiB.
PIN_NBYTES = 256 << 20

_REGISTER_PORTABLE = 1  # cudaHostRegisterPortable: for all devices

_MADV_POPULATE_WRITE = 23  # Linux 5.14; the constant is not in Python's mmap. Source: madvise(2)

_ERRORS = {  # Source: cudaError_t in the CUDA runtime's reference
    1: "invalid value",
    2: "out of memory: the driver's own limit, which `ulimit -l` does not change",
    801: "not supported on this system",
}

SMALL_NBYTES = 1 << 20  # of an arena, for which it is not asked how much memory is free: that takes a millisecond

_pinned_until_exit: list[mmap.mmap] = []

_mapped: WeakSet[mmap.mmap] = WeakSet()  # by this process

_warned = False  # of memory that cannot be pinned: once

_libc = ctypes.CDLL(None, use_errno=True)  # mmap.madvise() holds the GIL while it populates; this does not
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def _leak_inherited() -> None:
    """In a forked child, keep what is left of the parent's arenas for ever, also when the interpreter ends.

    Their memory is not here (MADV_DONTFORK), and what has been mapped at their addresses since would be unmapped with
    them: seen as a segmentation fault in the child's own copy.
    """
    for mapping in list(_mapped):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(mapping))
    _mapped.clear()


os.register_at_fork(after_in_child=_leak_inherited)


class Arena:
    """One stretch of anonymous memory, given back when the last reference goes.

    Attributes:
        nbytes: its size in bytes.
        memory: all of it, as bytes.
        tensor: all of it, as a uint8 tensor that shares the memory.
        address: of its first byte; a multiple of the page size.
    """

    def __init__(self, nbytes: int) -> None:
        # Linux would promise the memory all the same, and kill the process when it is touched.
        if nbytes > SMALL_NBYTES and nbytes > (free := free_nbytes()):
            raise StageError(nbytes, f"only {free} bytes of host memory are free for the staging buffer")
        try:
            mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise StageError(nbytes, f"no host memory, {free_nbytes()} bytes are free: {error}") from error
        _mapped.add(mapping)
        self.nbytes = nbytes
        self._mapping = mapping
        self.memory = memoryview(mapping)
        self.tensor = torch.frombuffer(mapping, dtype=torch.uint8)
        self.address = self.tensor.data_ptr()
        self._typed: dict[torch.dtype, torch.Tensor] = {}
        self._pin_tried = False
        # Advice: a kernel that does not take it is no error. A child that is forked while a save is staged (a data
        # loader's worker) would make every page be copied: measured, 1 GiB staged in 2.6 s instead of 0.09 s.
        _libc.madvise(self.address, nbytes, mmap.MADV_HUGEPAGE)
        _libc.madvise(self.address, nbytes, mmap.MADV_DONTFORK)

    def typed(self, dtype: torch.dtype) -> torch.Tensor:
        """Return all of it as elements: to view a tensor in it by `as_strided` takes a third of the time."""
        if dtype not in self._typed:
            self._typed[dtype] = self.tensor[: self.nbytes // dtype.itemsize * dtype.itemsize].view(dtype)
        return self._typed[dtype]

    def pin(self, device: torch.device | None, borders: Sequence[int] = ()) -> None:
        """Register the memory with CUDA, so that devices copy from and to it by themselves. Releases the GIL.

        In a thread of the library, whose current device this makes `device`. Where CUDA refuses, a warning says so,
        once, and copies are slower.

        Args:
            device: any of those that copy.
            borders: where pieces may end, ascending: CUDA refuses a copy that crosses the end of one.
        """
        if self._pin_tried or device is None or device.type != "cuda":
            return
        self._pin_tried = True
        torch.accelerator.set_device_index(device.index)
        cudart = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        pinned = 0
        for start, stop in pieces_of(self.nbytes, borders):
            code = int(cudart.cudaHostRegister(self.address + start, stop - start, _REGISTER_PORTABLE))
            if code:
                break
            pinned += stop - start
            # Before the memory is unmapped: that is when the last tensor that shares it goes, and this goes first.
            finalize(self, _unpin, self._mapping, self.address + start, device, os.getpid()).atexit = False
        else:
            return
        with suppress(RuntimeError):  # takes CUDA's note of the error, which the next kernel would be blamed for
            torch.zeros(1, device=device)
        global _warned
        if not _warned:
            _warned = True
            log.warning(
                "only %d of %d bytes of host memory could be pinned (cudaHostRegister: error %d, %s): copies from and "
                "to CUDA devices will be slower",
                pinned,
                self.nbytes,
                code,
                _ERRORS.get(code, "see cudaError_t in CUDA's documentation"),
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


def pieces_of(nbytes: int, borders: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Cut memory into pieces of `PIN_NBYTES` at least, which end at borders."""
    start = 0
    for border in (*borders, nbytes):
        if border > start and (border == nbytes or (border - start >= PIN_NBYTES and nbytes - border >= PIN_NBYTES)):
            yield start, border
            start = border


def _unpin(mapping: mmap.mmap, address: int, device: torch.device, pid: int) -> None:
    """Release a piece of `mapping`; if that fails, keep the memory for ever.

    Memory that is mapped at the same address later would count as pinned, and a device would go on with the old pages:
    seen on an H200 when a release was left out, and saves were all zeros.
    """
    if os.getpid() != pid:  # forked: the memory is the parent's, and CUDA does not work here
        return
    try:
        with torch.accelerator.device_index(device.index):  # in whatever thread the last reference went
            code = int(torch.cuda.cudart().cudaHostUnregister(address))  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        problem = repr(error)
    else:
        if code == 0:
            return
        problem = f"cudaHostUnregister: error {code}"
    _pinned_until_exit.append(mapping)
    log.warning("cannot unpin host memory, which stays allocated until the process exits: %s", problem)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous host tensor; valid as long as the tensor is."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
