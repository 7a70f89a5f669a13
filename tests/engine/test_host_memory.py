"""Host memory is touched before it is needed, without getting in the way of who needs memory meanwhile."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
from collections.abc import Callable
from typing import Any

import pytest

from aiodcp import StageError
from aiodcp._engine import host_memory
from aiodcp._engine.host_memory import POPULATE_NBYTES, Arena


class Kernel:
    """Stands in for the system, and notes what it is asked to populate."""

    def __init__(self, answer: Callable[[], int] = lambda: 0) -> None:
        self.asked: list[tuple[int, int]] = []
        self.answer = answer

    def madvise(self, address: int, nbytes: int, advice: int) -> int:
        if advice != host_memory._MADV_POPULATE_WRITE:
            return 0
        self.asked.append((address, nbytes))
        if code := self.answer():
            ctypes.set_errno(code)
            return -1
        return 0


def test_all_of_it_is_populated_a_few_pages_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one call runs, nothing else of the process can map memory: a tensor that is made waits for its end."""
    arena, kernel = Arena(3 * POPULATE_NBYTES + 4096), Kernel()
    monkeypatch.setattr(host_memory, "_libc", kernel)
    arena.populate()
    at = arena.address
    for address, nbytes in kernel.asked:
        assert address == at
        assert nbytes <= 8 << 20
        at += nbytes
    assert at == arena.address + arena.nbytes


def test_memory_that_is_not_there_is_an_error_and_an_old_kernel_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    arena = Arena(2 * POPULATE_NBYTES)
    monkeypatch.setattr(host_memory, "_libc", Kernel(lambda: errno.ENOMEM))
    with pytest.raises(StageError, match=r"Cannot allocate memory, \d+ bytes are free"):
        arena.populate()
    monkeypatch.setattr(host_memory, "_libc", kernel := Kernel(lambda: errno.EINVAL))
    arena.populate()
    assert len(kernel.asked) == 1


def test_a_forked_child_that_drops_its_parents_memory_keeps_its_own() -> None:
    """It gets the addresses of the parent's, which are free in it."""
    garbage: list[Any] = [Arena(POPULATE_NBYTES)]
    garbage.append(garbage)
    gc.disable()
    try:
        del garbage
        child = os.fork()
        if not child:
            code = 1
            try:
                own = [Arena(POPULATE_NBYTES) for _ in range(4)]
                gc.collect()
                for arena in own:
                    arena.memory[:] = bytes(arena.nbytes)
                code = 0
            finally:
                os._exit(code)
    finally:
        gc.enable()
    assert os.waitpid(child, 0)[1] == 0
