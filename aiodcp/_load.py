"""The load flow: metadata, plan, read ranges, check, copy in. Runs on the engine's loop.

Items that lie close together are read as one span into scratch memory, checked, and copied to their places in one
go; a large tensor that is contiguous in host memory is read straight into it.
"""

from __future__ import annotations

import ctypes
import mmap
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from operator import attrgetter
from typing import Any

import anyio
import torch
from torch.distributed.checkpoint.planner import LoadPlanner
from torch.distributed.tensor import DTensor

from ._archive import find_tensor
from ._arena import Arena
from ._capture import Path, PerRank, flatten
from ._decode import Check, unpack
from ._engine import Threads, first_error, in_thread
from ._layout import ALIGNMENT, NOT_COPIED, copyable
from ._plan import LoadPlan, TensorRead, ValueRead, cut, plan_load, read_rows
from ._planner import commit_loaded, plan_local_load, plan_reads
from ._ranks import Operation, Row
from ._stage import Checksum, wait_for_marks
from .errors import ArgumentError, CheckpointError, CorruptError, LoadError, NotACheckpointError, ReadError, StageError
from .metadata import METADATA_NAME, Metadata, TensorStorageMetadata, gc_held_off, read_metadata
from .storage import Reader, Storage

SPAN_NBYTES = 16 << 20  # bytes read in one go: as in saving, enough that the turn at the GIL after it does not count
GAP_NBYTES = 64 << 10  # bytes read for nothing rather than asked for apart: 30 us at 2 GB/s, the price of a request
DIRECT_NBYTES = 1 << 20  # bytes from which a tensor is read straight into its place
ENDS_NBYTES = 8 << 10  # of an archive: what torch.save writes before and after one tensor's bytes is 1.5 KiB
READS_AT_ONCE = 3  # one is read, one is checked, one waits


@dataclass(slots=True, kw_only=True)
class _Span:
    """Neighbouring items of one file, read together: bytes `start` to `stop`."""

    file: str
    start: int
    stop: int
    items: list[Any]


