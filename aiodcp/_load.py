"""The load flow: metadata, plan, read ranges, check, copy in. Runs on the engine's loop.

Items that lie close together are read as one span into scratch memory, checked, and copied to their places in one
go; a large tensor that is contiguous in host memory is read straight into it.
"""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from typing import Any

import anyio
import torch
from torch.distributed.checkpoint.planner import LoadPlanner

from ._archive import find_tensor
from ._capture import flatten
from ._decode import Check
from ._devices import Crossing
from ._engine import Threads, in_thread
from ._judge import Row
from ._names import METADATA_NAME
from ._planner import commit_loaded, plan_local_load, plan_reads
from ._progress import Bar
from ._ranks import Operation
from ._reads import LoadPlan, TensorRead, ValueRead, plan_load, read_rows
from ._spans import DIRECT_NBYTES, Scratch, Span, copy_in, memory_of, reads_direct, spans_of, without_overlaps
from ._stage import Checksum
from ._wanted import Wanted, find_holders, grow_optimizers
from .errors import (
    ArgumentError,
    CheckpointError,
    CorruptError,
    LoadError,
    NotACheckpointError,
    ReadError,
    StageError,
    one_error,
)
from .metadata import Metadata, gc_held_off, read_metadata
from .storage import Reader, Storage

