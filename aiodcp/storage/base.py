"""What a storage must be able to do: thirteen verbs, and what each promises about durability.

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

    @property
    def modified_at(self) -> float | None:
        """When it was last written, in seconds of `time.time()`; None if the storage cannot tell."""

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

    async def remove(self, checkpoint_id: str, name: str, *, durable: bool = False) -> None:
        """Remove a file; one that is not there is no error. If `durable`, no crash brings it back."""

    async def discard(self, checkpoint_id: str, *, made_by_anyone: bool = False) -> None:
        """Forget the checkpoint's place if nothing is in it (a directory is removed, for example).

        Unless `made_by_anyone` only a place that this storage has made: an empty directory may be the caller's own.
        """

    async def remove_tree(self, checkpoint_id: str) -> None:
        """Remove the checkpoint's place with all that is in it; one that is not there is no error."""

    async def places(self, root: str) -> list[str]:
        """Return the names of the places right below `root`, sorted; none if there is no such place."""

    def join(self, root: str) -> AbstractAsyncContextManager[bool]:
        """Hold a claim on `root` that is not alone while the block lasts, if anybody has ever held one there.

        For who saves below a place that is not its own: nothing is made there.
        """

    def claim(self, root: str, *, alone: bool) -> AbstractAsyncContextManager[bool]:
        """Hold a claim on `root` while the block lasts, against all other processes that have the same storage.

        Claims that are not `alone` go together; they wait for one that is. One that is `alone` does not wait: the
        block's value is False if anybody else holds a claim, or if the storage cannot tell, as where nobody has ever
        held one. A claim ends with its process.
        """
