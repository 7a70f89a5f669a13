"""What a storage must be able to do: ten verbs, and what each promises about durability.

A storage holds checkpoints; a checkpoint is a flat set of named files. The save flow calls `create`, writes,
leaves the `async with`, and then `put`s the commit record: the promises below are what makes that order safe.
All coroutines run on one event loop, not on the caller's. Failures are `OSError`s.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import Protocol, runtime_checkable

BLOCK = 4096
"""Bytes. Writers are given offsets that are multiples of this and buffers that start at such an address."""


class Writer(Protocol):
    """A file that is being written."""

    async def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data` (bytes) at `offset`; several writes may be under way at once.

        Cancellation: waits for the write under way, so that the memory is free when this returns.
        """


class Reader(Protocol):
    """A file that is being read."""

    nbytes: int
    """The file's size in bytes."""

    async def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers`, one after the other, with the bytes from `offset` on.

        Raises:
            EOFError: the file ends before the last buffer is full.

        Cancellation: waits for the read under way, so that the memory is free when this returns.
        """


@runtime_checkable
class Storage(Protocol):
    """Where checkpoints live. `MemoryStorage` is the shortest example; `tests/test_storage.py` is the contract."""

    def resolve(self, checkpoint_id: str) -> str:
        """Return the one spelling of this id that stays valid, wherever the process may turn to (a full path)."""

    def locate(self, checkpoint_id: str, name: str = "") -> str:
        """Return what an error message should call this file, or the checkpoint if `name` is empty."""

    def create(self, checkpoint_id: str, name: str) -> AbstractAsyncContextManager[Writer]:
        """Open a file that must not exist yet, making the checkpoint's place when it is the first.

        Leaving the block without an error makes the file durable, its name included; leaving it with an
        error removes the file.
        """

    def open(self, checkpoint_id: str, name: str) -> AbstractAsyncContextManager[Reader]:
        """Open a file for reading; `FileNotFoundError` if it is not there."""

    async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
        """Make `name` hold `data`: durably, and atomically with respect to readers and to crashes.

        Cancellation: all or nothing.
        """

    async def get(self, checkpoint_id: str, name: str) -> bytes:
        """Return the whole content of `name`; `FileNotFoundError` if it is not there."""

    async def names(self, checkpoint_id: str) -> list[str]:
        """Return the names of all files, sorted, leftovers included; empty for a place that does not exist."""

    async def remove(self, checkpoint_id: str, name: str) -> None:
        """Remove a file; one that is not there is no error."""

    async def discard(self, checkpoint_id: str) -> None:
        """Forget the checkpoint's place if nothing is in it (a directory is removed, for example)."""
