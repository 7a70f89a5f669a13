"""The files of one checkpoint, open for a load: what is read from them, checked, and brought to its place.

Items that lie close together are read as one span into scratch memory, checked, and copied to their places in one
go; a large tensor that is contiguous in host memory is read straight into it.
"""

from __future__ import annotations

import mmap
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import anyio
import torch

from .._distributed.relay import Relay
from .._engine.device_copies import DeviceCopies
from .._engine.host_memory import memory_of
from .._engine.task_groups import single_error
from .._engine.threads import SHORT_NBYTES, Threads, in_thread, in_thread_if_long
from .._foreign.index import stamp_of
from .._format.archive_reader import StoredTensor, find_tensor
from .._format.extension import INLINE, ForeignLayout, Stamp
from .._format.item_tables import ItemCrcs, ItemTables
from .._state.capture import SHORT
from .._telemetry.progress_bar import Bar
from ..errors import CorruptError, LoadError, ReadError
from ..storage.base import Reader, Storage, object_limits
from ..storage.error_mapping import read_errors
from .chunk_index import read_rows
from .coalesce import (
    DIRECT_NBYTES,
    GAP_NBYTES,
    SPAN_NBYTES,
    ReadSpan,
    coalesce_reads,
    overlapping,
)
from .decode import ItemDecoder
from .large_reads import LargeRead
from .plan import TensorRead, ValueRead
from .read_plan import ReadPlan
from .routes import Routes
from .scatter import scatter
from .scratch import Scratch
from .small_reads import SmallReads, SmallSpan

ENDS_NBYTES = 8 << 10  # of an archive: what torch.save writes before and after one tensor's bytes is 1.5 KiB
OPENED_AT_ONCE = 8  # files: on a shared file system each waits for its server

READS_AT_ONCE = 3  # one is read, one is checked, one waits


