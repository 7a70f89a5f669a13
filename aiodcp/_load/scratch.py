"""Memory that is read into, used again and again within one load."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from operator import attrgetter

import torch

from .._engine.host_memory import Arena
from .._engine.threads import SHORT_NBYTES, Threads, in_thread_if_long


class Scratch:
    """Memory for spans, used again and again within one load: memory that was touched before is quicker."""

    def __init__(self, threads: Threads, nbytes: int, *, pin_for: torch.device | None) -> None:
        """Begin without memory; it is taken `nbytes` at a time, or more if that is asked for."""
        self._threads = threads
        self._nbytes = nbytes
        self._pin_for = pin_for
        self._free: list[Arena] = []

    @asynccontextmanager
    async def take(self, nbytes: int) -> AsyncIterator[Arena]:
        large_enough = [arena for arena in self._free if arena.nbytes >= nbytes]
        if large_enough:
            arena = min(large_enough, key=attrgetter("nbytes"))
            self._free.remove(arena)
        else:
            self._free.clear()  # too small: not kept beside the larger one
            nbytes = max(nbytes, self._nbytes, 1)  # nothing cannot be mapped
            arena = await in_thread_if_long(nbytes <= SHORT_NBYTES, self._threads.compute, self._make, nbytes)
        yield arena
        self._free.append(arena)  # but not after a failure: a device may be using it

    def _make(self, nbytes: int) -> Arena:
        arena = Arena(nbytes)
        arena.pin(self._pin_for)
        return arena
