"""Parts of a checkpoint that several processes write, and one of them commits."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from .._engine.broadcast import Signal
from .._engine.milestone import MilestoneSource
from .._format.dcp import (
    STORAGE_TYPES,
    BytesStorageMetadata,
    KeyPath,
    Metadata,
    MetadataIndex,
    StorageInfo,
    StorageMeta,
    TensorStorageMetadata,
)
from .._format.extension import Containers, containers_of, opaque_names
from .._format.metadata_reader import read_metadata
from .._format.metadata_writer import build_metadata
from .._format.naming import save_id_of
from .._format.outline import encode_outline
from .._format.pickle_template import dump_metadata
from .._format.seal import in_pieces
from ..errors import ArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTicket:
    """What a process has written of a checkpoint, durable and not committed: to be sent to the one that commits.

    It is plain data, that can be pickled.

    Attributes:
        checkpoint_id: of which checkpoint: the full path or URL.
        files: the names of the data files.
        metadata: what is in them, as DCP's `.metadata` says it.
        tables: CRC32s of the files' tables of checksums, in the order of the names.
    """

    checkpoint_id: str
    files: tuple[str, ...]
    metadata: bytes
    tables: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined:
    """Several parts as one checkpoint's content."""

    pickled: bytes
    outline: bytes
    tables: list[int]
    files: set[str]


def join(tickets: Sequence[PartTicket], checkpoint_id: str, save_id: str) -> Joined:
    """Return what is to be committed.

    Raises:
        ArgumentError: there is none, one is malformed or of another checkpoint, two parts have a value of one name, or
            what is a container in one is none in another.
        CorruptError, UnsafeError: what a ticket says is not metadata.
    """
    if not tickets:
        raise ArgumentError("tickets", "there is none: nothing would be committed")
    entries: dict[str, STORAGE_TYPES] = {}
    paths: dict[str, KeyPath] = {}
    stored: dict[MetadataIndex, StorageInfo] = {}
    opaque: list[str] = []
    containers = Containers()
    tables: dict[str, int] = {}
    kinds: dict[KeyPath, str] = {}
    for number, ticket in enumerate(tickets):
        if not isinstance(ticket, PartTicket):
            raise ArgumentError("tickets", f"must be PartTickets, got {type(ticket).__name__}")
        if not all(type(file) is str and save_id_of(file) for file in ticket.files):
            raise ArgumentError("tickets", f"ticket {number} names files that no part has: {ticket.files!r:.200}")
        if ticket.checkpoint_id != checkpoint_id:
            problem = f"one is of a part of {ticket.checkpoint_id}, and cannot be committed as {checkpoint_id}"
            raise ArgumentError("tickets", problem)
        metadata = read_metadata(ticket.metadata, f"ticket {number}")
        if twice := metadata.state_dict_metadata.keys() & entries.keys():
            raise ArgumentError("tickets", f"two parts have a value named {sorted(twice)[0]!r}")
        known = containers_of(metadata) or Containers()
        # What is read is of classes that live as long as it: what is to be written is made anew.
        for fqn, entry in metadata.state_dict_metadata.items():
            entries[fqn] = entry if isinstance(entry, TensorStorageMetadata) else BytesStorageMetadata()
        for index, info in metadata.storage_data.items():
            stored[index] = StorageInfo(info.relative_path, info.offset, info.length)
        for path in (metadata.planner_data or {}).values():
            _note_kinds(kinds, path, known.int_keys)
        paths |= metadata.planner_data or {}
        opaque += opaque_names(metadata)
        containers.empty += known.empty
        containers.int_keys += known.int_keys
        tables |= dict(ticket.tables)
    meta = StorageMeta(checkpoint_id, save_id)
    whole = build_metadata(Metadata(entries), paths, stored, meta, opaque, containers)
    return Joined(
        pickled=dump_metadata(whole),
        outline=in_pieces(encode_outline(whole)),
        tables=[tables[file] for file in sorted(tables)],
        files={file for ticket in tickets for file in ticket.files},
    )


def _note_kinds(kinds: dict[KeyPath, str], path: KeyPath, int_keys: Sequence[KeyPath]) -> None:
    """Note what is at a path, and what all above it are.

    Raises:
        ArgumentError: another part has something else there.
    """
    for depth in range(1, len(path) + 1):
        here = path[:depth]
        if depth == len(path):
            kind = "a value"
        elif type(path[depth]) is int:
            kind = "a list"
        else:
            kind = "a dict with int keys" if here in int_keys else "a dict"
        if kinds.setdefault(here, kind) != kind:
            name = ".".join(map(str, here))
            raise ArgumentError("tickets", f"{name!r} is {kinds[here]} in one part, and {kind} in another")


class PartExchange:
    """Between a save that has written its part and the caller, who has it committed elsewhere. From any thread.

    Attributes:
        written: reached when the part is durable.
        ticket: from then on; None on ranks that do not coordinate.
    """

    def __init__(self) -> None:
        self.written: MilestoneSource = MilestoneSource("written")
        self.ticket: PartTicket | None = None
        self._lock = threading.Lock()
        self._is_committed: bool | None = None
        self._decided: Signal | None = None

    def decide(self, *, is_committed: bool) -> None:
        """Say whether the part has been committed."""
        with self._lock:
            if self._is_committed is None:
                self._is_committed = is_committed
            if self._decided is not None:
                self._decided.set()

    def offer(self, ticket: PartTicket | None) -> None:
        """Say that the part is written."""
        self.ticket = ticket
        self.written.reach()

    async def decision(self) -> bool:
        """Wait until it is decided, and return whether the part is committed. On the engine's loop."""
        with self._lock:
            self._decided = decided = Signal()
            if self._is_committed is not None:
                return self._is_committed
        await decided.wait()
        return bool(self._is_committed)