ENDS_NBYTES = 8 << 10  # of an archive: what torch.save writes before and after one tensor's bytes is 1.5 KiB
READS_AT_ONCE = 3  # one is read, one is checked, one waits


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
        take: Callable[[], Awaitable[Wanted]],
        checkpoint_id: str,
        *,
        strict: bool,
        cast: bool,
        weights_only: bool,
        check_crc: bool,
        shown: Bar,
    ) -> Wanted:
        """Fill the tensors that are wanted, and put the other values into `Wanted.loaded`.

        Args:
            operation: the ranks that load.
            place: a digest of where from, the same on all ranks.
            take: tells what this rank wants. May raise.
            checkpoint_id: the checkpoint.
            strict, cast, weights_only, check_crc: see `Checkpointer.load`.
            shown: is told how many bytes of tensors are read.

        Raises:
            LoadError: see `Checkpointer.load`.

        Cancellation: `operation.cancel()` takes effect when the read under way is done.
        """
        check = Check(
            locate=lambda name: self._storage.locate(checkpoint_id, name),
            crc32=self._checksum if check_crc else None,
            weights_only=weights_only,
        )
        path = self._storage.locate(checkpoint_id, METADATA_NAME)

        async def get_metadata() -> bytes | None:  # one rank asks the file system, not thousands
            if not operation.is_coordinator:
                return b""
            try:
                return await self._get_metadata(checkpoint_id, path)
            except NotACheckpointError:
                return None

        async def get() -> tuple[Wanted, bytes | None]:
            return await take(), await get_metadata()

        (wanted, data), answer = await operation.together(
            "read metadata",
            get,
            facts=lambda got: [got[1] is None, place, got[0].planner is not None],
            decide=_agree_on_start,
        )

        async def plan(data: bytes) -> LoadPlan:
            if wanted.planner is not None:
                return await self._ask_planner(operation, wanted, wanted.planner, data, checkpoint_id, cast=cast)
            plan_here = partial(_plan, data, path, wanted, operation.rank, checkpoint_id, strict=strict, cast=cast)
            return (await operation.together("plan", partial(in_thread, self._threads.compute, plan_here)))[0]

        while True:
            if answer[0]:
                raise NotACheckpointError(checkpoint_id)  # on every rank: who finds none may begin anew
            metadata = await operation.broadcast(data or b"")
            if await self._fill(operation, metadata, plan, wanted, checkpoint_id, check, shown):
                return wanted
            data, answer = await operation.together(
                "read metadata", get_metadata, facts=lambda got: [got is None, 0, 0], decide=_agree_on_start
            )

    async def _fill(
        self,
        operation: Operation,
        data: bytes,
        plan: Callable[[bytes], Awaitable[LoadPlan]],
        wanted: Wanted,
        checkpoint_id: str,
        check: Check,
        shown: Bar,
    ) -> bool:
        """Load what the metadata `data` describes; return False if it has been replaced by another one meanwhile."""
        planned = await plan(data)
        async with AsyncExitStack() as stack:

            async def open_files() -> dict[str, Reader] | None:
                try:
                    return await self._open(stack, checkpoint_id, planned)
                except CorruptError as error:
                    path = self._storage.locate(checkpoint_id, METADATA_NAME)
                    if not isinstance(error.__cause__, FileNotFoundError):
                        raise
                    if await self._get_metadata(checkpoint_id, path) == data:
                        raise
                    return None  # a save has replaced the checkpoint

            readers, answer = await operation.together(
                "open",
                open_files,
                facts=lambda opened: [opened is None],
                decide=lambda table: [any(row[0] for row in table)],
            )
            if answer[0] or readers is None:
                return False

            async def read_values() -> dict[int, Any]:
                with _read_errors(self._storage.locate(checkpoint_id)):
                    return await self._read_values(planned.values, readers, check, decoded=wanted.planner is None)

            async def read_tensors() -> None:
                with _read_errors(self._storage.locate(checkpoint_id)), _memory_errors():
                    await self._narrow(planned.tensors, readers)
                    wanted.crossing.start()
                    await self._read_tensors(planned.tensors, readers, check, wanted.crossing, shown)
                if wanted.planner is not None:
                    await in_thread(self._threads.compute, commit_loaded, wanted.planner, planned, loaded)

            loaded, _ = await operation.together("read values", read_values)  # all of them before the first tensor
            await operation.together("read tensors", read_tensors)
            if wanted.planner is None:
                wanted.loaded = loaded
        return True

    async def _ask_planner(
        self, operation: Operation, wanted: Wanted, planner: LoadPlanner, data: bytes, checkpoint_id: str, *, cast: bool
    ) -> LoadPlan:
        """Plan with the caller's own planner, as DCP does: locally, globally, and locally again."""
        path = self._storage.locate(checkpoint_id, METADATA_NAME)
        coordinator = operation.is_coordinator

        def plan_here() -> tuple[Metadata, bytes]:
            metadata = read_metadata(data, path)
            local = plan_local_load(planner, wanted.states, metadata, is_coordinator=coordinator)
            return metadata, pickle.dumps(local)

        (metadata, message), _ = await operation.together("plan", partial(in_thread, self._threads.compute, plan_here))
        messages = await operation.gather(message)

        async def plan_for_all() -> list[bytes]:
            plans = planner.create_global_plan([pickle.loads(each) for each in messages]) if coordinator else []
            return [pickle.dumps(each) for each in plans]

        parts, _ = await operation.together("plan", plan_for_all)
        mine = pickle.loads(await operation.scatter(parts))

        def find_reads() -> LoadPlan:
            return plan_reads(planner, planner.finish_plan(mine), metadata, checkpoint_id=checkpoint_id, cast=cast)

        return (await operation.together("plan", partial(in_thread, self._threads.compute, find_reads)))[0]

    async def _get_metadata(self, checkpoint_id: str, path: str) -> bytes:
        try:
            with _read_errors(path):
                data = await self._storage.get(checkpoint_id, METADATA_NAME)
        except ReadError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
                raise NotACheckpointError(checkpoint_id) from error.__cause__
            raise
        return data

    async def _open(self, stack: AsyncExitStack, checkpoint_id: str, plan: LoadPlan) -> dict[str, Reader]:
        """Open every file, and check that every item lies within its file."""
        readers: dict[str, Reader] = {}
        reads: list[ValueRead | TensorRead] = [*plan.values, *plan.tensors]
        for read in reads:
            file = read.file
            if file not in readers:
                path = self._storage.locate(checkpoint_id, file)
                try:
                    with _read_errors(path):
                        readers[file] = await stack.enter_async_context(self._storage.open(checkpoint_id, file))
                except ReadError as error:
                    if isinstance(error.__cause__, FileNotFoundError):
                        raise CorruptError(path, read.fqn, "the file is missing") from error.__cause__
                    raise
            if read.offset + read.nbytes > readers[file].nbytes:
                problem = f"the file has {readers[file].nbytes} bytes, the value ends at {read.offset + read.nbytes}"
                raise CorruptError(self._storage.locate(checkpoint_id, file), read.fqn, problem)
            if isinstance(read, TensorRead) and read.frame and not read.bare and read.frame.item_nbytes != read.nbytes:
                problem = f"{read.nbytes} bytes are not {read.dtype} of {tuple(read.sizes)}"
                raise CorruptError(self._storage.locate(checkpoint_id, file), read.fqn, problem)
        return readers

    async def _read_values(
        self, reads: Sequence[ValueRead], readers: Mapping[str, Reader], check: Check, *, decoded: bool
    ) -> dict[int, Any]:
        loaded: dict[int, Any] = {}

        def decode(span: Span, memory: memoryview) -> None:
            for read in span.items:
                start = read.offset - span.start
                data = bytes(memory[start : start + read.nbytes])
                loaded[read.place] = check.value(read.fqn, span.file, data) if decoded else data

        for span in spans_of(reads):
            memory = memoryview(bytearray(span.stop - span.start))
            await readers[span.file].read_into(span.start, [memory])
            await in_thread(self._threads.compute, decode, span, memory)
        return loaded

    async def _narrow(self, reads: Sequence[TensorRead], readers: Mapping[str, Reader]) -> None:
        """Of large archives of `torch.save` of which a part is wanted, find out where its rows are, to read only those.

        An archive's directory is at its end, and the headers before the tensor's bytes are at its beginning.
        """
        limit = anyio.Semaphore(READS_AT_ONCE)

        async def narrow(read: TensorRead) -> None:
            sparse = mmap.mmap(-1, read.nbytes)  # memory is taken for what is touched
            async with limit:
                with memoryview(sparse) as archive:
                    ends = archive[:ENDS_NBYTES], archive[-ENDS_NBYTES:]
                    await readers[read.file].read_into(read.offset, [ends[0]])
                    await readers[read.file].read_into(read.offset + read.nbytes - ENDS_NBYTES, [ends[1]])
                    stored = find_tensor(archive, None)
            if stored is not None and stored.start < ENDS_NBYTES:
                read_rows(read, stored.dtype, stored.sizes, stored.strides, stored.start, stored.offset)

        async with anyio.create_task_group() as group:
            for read in reads:
                if read.frame is None and read.part is not None and read.nbytes >= DIRECT_NBYTES:
                    group.start_soon(narrow, read)

    async def _read_tensors(
        self, reads: Sequence[TensorRead], readers: Mapping[str, Reader], check: Check, crossing: Crossing, shown: Bar
    ) -> None:
        with gc_held_off():
            direct = without_overlaps([read for read in reads if reads_direct(read)], reads)
            apart = set(map(id, direct))
            spans = spans_of([read for read in reads if id(read) not in apart] if apart else reads)
        shown.total(sum(read.nbytes for read in direct) + sum(span.stop - span.start for span in spans))
        scratch = Scratch(pin=bool(crossing))
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

        async def read_span(span: Span) -> None:
            async with limit, scratch.take(span.stop - span.start) as arena:
                memory = arena.memory[: span.stop - span.start]
                await readers[span.file].read_into(span.start, [memory])
                await in_thread(self._threads.compute, copy_in, span, arena, check, crossing)
                shown.advance(span.stop - span.start)

        with one_error():
            async with anyio.create_task_group() as group:
                for read in direct:
                    group.start_soon(read_direct, read)
                for span in spans:
                    group.start_soon(read_span, span)