@dataclass(slots=True, kw_only=True)
class Wanted:
    """What a load is to fill: the leaves of a state dict.

    Attributes:
        states: the state dict, `Stateful` values replaced by their state.
        lazy: optimizers that have no state yet, by their key.
        fqns, paths, values: the leaves, in step.
        marks: tensors on CUDA devices are written when the device has come as far as these.
        holders: of each leaf that is no tensor, by place, the container that holds it, and its key there.
        loaded: new values of those leaves, by place.
        planner: the caller's own, which puts everything into `states` itself.
    """

    states: dict[str, Any]
    lazy: dict[str, torch.optim.Optimizer]
    fqns: list[str]
    paths: list[Path]
    values: list[Any]
    marks: list[torch.cuda.Event]
    holders: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    loaded: dict[int, Any] = field(default_factory=dict)
    planner: LoadPlanner | None = None


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
    ) -> Wanted:
        """Fill the tensors that are wanted, and put the other values into `Wanted.loaded`.

        Args:
            operation: the ranks that load.
            place: a digest of where from, the same on all ranks.
            take: tells what this rank wants. May raise.
            checkpoint_id: the checkpoint.
            strict, cast, weights_only, check_crc: see `Checkpointer.load`.

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
            "read metadata", get, facts=lambda got: [got[1] is None, place], decide=_agree_on_start
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
            if await self._fill(operation, metadata, plan, wanted, checkpoint_id, check):
                return wanted
            data, answer = await operation.together(
                "read metadata", get_metadata, facts=lambda got: [got is None, 0], decide=_agree_on_start
            )

    async def _fill(
        self,
        operation: Operation,
        data: bytes,
        plan: Callable[[bytes], Awaitable[LoadPlan]],
        wanted: Wanted,
        checkpoint_id: str,
        check: Check,
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

            async def read() -> None:
                with _read_errors(self._storage.locate(checkpoint_id)), _memory_errors():
                    loaded = await self._read_values(planned.values, readers, check, decoded=wanted.planner is None)
                    await self._narrow(planned.tensors, readers)
                    await in_thread(self._threads.compute, wait_for_marks, wanted.marks)
                    await self._read_tensors(planned.tensors, readers, check)
                if wanted.planner is None:
                    wanted.loaded = loaded
                else:
                    await in_thread(self._threads.compute, commit_loaded, wanted.planner, planned, loaded)

            await operation.together("read", read)
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

        def decode(span: _Span, memory: memoryview) -> None:
            for read in span.items:
                start = read.offset - span.start
                data = bytes(memory[start : start + read.nbytes])
                loaded[read.place] = check.value(read.fqn, span.file, data) if decoded else data

        for span in _spans(reads):
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

    async def _read_tensors(self, reads: Sequence[TensorRead], readers: Mapping[str, Reader], check: Check) -> None:
        with gc_held_off():
            direct = _without_overlaps([read for read in reads if _reads_direct(read)], reads)
            apart = set(map(id, direct))
            spans = _spans([read for read in reads if id(read) not in apart] if apart else reads)
        scratch = _Scratch()
        limit = anyio.Semaphore(READS_AT_ONCE)

        async def read_direct(read: TensorRead) -> None:
            assert read.frame is not None
            async with limit:
                payload = _memory_of(read.into)
                if read.bare:
                    torch.autograd.graph.increment_version(read.into)
                    await readers[read.file].read_into(read.offset, [payload])
                    return
                head = memoryview(bytearray(len(read.frame.head)))
                torch.autograd.graph.increment_version(read.into)
                await readers[read.file].read_into(read.offset, [head, payload])
                await in_thread(self._threads.compute, check.framed, read, read.frame.head_crc, head, payload)

        async def read_span(span: _Span) -> None:
            async with limit, scratch.take(span.stop - span.start) as arena:
                memory = arena.memory[: span.stop - span.start]
                await readers[span.file].read_into(span.start, [memory])
                await in_thread(self._threads.compute, _copy_in, span, arena, check)

        try:
            async with anyio.create_task_group() as group:
                for read in direct:
                    group.start_soon(read_direct, read)
                for span in spans:
                    group.start_soon(read_span, span)
        except BaseExceptionGroup as errors:
            first = first_error(errors)
            raise first from first.__cause__


class _Scratch:
    """Memory for spans, used again and again within one load: memory that was touched before is quicker."""

    def __init__(self) -> None:
        self._free: list[Arena] = []

    @asynccontextmanager
    async def take(self, nbytes: int) -> AsyncIterator[Arena]:
        large_enough = [arena for arena in self._free if arena.nbytes >= nbytes]
        if large_enough:
            arena = min(large_enough, key=attrgetter("nbytes"))
            self._free.remove(arena)
        else:
            self._free.clear()  # too small: not kept beside the larger one
            arena = Arena(max(nbytes, SPAN_NBYTES))
        try:
            yield arena
        finally:
            self._free.append(arena)


def _agree_on_start(table: list[Row]) -> list[int]:
    if len({row[1] for row in table}) > 1:
        raise ArgumentError("checkpoint_id", "the ranks load from different places")
    return [any(row[0] for row in table)]


def _plan(data: bytes, path: str, wanted: Wanted, rank: int, checkpoint_id: str, strict: bool, cast: bool) -> LoadPlan:
    with gc_held_off():  # the metadata is gone again when the block ends: the collector never sees it
        try:
            metadata = read_metadata(data, path)
            if wanted.lazy:
                _grow_optimizers(metadata, wanted)
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
        except CheckpointError:  # ArgumentError is a ValueError
            raise
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise CorruptError(path, "", f"contradicts itself: {error!r}") from error
        return planned


def _grow_optimizers(metadata: Metadata, wanted: Wanted) -> None:
    """Put into optimizer states that are still empty a place for everything that the checkpoint has for them."""
    for fqn, steps in (metadata.planner_data or {}).items():
        entry = metadata.state_dict_metadata.get(fqn)
        if entry and len(steps) == 4 and steps[0] in wanted.lazy and steps[1] == "state" and str(steps[2]).isdecimal():
            number = int(steps[2])  # of the parameter
            room: torch.Tensor | None = None
            if isinstance(entry, TensorStorageMetadata):
                groups = wanted.lazy[steps[0]].param_groups
                parameter = next(islice((each for group in groups for each in group["params"]), number, None), None)
                if isinstance(parameter, DTensor) and parameter.shape == entry.size:  # sharded as its parameter is
                    room = torch.zeros_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
                else:
                    room = torch.empty(entry.size, dtype=entry.properties.dtype)
            wanted.states[steps[0]]["state"].setdefault(number, {})[steps[3]] = room


def _copy_in(span: _Span, arena: Arena, check: Check) -> None:
    """Check the items of a span that has been read into `arena`, and copy them to their targets."""
    memory = arena.memory
    typed: dict[torch.dtype, torch.Tensor] = {}
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []

    def as_typed(dtype: torch.dtype) -> torch.Tensor:
        if dtype not in typed:
            typed[dtype] = arena.tensor[: arena.nbytes // dtype.itemsize * dtype.itemsize].view(dtype)
        return typed[dtype]

    with gc_held_off():
        for read in span.items:
            frame, dtype, into = read.frame, read.dtype, read.into
            offset = read.offset - span.start
            if frame is None:
                tensor = unpack(read, arena, offset, check)
            elif read.bare:
                assert read.part is not None
                rows, place = as_typed(dtype), offset // dtype.itemsize
                if offset % dtype.itemsize:  # in files of DCP's, where items begin anywhere
                    rows, place = arena.tensor[offset : offset + read.nbytes].clone().view(dtype), 0
                tensor = rows.as_strided(read.part[1], frame.strides, place)
            else:
                start = offset + len(frame.head)
                check.framed(read, frame.head_crc + offset, memory, memory[start : start + frame.nbytes])
                tensor = as_typed(dtype).as_strided(frame.shape, frame.strides, start // dtype.itemsize)
            if read.part is not None and not read.bare:
                tensor = cut(tensor, read.part)
            if dtype in NOT_COPIED:
                tensor, into = copyable(tensor), copyable(into)
            sources.append(tensor)
            targets.append(into)
    with torch.no_grad():
        torch._foreach_copy_(targets, sources)
    for device in {target.device for target in targets if target.is_cuda}:
        torch.cuda.current_stream(device).synchronize()  # before the memory is used again, and before the caller looks


def _reads_direct(read: TensorRead) -> bool:
    return (
        read.frame is not None
        and read.nbytes >= DIRECT_NBYTES
        and (read.part is None or (read.bare and read.nbytes == read.into.nbytes))
        and read.into.dtype is read.dtype
        and read.into.is_cpu
        and read.into.is_contiguous()
        and not read.into.is_neg()
        and not read.into.is_conj()
    )


def _is_in_memory(tensor: torch.Tensor) -> bool:
    return tensor.is_cpu and tensor.layout is torch.strided


def _without_overlaps(direct: list[TensorRead], reads: Sequence[TensorRead]) -> list[TensorRead]:
    """Return those whose memory no other read writes: tied tensors are checked elsewhere before they are copied."""
    if not direct:
        return []
    ranges = sorted((read.into.data_ptr(), number) for number, read in enumerate(reads) if _is_in_memory(read.into))
    tied: set[int] = set()
    stop, last = 0, -1
    for start, number in ranges:
        if start < stop:
            tied |= {number, last}
        into = reads[number].into
        steps = sum((size - 1) * stride for size, stride in zip(into.shape, into.stride(), strict=True))
        end = start + into.itemsize * (1 + steps)
        if end > stop:
            stop, last = end, number
    apart = {id(reads[number]) for number in tied}
    return [read for read in direct if id(read) not in apart]


def _memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous host tensor; valid as long as the tensor is."""
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def _spans(reads: Iterable[Any]) -> list[_Span]:
    """Group reads that lie close together in one file."""
    spans: list[_Span] = []
    for read in sorted(reads, key=attrgetter("file", "offset")):
        start, stop = read.offset // ALIGNMENT * ALIGNMENT, read.offset + read.nbytes
        if spans:
            last = spans[-1]
            if (
                read.file == last.file
                and start <= last.stop + GAP_NBYTES
                and max(stop, last.stop) - last.start <= SPAN_NBYTES
            ):
                last.stop = max(stop, last.stop)
                last.items.append(read)
                continue
        spans.append(_Span(file=read.file, start=start, stop=stop, items=[read]))
    return spans