class FileReads:
    """Reads the files of one checkpoint, as they are at one time: a save may replace all of them."""

    def __init__(
        self,
        storage: Storage,
        threads: Threads,
        checkpoint_id: str,
        tables: ItemTables,
        decoder: ItemDecoder,
        layout: ForeignLayout | None,
    ) -> None:
        """Begin without an open file.

        Args:
            storage, checkpoint_id: where the files are.
            threads: the engine's.
            tables: what `.metadata` says of the files' tables of checksums.
            decoder: checks and decodes items.
            layout: how it lies in its files if it is of another format.
        """
        self._storage = storage
        self._threads = threads
        self._checkpoint_id = checkpoint_id
        self._tables = tables
        self._decoder = decoder
        self._inline: Sequence[bytes] = layout.inline if layout is not None else ()
        self._stamps: Mapping[str, Stamp] = layout.stamps if layout is not None else {}
        self._limits = limits = object_limits(storage, checkpoint_id)
        self._at_once = limits.reads_at_once if limits else READS_AT_ONCE
        self._gap_nbytes = limits.gap_nbytes if limits else GAP_NBYTES
        self._readers: dict[str, Reader] = {}
        self._crcs: dict[str, ItemCrcs] = {}  # by file, of the tables that have been read

    async def open(self, stack: AsyncExitStack, plan: ReadPlan) -> None:
        """Open every file of a plan, until `stack` is closed, and check that every item lies within its file.

        Raises:
            CorruptError: a file is missing, too short, or its table is not what was saved.
            ReadError: storage failed.
        """
        readers = self._readers
        reads: list[ValueRead | TensorRead] = [*plan.values, *plan.tensors]
        if self._inline:
            reads = [read for read in reads if read.file != INLINE]
        small = plan.small
        await self._open_files(stack, {read.file: read.fqn for read in reads} | (small.used_files() if small else {}))
        if small is not None:
            self._check_small(small)
        for read in reads:
            file = read.file
            if read.offset + read.nbytes > readers[file].nbytes:
                problem = f"truncated: {readers[file].nbytes} bytes, the value ends at {read.offset + read.nbytes}"
                raise CorruptError(self._storage.describe(self._checkpoint_id, file), read.fqn, problem)
            if isinstance(read, TensorRead) and read.frame and not read.bare and read.frame.item_nbytes != read.nbytes:
                problem = f"is stored as {read.nbytes} bytes, not the size of {read.dtype} {tuple(read.sizes)}"
                raise CorruptError(self._storage.describe(self._checkpoint_id, file), read.fqn, problem)
            if isinstance(read, ValueRead) or not read.bare:
                read.crc = self._crcs[file].get(read.offset) if file in self._crcs else None

    def _check_small(self, small: SmallReads) -> None:
        problem = small.find_misplaced({file: self._readers[file].nbytes for file in small.used_files()})
        if problem is not None:
            number, text = problem
            file = small.file_names[int(small.files[number])]
            raise CorruptError(self._storage.describe(self._checkpoint_id, file), small.fqns[number], text)
        small.take_crcs(self._crcs)

    async def _open_files(self, stack: AsyncExitStack, wanted: dict[str, str]) -> None:
        """Open files, and those that have their tables; several at once.

        Args:
            stack: closes them.
            wanted: the files, each with the name of a value in it, for errors.
        """
        for file, fqn in list(wanted.items()):
            wanted.setdefault(self._tables.file_of(file), fqn)
        names = [(file, fqn) for file, fqn in wanted.items() if file not in self._readers]
        limit = anyio.Semaphore(self._limits.reads_at_once if self._limits is not None else OPENED_AT_ONCE)

        async def open_one(file: str, fqn: str) -> None:
            async with limit:
                await self._open_file(stack, file, fqn)

        with single_error():
            async with anyio.create_task_group() as group:
                for file, fqn in names:
                    group.start_soon(open_one, file, fqn)

    async def _open_file(self, stack: AsyncExitStack, file: str, fqn: str) -> None:
        path = self._storage.describe(self._checkpoint_id, file)
        try:
            with read_errors(path):
                self._readers[file] = await stack.enter_async_context(self._storage.open(self._checkpoint_id, file))
        except ReadError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise CorruptError(path, fqn, "the file is missing") from error.__cause__
            raise
        await self._read_table(file, path)

    async def check_unchanged(self, reads: Sequence[ValueRead | TensorRead]) -> None:
        """Make sure that the files that were read are those whose headers were read, in another format than DCP's.

        Raises:
            LoadError: one has been replaced, or written to.
            ReadError: storage failed.
        """
        for file in sorted({read.file for read in reads} & self._stamps.keys()):
            path = self._storage.describe(self._checkpoint_id, file)
            found: Stamp | None = None
            with read_errors(path), suppress(FileNotFoundError):
                async with self._storage.open(self._checkpoint_id, file) as reader:
                    found = stamp_of(reader)
            if found != self._stamps[file]:
                raise LoadError(f"{path}: has been replaced since it was opened: open it again")

    async def _read_table(self, file: str, path: str) -> None:
        """Read the table at a file's end, if it has one."""
        nbytes, reader = self._tables.nbytes(file), self._readers[file]
        if not nbytes:
            return
        if nbytes > reader.nbytes:
            raise CorruptError(path, "", f"truncated: {reader.nbytes} bytes, less than its checksum table ({nbytes})")
        table = bytearray(nbytes)
        with read_errors(path):
            await reader.read_into(reader.nbytes - nbytes, [memoryview(table)])
        try:
            self._crcs.update(self._tables.read(file, bytes(table)))
        except ValueError as error:
            raise CorruptError(path, "", str(error)) from error

    async def read_values(self, reads: Sequence[ValueRead], *, decoded: bool) -> dict[int, Any]:
        loaded: dict[int, Any] = {}
        decoder = self._decoder

        def decode(span: ReadSpan, memory: memoryview) -> None:
            for read in span.items:
                start = read.offset - span.start
                data = bytes(memory[start : start + read.nbytes])
                loaded[read.index] = decoder.value(read.fqn, span.file, data, read.crc) if decoded else data

        if self._inline:
            for read in reads:
                if read.file == INLINE:
                    data = self._inline[read.offset]
                    loaded[read.index] = decoder.value(read.fqn, INLINE, data) if decoded else data
            reads = [read for read in reads if read.file != INLINE]
        limit = anyio.Semaphore(self._at_once)

        async def read_span(span: ReadSpan) -> None:
            async with limit:
                memory = memoryview(bytearray(span.stop - span.start))
                await self._readers[span.file].read_into(span.start, [memory])
                # Not in the engine's loop what may call the caller's own code.
                is_short = decoder.weights_only and memory.nbytes <= SHORT_NBYTES and len(span.items) <= SHORT
                await in_thread_if_long(is_short, self._threads.compute, decode, span, memory)

        with single_error():
            async with anyio.create_task_group() as group:
                for span in coalesce_reads(reads, self._gap_nbytes):
                    group.start_soon(read_span, span)
        return loaded

    async def find_stored(self, reads: Sequence[TensorRead]) -> dict[int, StoredTensor]:
        """Find out where in large archives of `torch.save` the elements are, to read a part or a window at a time.

        An archive's directory is at its end, and the headers before the tensor's bytes are at its beginning.

        Returns:
            Of those that are wanted whole, by their id, where the tensor lies.
        """
        found: dict[int, StoredTensor] = {}
        limit = anyio.Semaphore(self._at_once)
        readers = self._readers

        async def look(read: TensorRead) -> None:
            sparse = mmap.mmap(-1, read.nbytes)  # memory is taken for what is touched
            async with limit:
                with memoryview(sparse) as archive:
                    ends = archive[:ENDS_NBYTES], archive[-ENDS_NBYTES:]
                    await readers[read.file].read_into(read.offset, [ends[0]])
                    await readers[read.file].read_into(read.offset + read.nbytes - ENDS_NBYTES, [ends[1]])
                    stored = find_tensor(archive, None)
            if stored is None or stored.start >= ENDS_NBYTES:
                return
            if read.part is None:
                found[id(read)] = stored
            else:
                read_rows(read, stored.dtype, stored.sizes, stored.strides, stored.start, stored.offset)

        async with anyio.create_task_group() as group:
            for read in reads:
                if read.frame is None and read.nbytes >= (SPAN_NBYTES if read.part is None else DIRECT_NBYTES):
                    group.start_soon(look, read)
        return found

    async def read_tensors(
        self,
        plan: ReadPlan,
        stored: dict[int, StoredTensor],
        device_copies: DeviceCopies,
        bar: Bar,
        shared: Sequence[SharedReads] = (),
    ) -> None:
        """Read parts of tensors, and bring each to its place.

        Args:
            plan: what to read.
            stored: of some of them, by id, where in their archive the tensor lies: see `find_stored`.
            device_copies: brings tensors to devices.
            bar: shows how far it has come.
            shared: those of them that other ranks read, too; in one order on all ranks.

        Raises:
            CorruptError: what is stored is not what was saved.
            OSError: storage failed.
        """
        ways = list(self._routes(plan, stored, shared))
        small_spans = list(plan.small.spans(self._gap_nbytes)) if plan.small is not None else []
        decoder = self._decoder
        bar.total(total := sum(each.nbytes for each in ways) + sum(each.stop - each.start for each in small_spans))
        scratch = Scratch(self._threads, min(total, SPAN_NBYTES), pin_for=device_copies.first_device)
        limit = anyio.Semaphore(self._at_once)

        async def read_direct(group: Sequence[TensorRead]) -> None:
            async with limit:
                await self._read_direct(group)
                bar.advance(sum(read.nbytes for read in group))

        async def read_span(span: ReadSpan, fetch: Fetch) -> None:
            async with limit, scratch.take(span.stop - span.start) as arena:
                await fetch(span.file, span.start, arena.tensor[: span.stop - span.start])
                await in_thread(self._threads.compute, scatter, span, arena, decoder, device_copies)
                bar.advance(span.stop - span.start)

        async def read_small(span: SmallSpan) -> None:
            async with limit, scratch.take(span.stop - span.start) as arena:
                await self._readers[span.file].read_into(span.start, [arena.memory[: span.stop - span.start]])
                await span.fill_by(self._threads, arena, decoder, device_copies)
                bar.advance(span.stop - span.start)

        async def read_window(each: LargeRead, number: int, fetch: Fetch) -> None:
            window = each.windows[number]  # begun in order, so the one before is under way
            async with limit, scratch.take(window.nbytes) as arena:
                await fetch(each.read.file, window.start, arena.tensor[: window.nbytes])
                if each.is_compared and number:
                    await each.windows[number - 1].checked.wait()
                await in_thread(self._threads.compute, each.fill, number, arena, decoder, device_copies)
                window.checked.set()
                bar.advance(window.nbytes)

        for way in ways:
            if way.relay is not None:
                await way.relay.compare(way.fetches())
        with single_error():
            async with anyio.create_task_group() as group:
                for small_span in small_spans:
                    group.start_soon(read_small, small_span)
                for way in ways:
                    numbers = count()
                    for direct in way.direct:
                        group.start_soon(read_direct, direct)
                    for span in way.spans:
                        group.start_soon(read_span, span, self._fetch_with(way.relay, next(numbers)))
                    for each in way.large:
                        if not each.is_compared and not each.read.bare:
                            decoder.note_unchecked()
                        for number in range(len(each.windows)):
                            group.start_soon(read_window, each, number, self._fetch_with(way.relay, next(numbers)))

    def _routes(
        self, plan: ReadPlan, stored: dict[int, StoredTensor], shared: Sequence[SharedReads]
    ) -> Iterator[Routes]:
        """Choose ways: what is shared first, so that it goes in one order on all ranks."""
        reads = plan.tensors
        if shared:  # then there are no columns: see `ReadPlan.expand`
            tied = overlapping(reads)
            for each in shared:
                yield Routes.choose(each.reads, stored, self._limits, tied=tied, relay=each.relay)
            apart = {id(read) for each in shared for read in each.reads}
            alone = [read for read in reads if id(read) not in apart]
            yield Routes.choose(alone, stored, self._limits, tied=tied)
        else:
            yield Routes.choose(reads, stored, self._limits, small=plan.small)

    def _fetch_with(self, relay: Relay | None, number: int) -> Fetch:
        """Return what reads bytes into memory: from storage, or from the rank whose turn it is to do that."""

        async def read(file: str, start: int, memory: torch.Tensor) -> None:
            await self._readers[file].read_into(start, [memory_of(memory)])

        async def fetch(file: str, start: int, memory: torch.Tensor) -> None:
            assert relay is not None
            await relay.fetch(number, memory, partial(read, file, start, memory))

        return read if relay is None else fetch

    async def _read_direct(self, group: Sequence[TensorRead]) -> None:
        """Read tensors that lie one after the other straight into their places, and check them."""
        buffers: list[memoryview] = []
        framed: list[tuple[TensorRead, memoryview, memoryview]] = []
        position = group[0].offset
        for read in group:
            assert read.frame is not None
            torch.autograd.graph.increment_version(read.into)
            if read.offset > position:  # what lies between
                buffers.append(memoryview(bytearray(read.offset - position)))
            payload = memory_of(read.into)
            position = read.offset + payload.nbytes
            if not read.bare:
                header = memoryview(bytearray(len(read.frame.header)))
                buffers.append(header)
                framed.append((read, header, payload))
                position += header.nbytes
            buffers.append(payload)
        await self._readers[group[0].file].read_into(group[0].offset, buffers)
        if framed:
            await in_thread(self._threads.compute, self._check_framed, framed)

    def _check_framed(self, framed: Sequence[tuple[TensorRead, memoryview, memoryview]]) -> None:
        for read, header, payload in framed:
            assert read.frame is not None
            self._decoder.framed(read, read.frame.header_crc, header, payload)


Fetch = Callable[[str, int, torch.Tensor], Awaitable[None]]
"""Reads bytes of a file, from an offset, into memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedReads:
    """Reads that several ranks do together.

    Attributes:
        relay: to those ranks.
        reads: the same bytes on all of them.
    """

    relay: Relay
    reads: Sequence[TensorRead]