def _agree_on_start(table: list[Row]) -> list[int]:
    if len({row[1] for row in table}) > 1:
        raise ArgumentError("checkpoint_id", "the ranks load from different places")
    if len({row[2] for row in table}) > 1:
        raise ArgumentError("planner", "some ranks have one, others have not")
    return [any(row[0] for row in table)]


def _plan(data: bytes, path: str, wanted: Wanted, rank: int, checkpoint_id: str, strict: bool, cast: bool) -> LoadPlan:
    with gc_held_off():  # the metadata is gone again when the block ends: the collector never sees it
        try:
            metadata = read_metadata(data, path)
            if wanted.lazy:
                grow_optimizers(metadata, wanted)
                wanted.fqns, wanted.paths, wanted.values = flatten(wanted.states, rank)
            wanted.holders = find_holders(wanted.states, wanted.fqns, wanted.paths, wanted.values)
            planned = plan_load(
                metadata,
                wanted.fqns,
                wanted.paths,
                wanted.values,
                rank=rank,
                checkpoint_id=checkpoint_id,
                strict=strict,
                cast=cast,
            )
            del metadata  # before the collector is let in again
        except CheckpointError:  # ArgumentError is a ValueError
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CorruptError(path, "", f"contradicts itself: {error!r}") from error
        return planned


@contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except StageError as error:
        raise LoadError(f"no memory to read into: {error}") from error


@contextmanager
def _read_errors(path: str) -> Iterator[None]:
    try:
        yield
    except LoadError:
        raise
    except EOFError as error:
        raise CorruptError(path, "", f"ends too soon: {error}") from error
    except OSError as error:
        raise ReadError(path, str(error)) from error
