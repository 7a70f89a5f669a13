"""The load flow: metadata, plan, read ranges, check, copy in. Runs on the engine's loop.

Items that lie close together are read as one span into scratch memory, checked, and copied to their places in one
go; a large tensor that is contiguous in host memory is read straight into it.
"""

from __future__ import annotations

import logging
import mmap
import pickle
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import torch
from torch.distributed.checkpoint.planner import LoadPlanner

from .._distributed.operation import Operation
from .._distributed.votes import Row
from .._engine.device_copies import DeviceCopies
from .._engine.gc_pause import gc_paused
from .._engine.host_memory import memory_of
from .._engine.task_groups import one_error
from .._engine.threads import Threads, in_thread
from .._format.archive_reader import StoredTensor, find_tensor
from .._format.checksum import Checksum
from .._format.dcp import Metadata
from .._format.extension import container_notes
from .._format.item_tables import ItemTables
from .._format.metadata_reader import read_sealed
from .._format.naming import METADATA_NAME
from .._log import SafeLogger
from .._telemetry.progress_bar import Bar
from ..errors import (
    ArgumentError,
    CheckpointError,
    CorruptError,
    LoadError,
    MismatchError,
    NotACheckpointError,
    ReadError,
    StageError,
)
from ..storage.base import Reader, Storage
from ..storage.error_mapping import read_errors
from .chunk_index import ChunkIndex, read_rows
from .coalesce import DIRECT_NBYTES, SPAN_NBYTES, ReadSpan, coalesce_reads, overlapping, reads_direct
from .decode import ItemDecoder
from .find_targets import allocate_optimizers
from .fitting import fill_whole, settle_values
from .large_reads import LargeRead, in_windows
from .metadata import get_metadata
from .name_union import join_marks, pack_marks, unwanted
from .options import Loaded, LoadOptions
from .plan import ReadPlan, TensorRead, ValueRead
from .planner_reads import commit_loaded, plan_local_load, plan_reads
from .planning import plan_load
from .refuse import note_left_out, refuse
from .resolve import Resolution, Resolver, groups_needed, names_wanted
from .scatter import scatter
from .scratch import Scratch
from .stored_names import StoredNames
from .targets import LoadTargets

log = SafeLogger(__name__)


ENDS_NBYTES = 8 << 10  # of an archive: what torch.save writes before and after one tensor's bytes is 1.5 KiB

READS_AT_ONCE = 3  # one is read, one is checked, one waits

REPORTED = 5  # names in one line of the log


