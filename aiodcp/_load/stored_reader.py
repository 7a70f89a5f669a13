"""Values of one checkpoint, read by their names, without a state dict that wants them. Runs on the engine's loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .._engine.device_copies import DeviceCopies
from .._engine.gc_pause import gc_paused
from .._engine.threads import Threads, in_thread
from .._foreign.find import complete, find_metadata, folder_of, read_found
from .._foreign.index import stamp_of
from .._format.checksum import Checksum
from .._format.dcp import ChunkStorageMetadata, Metadata, StorageInfo, TensorStorageMetadata
from .._format.extension import ForeignLayout, Stamp, foreign_layout, is_ours
from .._format.index_reader import MALFORMED, open_any_seal
from .._format.item_tables import ItemTables
from .._format.naming import METADATA_NAME
from .._format.outline import Outline, decode_outline, is_known, outline_of
from .._format.seal import Seal, SealError
from .._state.plain_tensors import QUANTIZED
from .._telemetry.progress_bar import Bar
from ..errors import CorruptError, LoadError, MismatchError
from ..storage.base import Storage
from ..storage.error_mapping import read_errors
from .chunk_index import ChunkIndex
from .decode import ItemDecoder
from .file_reads import FileReads
from .fill_tensors import ending, fill_tensors
from .fitting import fill_whole, settle_values
from .planning import plan_load, read_parts
from .targets import LoadTargets, NewTensorDevice

Part = tuple[torch.Size, torch.Size]
"""Offsets and lengths of a part of a tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A value that is asked for.

    Attributes:
        fqn: its name.
        into: the tensor to fill; None for a new one on the host, or a value.
        part: what of the tensor `into` is; None if it is all of it, or knows its own part. A tensor that is not dense
            is read whole all the same.
    """

    fqn: str
    into: torch.Tensor | None = None
    part: Part | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """What the metadata says, and what reads by it."""

    metadata: Metadata
    pieces: ChunkIndex
    reads: FileReads


class StoredReader:
    """Reads one checkpoint, as it was when it was opened."""

    def __init__(
        self,
        storage: Storage,
        threads: Threads,
        checkpoint_id: str,
        *,
        checksum: Checksum | None,
        weights_only: bool,
    ) -> None:
        self._storage = storage
        self._threads = threads
        self._weights_only = weights_only
        self._folder = checkpoint_id
        self._stack: AsyncExitStack
        self._data = b""
        self._stamp: Stamp | None = None
        self._loaded: _Loaded | None = None
        self._decoder = ItemDecoder(
            describe=lambda name: storage.describe(self._folder, name), crc32=checksum, weights_only=weights_only
        )
        self.checkpoint_id: str = checkpoint_id
        self.outline: Outline = Outline()
        self.seal: Seal = Seal()

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[None]:
        """Read what the checkpoint holds, and keep its files open while the block runs.

        Raises:
            NotACheckpointError, FormatError, CorruptError, UnsafeError, ReadError: see `find_metadata`.
        """
        self._stamp = await self._look_at_metadata()
        self._data = await self._find()
        outline = await in_thread(self._threads.compute, self._read_outline)
        if outline is not None:
            self.outline = outline
        else:
            await in_thread(self._threads.compute, self._load)
            assert self._loaded is not None
            await complete(self._storage, self.checkpoint_id, self.metadata, 0)
            self._loaded = self._make_ready(self.metadata)  # what is known of it may have changed
            self.outline = outline_of(self.metadata)
        async with AsyncExitStack() as self._stack:
            yield

    def _read_outline(self) -> Outline | None:
        """Return what a checkpoint of this library holds, without unpickling its metadata."""
        try:
            seal = open_any_seal(self._data)
            if not is_known(seal.outline):
                return None
            outline = decode_outline(seal.outline)
        except SealError as error:
            raise CorruptError(self._path, "", str(error)) from error
        except MALFORMED as error:
            raise CorruptError(self._path, "", f"its outline is malformed: {type(error).__name__}") from error
        self.seal = seal
        return outline

    @property
    def _path(self) -> str:
        return self._storage.describe(self.checkpoint_id, METADATA_NAME)

    def _load(self) -> None:
        """Read all that the metadata says."""
        if self._loaded is None:
            with gc_paused():
                metadata, self.seal = read_found(self._data, self._path)
                if self.outline.tensors and outline_of(metadata) != self.outline:
                    raise CorruptError(self._path, "", "its outline contradicts its metadata")
            self._loaded = self._make_ready(metadata)

    def _make_ready(self, metadata: Metadata) -> _Loaded:
        try:
            tables = ItemTables(metadata, self.seal.tables if self._decoder.crc32 is not None else ())
        except ValueError as error:
            problem = "the number of data files is not the number of checksum tables"
            raise CorruptError(self._path, "", problem) from error
        self._folder = folder_of(self.checkpoint_id, metadata)
        layout = foreign_layout(metadata)
        reads = FileReads(self._storage, self._threads, self._folder, tables, self._decoder, layout)
        return _Loaded(metadata=metadata, pieces=ChunkIndex(metadata, self.checkpoint_id), reads=reads)

    @property
    def _known(self) -> _Loaded:
        """What the metadata says; read now, if nobody has asked before."""
        self._load()
        assert self._loaded is not None
        return self._loaded

    @property
    def metadata(self) -> Metadata:
        """All of it. Blocks for the first time, for some microseconds a tensor."""
        return self._known.metadata

    @property
    def layout(self) -> ForeignLayout | None:
        """How it lies in its files if it is of another format."""
        return foreign_layout(self._loaded.metadata) if self._loaded is not None else None

    @property
    def is_ours(self) -> bool:
        """Whether this library has written it."""
        return self._loaded is None or is_ours(self._loaded.metadata)

    async def _look_at_metadata(self) -> Stamp | None:
        """Return what tells the metadata's file from another one that takes its place; None if there is none."""
        try:
            async with self._storage.open(self.checkpoint_id, METADATA_NAME) as reader:
                return stamp_of(reader)
        except OSError:  # what is wrong is found by who reads it
            return None

    async def _find(self) -> bytes:
        return await find_metadata(self._storage, self.checkpoint_id, self._threads, weights_only=self._weights_only)

    def is_dense(self, fqn: str) -> bool:
        """Whether a value is a tensor that can be read into a tensor of one's own, in parts too."""
        entry = self.metadata.state_dict_metadata[fqn]
        return (
            isinstance(entry, TensorStorageMetadata)
            and entry.properties.layout is torch.strided
            and entry.properties.dtype not in QUANTIZED
            and fqn not in self._known.pieces.opaque
        )

    def find(self, fqn: str, offsets: torch.Size | None) -> StorageInfo:
        """Return where a value lies, or the chunk of a tensor at `offsets`."""
        return self._known.pieces.find(fqn, offsets)

    def place_of(self, fqn: str) -> tuple[str, int]:
        """Return where a value begins: the file, and the byte in it."""
        entry = self.metadata.state_dict_metadata[fqn]
        offsets = entry.chunks[0].offsets if isinstance(entry, TensorStorageMetadata) and entry.chunks else None
        info = self._known.pieces.find(fqn, offsets)
        return info.relative_path, info.offset

    async def read(self, wanted: Sequence[Wanted], device_copies: DeviceCopies, bar: Bar) -> list[Any]:
        """Return the values that are asked for, in their order.

        Raises:
            CorruptError: what is stored is not what was saved.
            UnsafeError: a value needs more than plain data.
            LoadError: there is no memory, or the checkpoint has been replaced since it was opened.
            ReadError: storage failed.

        Cancellation: takes effect when the read under way is done.
        """
        with ending(device_copies):
            try:
                values = await self._read(wanted, device_copies, bar)
            except CorruptError as error:
                if self._may_be_replaced(error) and await self._find() != self._data:
                    raise self._replaced() from error
                raise
            if not self.is_ours and await self._look_at_metadata() != self._stamp:
                raise self._replaced()  # dcp.save writes to files of the same names
            return values

    def _may_be_replaced(self, error: CorruptError) -> bool:
        return isinstance(error.__cause__, FileNotFoundError) or not self.is_ours

    def _replaced(self) -> LoadError:
        return LoadError(f"{self.checkpoint_id}: has been replaced since it was opened: open it again")

    async def _read(self, wanted: Sequence[Wanted], device_copies: DeviceCopies, bar: Bar) -> list[Any]:
        known = self._known
        whole = [each for each in wanted if each.part is None or each.into is None]
        targets = _targets(whole, device_copies)
        entries = known.metadata.state_dict_metadata
        plan, problems = await in_thread(
            self._threads.compute, lambda: plan_load(known.metadata, targets, known.pieces, cast=True)
        )
        for each in wanted:
            entry = entries[each.fqn]
            if each.part is not None and each.into is not None and isinstance(entry, TensorStorageMetadata):
                part = ChunkStorageMetadata(*each.part)
                plan.tensors.extend(read_parts(known.pieces, each.fqn, each.fqn, [(each.into, part)], entry))
        if problems:
            raise MismatchError(self.checkpoint_id, problems=problems)
        await known.reads.open(self._stack, plan)
        with read_errors(self._storage.describe(self.checkpoint_id)):
            targets.loaded |= await known.reads.read_values(plan.values, decoded=True)
            if problems := settle_values(plan, targets, cast=True):
                raise MismatchError(self.checkpoint_id, problems=problems)
            await fill_tensors(known.reads, plan, device_copies, self._threads, bar)
            await known.reads.check_unchanged([*plan.values, *plan.tensors])
        await in_thread(self._threads.compute, _finish, plan, targets)
        numbers = {id(each): number for number, each in enumerate(whole)}
        return [targets.value(numbers[id(each)]) if id(each) in numbers else each.into for each in wanted]


def _finish(plan: Any, targets: LoadTargets) -> None:
    targets.device_copies.enter_thread()
    fill_whole(plan, targets)
    targets.device_copies.wait_for_thread()


def _targets(wanted: Sequence[Wanted], device_copies: DeviceCopies) -> LoadTargets:
    fqns = [each.fqn for each in wanted]
    values = [each.into for each in wanted]
    return LoadTargets(
        states=dict(zip(fqns, values, strict=True)),
        kinds=dict.fromkeys(fqns, "plain"),
        optimizers=[],
        per_rank=[],
        fqns=fqns,
        paths=[(fqn,) for fqn in fqns],
        values=values,
        device_copies=device_copies,
        new_tensors=NewTensorDevice(),
        sources=list(fqns),
    )