def find_holders(
    state_dict: Mapping[str, Any], fqns: Sequence[str], paths: Sequence[Path], values: Sequence[Any]
) -> dict[int, tuple[Any, Any]]:
    """Return for every value that will be replaced, by its place, the container that holds it and its key there.

    Raises:
        ArgumentError: names a value in a container that takes no other.
    """
    keys: dict[int, dict[str, Any]] = {}  # of mappings whose keys are no strings: paths have them as text, as in DCP
    holders: dict[int, tuple[Any, Any]] = {}
    for number, (fqn, path, value) in enumerate(zip(fqns, paths, values, strict=True)):
        if isinstance(value, torch.Tensor):
            continue
        holder: Any = None
        key: Any = None
        below: Any = state_dict
        for step in path:
            holder, key = below, step
            if isinstance(holder, PerRank):
                key = "value"
                below = holder.value
                continue
            if isinstance(holder, Mapping) and step not in holder:
                if id(holder) not in keys:
                    keys[id(holder)] = {str(each): each for each in holder}
                key = keys[id(holder)][str(step)]
            below = holder[key]
        if not isinstance(holder, MutableMapping | list | PerRank):
            raise ArgumentError("state_dict", f"{fqn} is in a {type(holder).__name__}, which takes no new value")
        holders[number] = holder, key
    return holders


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