class Loader:
    """Reads checkpoints from one storage."""

    def __init__(self, storage: Storage, threads: Threads, *, checksum: Checksum) -> None:
        self._storage = storage
        self._threads = threads
        self._checksum = checksum

    async def load(
        self,
        operation: Operation,
        place: int,
        take: Callable[[], Awaitable[LoadTargets]],
        checkpoint_id: str,
        options: LoadOptions,
        shown: Bar,
    ) -> Loaded:
        """Fill the tensors that are wanted, and read the other values.

        Args:
            operation: the ranks that load.
            place: a digest of where from, the same on all ranks.
            take: tells what this rank wants. May raise.
            checkpoint_id: the checkpoint.
            options: what the caller asked for.
            shown: is told how many bytes of tensors are read.

        Raises:
            LoadError: see `Checkpointer.load`.

        Cancellation: `operation.cancel()` takes effect when the read under way is done.
        """
        path = self._storage.locate(checkpoint_id, METADATA_NAME)

        async def look() -> bytes | None:  # one rank asks the file system, not thousands
            if not operation.is_coordinator:
                return b""
            try:
                return await get_metadata(self._storage, checkpoint_id, path)
            except NotACheckpointError:
                return None

        async def get() -> tuple[LoadTargets, bytes | None]:
            return await take(), await look()

        (targets, data), answer = await operation.together(
            "read metadata",
            get,
            facts=lambda got: [got[1] is None, place, got[0].planner is not None],
            decide=_agree_on_start,
        )
        flow = _LoadFlow(self._storage, self._threads, self._checksum, operation, checkpoint_id, options, shown)
        while True:
            if answer[0]:
                raise NotACheckpointError(checkpoint_id)  # on every rank: who finds none may begin anew
            metadata = await operation.broadcast(data or b"")
            async with AsyncExitStack() as stack:
                loaded = await flow.run(stack, targets.fresh(), metadata)
            if loaded is not None:
                return loaded
            data, answer = await operation.together(  # a save has replaced the checkpoint
                "read metadata", look, facts=lambda got: [got is None, 0, 0], decide=_agree_on_start
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planned:
    """One rank's plan, and what it found out on the way.

    Attributes:
        plan: what is read.
        found: how wanted and stored names compare.
        names: all that is stored, sorted; empty when there are no other ranks.
        marks: which of them this rank wants, and asks for.
    """

    plan: ReadPlan
    found: Resolution
    names: list[str]
    marks: bytes


class _LoadFlow:
    """One load, on one rank."""

    def __init__(
        self,
        storage: Storage,
        threads: Threads,
        checksum: Checksum,
        operation: Operation,
        checkpoint_id: str,
        options: LoadOptions,
        shown: Bar,
    ) -> None:
        self._storage = storage
        self._threads = threads
        self._operation = operation
        self._checkpoint_id = checkpoint_id
        self._options = options
        self._shown = shown
        self._unchecked = False
        self._check = ItemDecoder(
            locate=lambda name: storage.locate(checkpoint_id, name),
            crc32=checksum if options.check_crc else None,
            weights_only=options.weights_only,
            unchecked=self._note_unchecked,
        )
        self._path = storage.locate(checkpoint_id, METADATA_NAME)
        self._readers: dict[str, Reader] = {}
        self._tables: ItemTables | None = None
        self._crcs: dict[str, dict[int, int]] = {}  # by file and offset, of the tables that have been read

    async def run(self, stack: AsyncExitStack, targets: LoadTargets, data: bytes) -> Loaded | None:
        """Load what the metadata `data` describes; return None if it has been replaced by another one meanwhile."""
        self._readers, self._crcs = {}, {}
        operation = self._operation
        if targets.planner is not None:
            planned = _Planned(
                plan=await self._ask_planner(targets, targets.planner, data), found=Resolution(), names=[], marks=b""
            )
        else:
            found = await self._plan(stack, targets, data)
            if found is None:
                return None
            planned = found
        plan = planned.plan

        async def open_files() -> bool:
            return await self._unless_replaced(data, partial(self._open, stack, plan))

        _, answer = await operation.together(
            "open", open_files, facts=lambda opened: [not opened], decide=lambda table: [any(row[0] for row in table)]
        )
        if answer[0]:
            return None

        async def read_values() -> None:
            with read_errors(self._storage.locate(self._checkpoint_id)):
                targets.loaded |= await self._read_values(plan.values, decoded=targets.planner is None)
            if targets.planner is None:
                problems = settle_values(plan, targets, cast=self._options.cast)
                if problems:
                    raise MismatchError(self._checkpoint_id, problems=problems)

        async def read_tensors() -> None:
            device_copies = targets.device_copies
            try:
                with read_errors(self._storage.locate(self._checkpoint_id)), _memory_errors():
                    stored = await self._find_stored(plan.tensors)
                    if device_copies:
                        await in_thread(self._threads.compute, _begin_copies, device_copies)
                    await self._read_tensors(plan.tensors, stored, device_copies)
                await in_thread(self._threads.compute, self._finish, plan, targets)
            finally:
                device_copies.end()

        await operation.together("read values", read_values)  # all of them before the first tensor
        await operation.together("read tensors", read_tensors)
        self._tell(targets)
        return Loaded(targets=targets, absent=planned.found.absent)

    def _finish(self, plan: ReadPlan, targets: LoadTargets) -> None:
        targets.device_copies.enter_thread()
        if targets.planner is not None:
            loaded, targets.loaded = targets.loaded, {}
            commit_loaded(targets.planner, plan, loaded)
        else:
            fill_whole(plan, targets)
            targets.rebuild()
        targets.device_copies.wait_for_thread()

    def _note_unchecked(self) -> None:
        self._unchecked = True

    def _tell(self, targets: LoadTargets) -> None:
        where = self._storage.locate(self._checkpoint_id)
        if self._unchecked:
            log.warning("%s: has values that were saved without checksums: damage of them is not seen", where)
        report = targets.report
        for what, names in (
            ("not in the checkpoint", report.missing),
            ("in the checkpoint only", report.unexpected),
            ("converted", report.converted),
        ):
            if names:
                more = f" and {len(names) - REPORTED} more" if len(names) > REPORTED else ""
                level = logging.INFO if names is report.converted else logging.WARNING
                log.log(level, "%s: %s: %s%s", where, what, ", ".join(names[:REPORTED]), more)

    # --- planning

    async def _plan(self, stack: AsyncExitStack, targets: LoadTargets, data: bytes) -> _Planned | None:
        operation, options = self._operation, self._options
        planned: list[_Planned] = []

        async def plan() -> bool:
            return await self._unless_replaced(data, partial(self._plan_here, stack, targets, data, planned))

        _, answer = await operation.together(
            "plan",
            plan,
            facts=lambda done: [not done, len(planned[0].found.unexpected) if planned else 0],
            decide=lambda table: [any(row[0] for row in table), any(row[1] for row in table)],
        )
        if answer[0]:
            return None
        [mine] = planned
        unexpected: list[str] = mine.found.unexpected
        if answer[1] and operation.size > 1:
            everybodys = await operation.gather(mine.marks)
            joined = await operation.broadcast(join_marks(everybodys) if everybodys else b"")
            unexpected = unwanted(mine.names, joined)

        async def refuse_unexpected() -> None:
            error = refuse(targets, mine.found, self._checkpoint_id, strict=options.strict, unexpected=unexpected)
            if error is not None:
                raise error

        if answer[1]:
            await operation.together("plan", refuse_unexpected)
        note_left_out(targets.report, mine.found, unexpected)
        return mine

    async def _plan_here(
        self, stack: AsyncExitStack, targets: LoadTargets, data: bytes, planned: list[_Planned]
    ) -> None:
        with gc_paused():  # the metadata is gone again when the block ends: the collector never sees it
            metadata, stored, needed = await in_thread(self._threads.compute, self._read_metadata, targets, data)
            values: dict[str, Any] = {}
            if needed:
                values = await self._read_options(stack, metadata, stored, needed)
            planned.append(await in_thread(self._threads.compute, self._find, metadata, stored, targets, values))
            del metadata, stored

    def _read_metadata(self, targets: LoadTargets, data: bytes) -> tuple[Metadata, StoredNames, list[str]]:
        metadata = self._read_sealed(data)
        with self._planning():
            stored = StoredNames(metadata, targets.kinds, self._options.rename)
            return metadata, stored, groups_needed(targets, stored)

    def _read_sealed(self, data: bytes) -> Metadata:
        metadata, seal = read_sealed(data, self._path)
        try:
            self._tables = ItemTables(metadata, seal.tables if self._options.check_crc else ())
        except ValueError as error:
            raise CorruptError(self._path, "", "it names more or fewer files than were written") from error
        return metadata

    def _find(
        self, metadata: Metadata, stored: StoredNames, targets: LoadTargets, values: Mapping[str, Any]
    ) -> _Planned:
        options, operation = self._options, self._operation
        with self._planning():
            notes = container_notes(metadata)
            found = Resolver(targets, stored, notes, values, rank=operation.rank, cast=options.cast).run()
            plan, problems = plan_load(metadata, targets, checkpoint_id=self._checkpoint_id, cast=options.cast)
            found.problems += problems
            # What no rank wants is known when all ranks have been asked; what is wrong without that is told at once.
            alone = operation.size == 1
            unexpected = found.unexpected if alone else ()
            error = refuse(targets, found, self._checkpoint_id, strict=options.strict, unexpected=unexpected)
            if error is not None:
                raise error
            if alone:
                return _Planned(plan=plan, found=found, names=[], marks=b"")
            names = sorted(stored.entries)
            wanted = names_wanted(targets, stored)
            return _Planned(plan=plan, found=found, names=names, marks=pack_marks(names, wanted, stored.is_below))

    @contextmanager
    def _planning(self) -> Iterator[None]:
        """Make one error of what goes wrong in the block: the metadata is sound, so it is no damage."""
        try:
            yield
        except CheckpointError:  # ArgumentError is a ValueError
            raise
        except Exception as error:
            raise LoadError(f"{self._checkpoint_id}: cannot be planned: {error!r}") from error

    async def _read_options(
        self, stack: AsyncExitStack, metadata: Metadata, stored: StoredNames, needed: Sequence[str]
    ) -> dict[str, Any]:
        """Read the options of optimizers, which say what belongs to which parameter."""
        with self._planning():
            pieces = ChunkIndex(metadata, self._checkpoint_id)
            reads = []
            for number, fqn in enumerate(needed):
                info = pieces.find(stored.source(fqn), None)
                reads.append(ValueRead(fqn, number, info.relative_path, info.offset, info.length))
        await self._open(stack, ReadPlan(tensors=[], values=reads))
        with read_errors(self._storage.locate(self._checkpoint_id)):
            values = await self._read_values(reads, decoded=True)
        return {fqn: values[number] for number, fqn in enumerate(needed)}

    async def _unless_replaced(self, data: bytes, function: Callable[[], Awaitable[None]]) -> bool:
        """Do what opens files; return False if one is gone because a save has replaced the checkpoint."""
        try:
            await function()
        except CorruptError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            if await get_metadata(self._storage, self._checkpoint_id, self._path) == data:
                raise
            return False
        return True

    async def _ask_planner(self, targets: LoadTargets, planner: LoadPlanner, data: bytes) -> ReadPlan:
        """Plan with the caller's own planner, as DCP does: locally, globally, and locally again."""
        operation = self._operation
        coordinator = operation.is_coordinator

        def plan_here() -> tuple[Metadata, bytes]:
            with gc_paused():
                metadata = self._read_sealed(data)
            allocate_optimizers(targets, metadata)
            local = plan_local_load(planner, targets.states, metadata, is_coordinator=coordinator)
            return metadata, pickle.dumps(local)

        (metadata, message), _ = await operation.together("plan", partial(in_thread, self._threads.compute, plan_here))
        messages = await operation.gather(message)

        async def plan_for_all() -> list[bytes]:
            plans = planner.create_global_plan([pickle.loads(each) for each in messages]) if coordinator else []
            return [pickle.dumps(each) for each in plans]

        parts, _ = await operation.together("plan", plan_for_all)
        mine = pickle.loads(await operation.scatter(parts))

        def find_reads() -> ReadPlan:
            finished = planner.finish_plan(mine)
            return plan_reads(planner, finished, metadata, checkpoint_id=self._checkpoint_id, cast=self._options.cast)

        return (await operation.together("plan", partial(in_thread, self._threads.compute, find_reads)))[0]

    # --- reading

    async def _open(self, stack: AsyncExitStack, plan: ReadPlan) -> None:
        """Open every file, and check that every item lies within its file."""
        readers = self._readers
        reads: list[ValueRead | TensorRead] = [*plan.values, *plan.tensors]
        for read in reads:
            file = read.file
            if file not in readers:
                path = self._storage.locate(self._checkpoint_id, file)
                try:
                    with read_errors(path):
                        readers[file] = await stack.enter_async_context(self._storage.open(self._checkpoint_id, file))
                except ReadError as error:
                    if isinstance(error.__cause__, FileNotFoundError):
                        raise CorruptError(path, read.fqn, "the file is missing") from error.__cause__
                    raise
                await self._read_table(file, path)
            if read.offset + read.nbytes > readers[file].nbytes:
                problem = f"the file has {readers[file].nbytes} bytes, the value ends at {read.offset + read.nbytes}"
                raise CorruptError(self._storage.locate(self._checkpoint_id, file), read.fqn, problem)
            if isinstance(read, TensorRead) and read.frame and not read.bare and read.frame.item_nbytes != read.nbytes:
                problem = f"{read.nbytes} bytes are not {read.dtype} of {tuple(read.sizes)}"
                raise CorruptError(self._storage.locate(self._checkpoint_id, file), read.fqn, problem)
            if isinstance(read, ValueRead) or not read.bare:
                read.crc = self._crcs[file].get(read.offset)

    async def _read_table(self, file: str, path: str) -> None:
        """Read the table at a file's end, if it has one."""
        self._crcs[file] = {}
        assert self._tables is not None
        nbytes, reader = self._tables.nbytes(file), self._readers[file]
        if not nbytes:
            return
        if nbytes > reader.nbytes:
            raise CorruptError(path, "", f"the file has {reader.nbytes} bytes, the table at its end {nbytes}")
        table = bytearray(nbytes)
        with read_errors(path):
            await reader.read_into(reader.nbytes - nbytes, [memoryview(table)])
        try:
            self._crcs[file] = self._tables.read(file, bytes(table))
        except ValueError as error:
            raise CorruptError(path, "", str(error)) from error

    async def _read_values(self, reads: Sequence[ValueRead], *, decoded: bool) -> dict[int, Any]:
        loaded: dict[int, Any] = {}
        check = self._check

        def decode(span: ReadSpan, memory: memoryview) -> None:
            for read in span.items:
                start = read.offset - span.start
                data = bytes(memory[start : start + read.nbytes])
                loaded[read.place] = check.value(read.fqn, span.file, data, read.crc) if decoded else data

        for span in coalesce_reads(reads):
            memory = memoryview(bytearray(span.stop - span.start))
            await self._readers[span.file].read_into(span.start, [memory])
            await in_thread(self._threads.compute, decode, span, memory)
        return loaded

    async def _find_stored(self, reads: Sequence[TensorRead]) -> dict[int, StoredTensor]:
        """Find out where in large archives of `torch.save` the elements are, to read a part or a window at a time.

        An archive's directory is at its end, and the headers before the tensor's bytes are at its beginning.

        Returns:
            Of those that are wanted whole, by their number, where the tensor lies.
        """
        found: dict[int, StoredTensor] = {}
        limit = anyio.Semaphore(READS_AT_ONCE)
        readers = self._readers

        async def look(number: int, read: TensorRead) -> None:
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
                found[number] = stored
            else:
                read_rows(read, stored.dtype, stored.sizes, stored.strides, stored.start, stored.offset)

        async with anyio.create_task_group() as group:
            for number, read in enumerate(reads):
                if read.frame is None and read.nbytes >= (SPAN_NBYTES if read.part is None else DIRECT_NBYTES):
                    group.start_soon(look, number, read)
        return found

    async def _read_tensors(
        self, reads: Sequence[TensorRead], stored: dict[int, StoredTensor], device_copies: DeviceCopies
    ) -> None:
        readers, check, shown = self._readers, self._check, self._shown
        with gc_paused():
            large_or_direct = [read for read in reads if read.nbytes > SPAN_NBYTES or reads_direct(read)]
            tied = overlapping(reads) if large_or_direct else set()
            direct = [read for read in large_or_direct if reads_direct(read) and id(read) not in tied]
            apart = set(map(id, direct))
            large = [
                found
                for number, read in enumerate(reads)
                if read.nbytes > SPAN_NBYTES
                and id(read) not in apart
                and id(read) not in tied
                and (found := in_windows(read, stored.get(number))) is not None
            ]
            apart |= {id(each.read) for each in large}
            spans = coalesce_reads([read for read in reads if id(read) not in apart] if apart else reads)
        shown.total(
            sum(read.nbytes for read in direct)
            + sum(span.stop - span.start for span in spans)
            + sum(window.nbytes for each in large for window in each.windows)
        )
        scratch = Scratch(self._threads, pin_for=device_copies.first_device)
        limit = anyio.Semaphore(READS_AT_ONCE)

        async def read_direct(read: TensorRead) -> None:
            assert read.frame is not None
            async with limit:
                payload = memory_of(read.into)
                if read.bare:
                    torch.autograd.graph.increment_version(read.into)
                    await readers[read.file].read_into(read.offset, [payload])
                    shown.advance(read.nbytes)
                    return
                head = memoryview(bytearray(len(read.frame.head)))
                torch.autograd.graph.increment_version(read.into)
                await readers[read.file].read_into(read.offset, [head, payload])
                await in_thread(self._threads.compute, check.framed, read, read.frame.head_crc, head, payload)
                shown.advance(read.nbytes)

        async def read_span(span: ReadSpan) -> None:
            async with limit, scratch.take(span.stop - span.start) as arena:
                memory = arena.memory[: span.stop - span.start]
                await readers[span.file].read_into(span.start, [memory])
                await in_thread(self._threads.compute, scatter, span, arena, check, device_copies)
                shown.advance(span.stop - span.start)

        async def read_window(each: LargeRead, number: int) -> None:  # begun in order, so the one before is under way
            window = each.windows[number]
            async with limit, scratch.take(window.nbytes) as arena:
                await readers[each.read.file].read_into(window.start, [arena.memory[: window.nbytes]])
                if each.is_compared and number:
                    await each.windows[number - 1].checked.wait()
                await in_thread(self._threads.compute, each.fill, number, arena, check, device_copies)
                window.checked.set()
                shown.advance(window.nbytes)

        with one_error():
            async with anyio.create_task_group() as group:
                for read in direct:
                    group.start_soon(read_direct, read)
                for span in spans:
                    group.start_soon(read_span, span)
                for each in large:
                    if not each.is_compared and not each.read.bare:
                        self._note_unchecked()
                    for number in range(len(each.windows)):
                        group.start_soon(read_window, each, number)


def _begin_copies(device_copies: DeviceCopies) -> None:
    device_copies.start()
    device_copies.wait_for_marks()  # a copy that the caller queued may be on its way to a host tensor
    device_copies.wait_for_thread()  # and planning may have made tensors in memory that was in use


def _agree_on_start(table: list[Row]) -> list[int]:
    if len({row[1] for row in table}) > 1:
        raise ArgumentError("checkpoint_id", "the ranks load from different places")
    if len({row[2] for row in table}) > 1:
        raise ArgumentError("planner", "some ranks have one, others have not")
    return [any(row[0] for row in table)]


@contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except StageError as error:
        raise LoadError(f"no memory to read into: {error}") from error
