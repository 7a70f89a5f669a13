"""One rank's part of a save, staged, checksummed and written: each stretch of the file as soon as it can be.

While one stretch is written the next is checksummed and the one after it staged. Where host memory holds the whole
file they are the layout's segments, and `staged` is reached when the last is copied; else they are windows, which wait
for their turn in it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import torch
from anyio import Event

from .._engine.broadcast import Signal
from .._engine.gil_fairness import AT_ONCE as TENSORS_AT_ONCE
from .._engine.task_groups import single_error
from .._engine.threads import SHORT_NBYTES, Threads, in_thread, in_thread_if_long
from .._format.checksum import Checksum
from ..errors import CaptureError, CheckpointError, StageError, WriteError
from ..storage.base import Writer
from ..storage.error_mapping import write_errors
from ..storage.retry import RetryingStorage
from .bounded_staging import BoundedStaging, FileRange
from .comparison import Comparison
from .cutting import captured_cuts
from .manifest import names_of
from .piece_writes import PieceWriter
from .plan import WritePlan
from .request import SaveJob
from .snapshot_source import SnapshotSource
from .staging import Staging, staging_nbytes
from .tail import Tail

TAIL_SLACK = 64 << 10  # bytes kept free for frozen values to grow in, before the arena must be made anew

# The part of the file whose writing may begin while the rest is still staged. Writing takes memory bandwidth and
# cores from the copy that the caller waits for, and without a head start the disk has nothing to do meanwhile.
# Measured interleaved, 1 GiB on two cores, staged as a ratio to a bare copy, durable to a bare write: a quarter 1.19
# and 1.12, a third 1.21 and 1.01, a half 1.30 and 1.02.
HEAD_START = 1 / 3

AT_ONCE = 2  # one is written while the next is checksummed: one O_DIRECT write fills a disk

StagingBuffer = Staging | BoundedStaging


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """One save's way through the pipeline.

    Attributes:
        job: the save.
        plan: what of it this rank writes.
        tail: what lies behind the tensors.
        file: its name.
        admitted: set when it may be written.
        comparing: what else reads the tensors.
    """

    job: SaveJob
    plan: WritePlan
    tail: Tail
    file: str
    admitted: Event
    comparing: _Comparing


class WritePipeline:
    """The host memory of one `Checkpointer`, kept from save to save, and the way of a save through it."""

    def __init__(
        self,
        storage: RetryingStorage,
        threads: Threads,
        *,
        keep_buffers: bool,
        max_host_nbytes: int | None,
        checksum: Checksum,
        spare_buffer: bool = False,
    ) -> None:
        self._storage = storage
        self._threads = threads
        self._keep_buffers = keep_buffers
        self._max_host_nbytes = max_host_nbytes
        self._checksum = checksum
        self._spare_buffer = spare_buffer
        self._buffer: tuple[WritePlan, StagingBuffer] | None = None
        self._source: SnapshotSource | None = None  # of the save that is in the buffer
        self._is_lost = False  # a device may still write into it
        self._turns = anyio.Semaphore(AT_ONCE)

    async def take_memory(self, plan: WritePlan, tail_nbytes: int, *, pin_for: torch.device | None) -> StagingBuffer:
        """Have host memory for a plan's file, with a tail of frozen values of so many bytes; pinned for a device.

        What was staged in it before is gone, when those who read that have ended.

        Raises:
            StageError: there is not enough of it.
        """
        if self._source is not None:
            if not await self._source.take_back(waits=not self._spare_buffer):
                self._buffer = None  # who reads it has it
            self._source = None
        if (
            self._buffer is None
            or self._buffer[0] is not plan
            or not self._buffer[1].holds(tail_nbytes)
            or self._is_lost
        ):
            self._buffer = None  # first give back the memory of the old one
            self._buffer = plan, await in_thread(self._threads.staging, self._take_memory, plan, tail_nbytes)
            self._is_lost = False
        buffer = self._buffer[1]
        if pin_for is not None:
            await in_thread(self._threads.staging, buffer.arena.pin, pin_for, buffer.borders)
        return buffer

    def _take_memory(self, plan: WritePlan, tail_nbytes: int) -> StagingBuffer:
        layout, with_slack = plan.share.layout, 2 * tail_nbytes + TAIL_SLACK
        if self._max_host_nbytes is not None and staging_nbytes(layout, with_slack) > self._max_host_nbytes:
            return BoundedStaging(layout, plan.staged, self._max_host_nbytes)
        return Staging(layout, plan.staged, with_slack)

    def finish(self) -> None:
        """Give the memory back, unless it is to be kept."""
        if not self._keep_buffers:
            self.close()

    def close(self) -> None:
        """Give the memory back."""
        self._buffer = None
        if self._source is not None:
            self._source.let_go()
            self._source = None

    async def run(
        self,
        job: SaveJob,
        plan: WritePlan,
        buffer: StagingBuffer,
        tail: Tail,
        file: str,
        admitted: Event,
        *,
        seed: int | None = None,
    ) -> tuple[int, int]:
        """Stage, checksum and write everything into a durable file.

        Args:
            job: the save.
            plan: what of it this rank writes.
            buffer: host memory for that.
            tail: what lies behind the tensors.
            file: its name.
            admitted: set when it may be written.
            seed: for the comparison with other ranks, if they are to be compared.

        Returns:
            The digest for that, and the CRC32 of the file's table.

        Raises:
            SaveError: that failed; the file is not there.

        Cancellation: takes effect after the copy or write under way.
        """
        job.log.report("stage", total=plan.share.layout.tail + tail.nbytes)
        if isinstance(buffer, Staging):
            self._source = job.source
            job.source.offer(plan, buffer)
        else:
            job.source.refuse("this save goes through bounded memory (max_host_bytes), which never has all of it")
        job.captured.values.extend(captured_cuts(job.captured.values, plan.cuts))
        table_crc = 0
        comparing = _Comparing(job, plan.comparison, seed)
        run = _Run(job=job, plan=plan, tail=tail, file=file, admitted=admitted, comparing=comparing)
        try:
            with single_error():
                async with anyio.create_task_group() as group:
                    group.start_soon(comparing.run, self._threads)
                    if not tail.items:  # all that this rank holds is written by others
                        await in_thread(self._threads.staging, comparing.wait)
                        job.check_torn()
                        job.log.report("write")
                        job.release_tensors()
                        await admitted.wait()
                    elif isinstance(buffer, Staging):
                        way = self._run_pieces if plan.share.layout.in_pieces else self._run_whole
                        table_crc = await way(run, buffer)
                    else:
                        await admitted.wait()
                        bounded_way = self._run_piece_windows if plan.share.layout.in_pieces else self._run_windows
                        table_crc = await bounded_way(run, buffer)
        finally:
            job.device_copies.end()
        return comparing.digest, table_crc

    # --- the whole file in memory

    async def _run_whole(self, run: _Run, staging: Staging) -> int:
        job, tail = run.job, run.tail
        crcs: list[list[int]] = [[] for _ in staging.layout.segments]
        table_crc = 0
        ready = [Signal() for _ in staging.layout.segments]
        staged = Signal()

        async def write_file() -> None:  # anew, if need be: the bytes are there
            nonlocal table_crc
            before = job.log.latest.bytes_written
            try:
                with single_error(), self._write_errors(job, run.file):
                    async with self._storage.create(job.checkpoint_id, run.file) as writer:
                        async with anyio.create_task_group() as writing:
                            for number, event in enumerate(ready):
                                writing.start_soon(self._write_segment, job, staging, number, event, writer, crcs)
                        await staged.wait()
                        rendered, table_crc = tail.render([crc for each in crcs for crc in each])
                        staging.put_tail(rendered)
                        await self._write(job, writer, *staging.tail_range(len(rendered)))
            except WriteError:
                job.log.report(written=before - job.log.latest.bytes_written)
                raise

        async with anyio.create_task_group() as group:
            group.start_soon(self._stage_all, run, staging, ready, staged)
            await run.admitted.wait()
            await self._storage.retrying(write_file, job.checkpoint_id, run.file)
        return table_crc

    async def _run_pieces(self, run: _Run, staging: Staging) -> int:
        job, tail = run.job, run.tail
        layout = staging.layout
        crcs: list[list[int]] = [[] for _ in layout.segments]
        checksummed = [Event() for _ in layout.segments]
        ready, staged = [Signal() for _ in layout.segments], Signal()
        table_crc = 0

        async def complete(number: int) -> memoryview:
            nonlocal table_crc
            if layout.segments:
                crcs[number] = await self._checksum_segment(job, staging, number)
                checksummed[number].set()
            if number < layout.pieces:
                return staging.file_range(number)[1]
            for event in checksummed:
                await event.wait()
            rendered, table_crc = tail.render([crc for each in crcs for crc in each])
            staging.put_tail(rendered)
            return staging.arena.memory[layout.last_piece : layout.tail + len(rendered)]

        async with anyio.create_task_group() as group:
            group.start_soon(self._stage_all, run, staging, ready, staged)
            await run.admitted.wait()
            writer = PieceWriter(self._storage, job, names_of(run.file, layout))
            group.start_soon(writer.write_staged, [*ready[:-1], staged], complete)
        return table_crc

    async def _stage_all(self, run: _Run, staging: Staging, ready: Sequence[Signal], staged: Signal) -> None:
        job = run.job
        stop = threading.Event()

        def arrive(number: int, began_s: float) -> None:
            job.timeline.add("stage", began_s)
            segment = staging.layout.segments[number]
            job.log.report(staged=segment.stop - segment.start)
            if staging.layout.in_pieces or segment.stop <= HEAD_START * staging.layout.tail:
                ready[number].set()

        def copy() -> None:
            with self._copying(job, run.plan, staging):
                queued: list[tuple[int, float, list[torch.Event]]] = []
                for number in range(len(ready)):
                    if stop.is_set():
                        return
                    began_s = time.perf_counter()
                    with _copy_errors(staging.layout.tail):
                        events = staging.copy(number, job.captured.values, job.device_copies)
                    if events:
                        queued.append((number, began_s, events))
                    else:
                        arrive(number, began_s)
                run.comparing.wait()
                job.check_torn()
                job.queued.reach()
                for number, began_s, events in queued:
                    with _copy_errors(staging.layout.tail):
                        job.device_copies.wait_for(events)
                    arrive(number, began_s)
                job.log.report("write", staged=run.tail.nbytes)
                if queued:
                    job.check_torn()
                job.staged.reach()

        async def stop_when_cancelled() -> None:
            try:
                await anyio.sleep_forever()
            finally:
                stop.set()

        async with anyio.create_task_group() as group:
            group.start_soon(stop_when_cancelled)
            await in_thread(self._threads.staging, copy)
            group.cancel_scope.cancel()
        job.forget_tensors()
        for event in (*ready, staged):
            event.set()

    async def _write_segment(
        self, job: SaveJob, staging: Staging, number: int, ready: Signal, writer: Writer, crcs: list[list[int]]
    ) -> None:
        await ready.wait()
        async with self._turns:
            crcs[number] = await self._checksum_segment(job, staging, number)
            await self._write(job, writer, *staging.file_range(number))

    async def _checksum_segment(self, job: SaveJob, staging: Staging, number: int) -> list[int]:
        with job.timeline.record("checksum"):
            segment = staging.layout.segments[number]
            is_short = segment.stop - segment.start <= SHORT_NBYTES
            return await in_thread_if_long(is_short, self._threads.compute, staging.checksum, number, self._checksum)

    # --- a part of it at a time

    async def _run_windows(self, run: _Run, bounded: BoundedStaging) -> int:
        job, file = run.job, run.file
        free = [Event() for _ in range(bounded.slots)]
        for event in free:
            event.set()
        with self._write_errors(job, file):
            async with self._storage.create(job.checkpoint_id, file) as writer:
                async with anyio.create_task_group() as writing:

                    async def write(number: int, ranges: Sequence[FileRange]) -> None:
                        async with self._turns:
                            for offset, data in ranges:
                                write_one = partial(self._write, job, writer, offset, data)
                                await self._storage.retrying(write_one, job.checkpoint_id, file)
                        if number < len(bounded):
                            bounded.release(number)
                        free[number % bounded.slots].set()

                    async def take_slot(number: int) -> None:
                        await free[number % bounded.slots].wait()
                        free[number % bounded.slots] = Event()

                    for number in range(len(bounded)):
                        await take_slot(number)
                        ranges = await in_thread(self._threads.staging, self._fill, run, bounded, number)
                        writing.start_soon(write, number, ranges)
                    job.log.report("write")
                    job.release_tensors()
                    rendered, table_crc = run.tail.render(bounded.crcs)
                    for start in range(0, len(rendered), bounded.slot_nbytes):
                        number = len(bounded) + start // bounded.slot_nbytes
                        await take_slot(number)
                        piece = rendered[start : start + bounded.slot_nbytes]
                        memory = await in_thread(self._threads.staging, bounded.put, number, piece)
                        job.log.report(staged=len(memory))
                        writing.start_soon(write, number, [(bounded.layout.tail + start, memory)])
        return table_crc

    async def _run_piece_windows(self, run: _Run, bounded: BoundedStaging) -> int:
        job = run.job
        table_crc = 0

        async def fill(number: int) -> memoryview:
            nonlocal table_crc
            memory = bounded.arena.memory[:0]
            if bounded.layout.segments:
                fill = partial(self._fill, run, bounded, number)
                [(_, memory)] = await in_thread(self._threads.staging, fill)
            if number < bounded.layout.pieces:
                return memory
            job.log.report("write", staged=run.tail.nbytes)
            job.release_tensors()
            rendered, table_crc = run.tail.render(bounded.crcs)
            return await in_thread(self._threads.staging, bounded.append, number, memory, rendered)

        await PieceWriter(self._storage, job, names_of(run.file, bounded.layout)).write_windows(bounded.slots, fill)
        return table_crc

    def _fill(self, run: _Run, bounded: BoundedStaging, number: int) -> list[FileRange]:
        """Bring one window into its slot, complete."""
        job = run.job
        with self._copying(job, run.plan, bounded, first=number == 0):
            began_s = time.perf_counter()
            with _copy_errors(bounded.layout.tail):
                events = bounded.copy(number, job.captured.values, job.device_copies)
            if number == len(bounded) - 1:
                run.comparing.wait()
                job.check_torn()
                job.queued.reach()
            with _copy_errors(bounded.layout.tail):
                job.device_copies.wait_for(events)
            if number == len(bounded) - 1 and events:
                job.check_torn()
            job.timeline.add("stage", began_s)
            job.log.report(staged=bounded.nbytes(number))
        with job.timeline.record("checksum"):
            return bounded.seal(number, self._checksum)

    # --- both

    async def _write(self, job: SaveJob, writer: Writer, offset: int, data: memoryview) -> None:
        with self._write_errors(job), job.timeline.record("write"):
            await writer.write(offset, data)
        job.log.report(written=data.nbytes)

    @contextmanager
    def _copying(self, job: SaveJob, plan: WritePlan, buffer: StagingBuffer, *, first: bool = True) -> Iterator[None]:
        """Copy within the block; whatever happens, no device uses the memory after it, or it is never freed."""
        values = job.captured.values
        if first:
            _refuse_freed(values, plan)
        self._is_lost = bool(job.device_copies)
        try:
            with _copy_errors(0):
                if first:
                    job.device_copies.start()
            yield
        finally:
            with _copy_errors(buffer.arena.nbytes):
                job.device_copies.drain(buffer, [*values])
            self._is_lost = False

    @contextmanager
    def _write_errors(self, job: SaveJob, file: str = "") -> Iterator[None]:
        with write_errors(self._storage.describe(job.checkpoint_id, file)):
            yield


class _Comparing:
    """The comparison of what a save captured with what other ranks hold, beside its staging."""

    def __init__(self, job: SaveJob, comparison: Comparison, seed: int | None) -> None:
        self.digest = 0
        self._job = job
        self._comparison = comparison
        self._seed = seed
        self._over = threading.Event()

    async def run(self, threads: Threads) -> None:
        try:
            if self._seed is not None and self._comparison.sources:
                captured = self._job.captured
                is_short = captured.is_short and not captured.devices
                self.digest = await in_thread_if_long(is_short, threads.compute, self._compare, self._seed)
        finally:
            self._over.set()

    def _compare(self, seed: int) -> int:
        with _copy_errors(0):
            self._job.device_copies.start()
            return self._comparison.digest(self._job.captured, self._job.device_copies, seed)

    def wait(self) -> None:
        """Block until the tensors are not read any more."""
        self._over.wait()


def _refuse_freed(values: Sequence[Any], plan: WritePlan) -> None:
    """Refuse to copy from memory that is not there: it would crash the process."""
    for start in range(0, len(plan.staged), TENSORS_AT_ONCE):
        staged = plan.staged[start : start + TENSORS_AT_ONCE]
        if not all(map(torch.Tensor.data_ptr, map(values.__getitem__, staged))):
            for index, item in zip(staged, plan.share.staged[start:], strict=False):
                if values[index].data_ptr() == 0 and values[index].numel():
                    raise CaptureError(item.index.fqn, "its storage has been freed")


@contextmanager
def _copy_errors(nbytes: int) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise StageError(nbytes, f"the copy failed: {error!r}") from error
