"""The storage protocol, and what each of its methods promises about durability.

A storage holds checkpoints; a checkpoint is a flat set of named files. The save flow calls `create`, writes,
leaves the `async with`, and then `put`s `.metadata`: the promises below are what makes that order safe.
All coroutines run on one event loop, not on the caller's. Failures are `OSError`s.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol, TypeGuard, runtime_checkable

WRITE_ALIGNMENT = 4096
"""Bytes. Writers are given offsets that are multiples of this and buffers that start at such an address."""

INTERNAL_DIRECTORY = ".aiodcp"
"""Below a root or a checkpoint: what is this library's own, and no file or child of it."""


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
        """When it was last written, in seconds of `time.time()`; None if the storage does not know."""

    async def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill `buffers`, one after the other, with the bytes from `offset` on.

        Raises:
            EOFError: the file ends before the last buffer is full.

        Cancellation: waits for the read under way, so that the memory is free when this returns.
        """


@runtime_checkable
class Storage(Protocol):
    """Where checkpoints live. `MemoryStorage` is the shortest example; `aiodcp.testing` checks an implementation."""

    def resolve(self, checkpoint_id: str) -> str:
        """Return the one spelling of this id that stays valid, whatever the working directory (a full path).

        Raises:
            ArgumentError: this storage cannot hold a checkpoint of that id.
        """

    def describe(self, checkpoint_id: str, name: str = "") -> str:
        """Return what an error message should call this file, or the checkpoint if `name` is empty."""

    def create(self, checkpoint_id: str, name: str) -> AbstractAsyncContextManager[Writer]:
        """Open a file that must not exist yet, creating the checkpoint's directory, or what stands for it.

        Leaving the block without an error makes the file durable, its name included; leaving it with an
        error removes the file.

        Raises:
            FileExistsError: there is such a file.
        """

    def open(self, checkpoint_id: str, name: str) -> AbstractAsyncContextManager[Reader]:
        """Open a file for reading.

        Raises:
            FileNotFoundError: there is no such file.
        """

    async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
        """Make `name` hold `data`: durably, and atomically with respect to readers and to crashes.

        Cancellation: all or nothing.
        """

    async def get(self, checkpoint_id: str, name: str) -> bytes:
        """Return the whole content of `name`.

        Raises:
            FileNotFoundError: there is no such file.
        """

    async def list_files(self, checkpoint_id: str) -> list[str]:
        """Return the names of all files, sorted, leftovers included; empty for a checkpoint that does not exist."""

    async def file_sizes(self, checkpoint_id: str) -> dict[str, int]:
        """Return the size in bytes of every file, by name. For people: it may take longer than `list_files`."""

    async def list_children(self, root: str) -> list[str]:
        """Return the names of the checkpoints or directories right below `root`, sorted; empty if it does not exist."""

    async def remove(self, checkpoint_id: str, name: str, *, durable: bool = False) -> None:
        """Remove a file, if it is there. If `durable`, no crash brings it back."""

    async def remove_if_empty(self, checkpoint_id: str, *, made_by_anyone: bool = False) -> None:
        """Remove the checkpoint's directory, or what stands for it, if nothing is in it.

        Unless `made_by_anyone` only one that this storage has created: an empty directory may be the caller's own.
        """

    async def remove_tree(self, checkpoint_id: str) -> None:
        """Remove the checkpoint with all that is in it, if it is there."""

    def lock(self, root: str, *, exclusive: bool, create: bool = True) -> AbstractAsyncContextManager[bool]:
        """Hold a lock on `root` while the block runs, against all other processes that have the same storage.

        Shared locks are compatible with each other, and wait for an exclusive one. An exclusive lock does not wait:
        the block's value is False if it is not held, because another lock is held, or because the storage cannot
        know, as where none has ever been held. A lock ends with its process.

        Args:
            root: below which checkpoints are saved and removed.
            exclusive: whether no other lock may be held.
            create: whether a shared lock may write to `root`. Without it, for those who save below a directory that
                is not their own, it is held only if one has been held before; a store may say False then.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectLimits:
    """How a store wants to be used that takes files as wholes, answers late, and answers many requests at a time.

    Attributes:
        object_nbytes: of the tensors in one file, at most: larger ones are cut. One that cannot be cut has its own.
        reads_at_once: requests under way.
        gap_nbytes: bytes rather read for nothing than asked for apart.
    """

    object_nbytes: int
    reads_at_once: int
    gap_nbytes: int


@runtime_checkable
class WholeFileStorage(Storage, Protocol):
    """A storage to which files are best written whole, several at once: an object store.

    Where these methods are there, a rank's data is written as many files of a bounded size, each as soon as it is
    staged, and never by `create`.
    """

    def limits(self, checkpoint_id: str) -> ObjectLimits | None:
        """Return how this checkpoint is to be written and read; None as other storages do."""

    async def put_new(self, checkpoint_id: str, name: str, data: memoryview) -> None:
        """Make a file of `data` that must not exist yet, unless with the same content. It is durable at the end.

        Raises:
            FileExistsError: there is such a file with another content.

        Cancellation: the file may be there or not, and the memory is free when this returns.
        """

    async def remove_all(self, checkpoint_id: str, names: Sequence[str]) -> None:
        """Remove files, those that are there, with as few requests as there can be."""

    async def dates(self, checkpoint_id: str) -> dict[str, float]:
        """Return when each file was written, in seconds of the store's clock, by name."""


def takes_whole_files(storage: Storage) -> TypeGuard[WholeFileStorage]:
    """Whether a storage has the methods of one to which files are written whole."""
    return _is_of_whole_files(type(storage))


@lru_cache(maxsize=64)
def _is_of_whole_files(kind: type[object]) -> bool:
    return issubclass(kind, WholeFileStorage)  # that takes a tenth of a millisecond, and is asked ten times a save


async def remove_all(storage: Storage, checkpoint_id: str, names: Sequence[str]) -> None:
    """Remove files, those that are there."""
    if takes_whole_files(storage):
        await storage.remove_all(checkpoint_id, names)
        return
    for name in names:
        await storage.remove(checkpoint_id, name)


async def file_dates(storage: Storage, checkpoint_id: str) -> dict[str, float]:
    """Return when each file was written, in seconds, by name; now, if the storage does not know."""
    if takes_whole_files(storage):
        return await storage.dates(checkpoint_id)
    dates: dict[str, float] = {}
    for name in await storage.list_files(checkpoint_id):
        try:
            async with storage.open(checkpoint_id, name) as reader:
                dates[name] = reader.modified_at if reader.modified_at is not None else time.time()
        except FileNotFoundError:  # removed meanwhile
            continue
    return dates


def object_limits(storage: Storage, checkpoint_id: str) -> ObjectLimits | None:
    """Return how a storage wants files to be written whole; None if it does not."""
    return storage.limits(checkpoint_id) if takes_whole_files(storage) else None
