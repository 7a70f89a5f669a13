"""The save flow: capture, plan, stage, checksum, write, commit. Runs on the engine's loop.

Segments of the data file go through it like cars through a wash: while one is written the next is checksummed and
the one after it staged. Nothing that is written counts before the commit.
"""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import anyio
import torch
from anyio import Event

from ._capture import Capture
from ._commit import CommitRecord, Item, commit, find_replaced, forget_empty, live, may_be_committed, remove_files
from ._engine import Threads, first_error, in_thread
from ._layout import ALIGNMENT, BLOCK, Layout, lay_out, round_up
from ._milestone import Milestone, ProgressLog
from ._plan import SavePlan, chunk_of, plan_save
from ._stage import Checksum, Stage, wait_for_marks
from .errors import CaptureError, CheckpointError, SaveError, StageError, WriteError
from .metadata import METADATA_NAME
from .storage import Storage, Writer

KEPT_PLANS = 4  # structures remembered: a run saves one or two, and each costs a few MB for 10,000 tensors
TAIL_SLACK = 64 << 10  # bytes kept free for frozen values to grow in, before the arena must be made anew
# The part of the file whose writing may begin while the rest is still staged. Writing takes memory bandwidth and
# cores from the copy that the caller waits for, and without a head start the disk has nothing to do meanwhile.
# Measured interleaved, 1 GiB on two cores, staged as a ratio to a bare copy, durable to a bare write: a quarter 1.19
# and 1.12, a third 1.21 and 1.01, a half 1.30 and 1.02.
HEAD_START = 1 / 3
SEGMENTS_AT_ONCE = 2  # one is written while the next is checksummed: one O_DIRECT write fills a disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that saves of one structure have in common."""

    plan: SavePlan
    layout: Layout
    record: CommitRecord

    @property
    def leaves(self) -> list[int]:
        return [place for _, place in self.plan.staged]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One save: what was captured, where it goes, and whom to tell."""

    taken: Capture
    marks: list[torch.cuda.Event]
    checkpoint_id: str
    staged: Milestone
    uploaded: Milestone
    log: ProgressLog


class Saver:
    """Plans and host memory kept from save to save. One flow at a time: its user holds the semaphore."""

    def __init__(self, storage: Storage, threads: Threads, *, keep_buffers: bool, checksum: Checksum) -> None:
        self._storage = storage
        self._threads = threads
        self._keep_buffers = keep_buffers
        self._checksum = checksum
        self._kept: list[Prepared] = []
        self._stage: tuple[Prepared, Stage] | None = None
        self._writing = anyio.Semaphore(SEGMENTS_AT_ONCE)

    async def prepare(self, taken: Capture) -> None:
        """Plan, and have host memory ready, so that the first save is as quick as the others."""
        prepared = await self._plan(taken)
        tail, _ = _lay_tail(prepared, taken)
        await self._take_stage(prepared, len(tail))

    async def save(self, job: Job) -> list[str]:
        """Save what was captured, and return the files that are to be removed now.

        Raises:
            SaveError: nothing was committed, and what was written is removed.

        Cancellation: takes effect after the copy or write under way; nothing is committed, and what was written is
        removed. Once the commit has begun the save is finished instead.
        """
        save_id = uuid.uuid4().hex
        file = f"__0_{save_id}.distcp"  # a name that no other save has: the old checkpoint's files stay whole
        with live(file):
            await self._save(job, save_id, file)
            job.log.report("done")
            job.uploaded.reach()
            return await find_replaced(self._storage, job.checkpoint_id, file)

    async def _save(self, job: Job, save_id: str, file: str) -> None:
        try:
            prepared = await self._plan(job.taken)
            tail, places = _lay_tail(prepared, job.taken)
            stage = await self._take_stage(prepared, len(tail))
            job.log.report("stage", total=_file_nbytes(prepared, tail))
            await self._transfer(job, prepared, stage, tail, file)
            job.log.report("commit")
            try:
                await anyio.lowlevel.checkpoint()  # the last moment at which a cancelled save is not committed
                record = prepared.record.render(job.checkpoint_id, save_id, file, places)
                with _write_errors(self._storage.locate(job.checkpoint_id, METADATA_NAME)):
                    await commit(self._storage, job.checkpoint_id, record, file)
            except BaseException:
                if not await may_be_committed(self._storage, job.checkpoint_id, save_id):
                    await remove_files(self._storage, job.checkpoint_id, [file])
                raise
        except BaseException:
            await forget_empty(self._storage, job.checkpoint_id)
            raise
        finally:
            if not self._keep_buffers:
                self._stage = None

    async def _plan(self, taken: Capture) -> Prepared:
        for prepared in self._kept:
            if prepared.plan.fits(taken):
                return prepared
        prepared = await in_thread(self._threads.compute, _prepare, taken)
        self._kept = [prepared, *self._kept[: KEPT_PLANS - 1]]
        return prepared

    async def _take_stage(self, prepared: Prepared, tail_nbytes: int) -> Stage:
        if self._stage is not None:
            kept_for, stage = self._stage
            if kept_for is prepared and stage.room() >= tail_nbytes:
                return stage
            del stage
        self._stage = None  # first give back the memory of the old one
        room = 2 * tail_nbytes + TAIL_SLACK
        stage = await in_thread(self._threads.staging, Stage, prepared.layout, prepared.leaves, room)
        self._stage = prepared, stage
        return stage

    async def _transfer(self, job: Job, prepared: Prepared, stage: Stage, tail: bytes, file: str) -> None:
        """Stage, checksum and write every segment, each as soon as it can be, into a durable file."""
        ready = [Event() for _ in stage.layout.segments]
        staged = Event()
        try:
            async with anyio.create_task_group() as staging:
                staging.start_soon(self._stage_all, job, prepared, stage, tail, ready, staged)
                with _write_errors(self._storage.locate(job.checkpoint_id, file)):
                    async with self._storage.create(job.checkpoint_id, file) as writer:
                        async with anyio.create_task_group() as writing:
                            for number, event in enumerate(ready):
                                writing.start_soon(self._write_segment, job, stage, number, event, writer)
                        await staged.wait()
                        if tail:
                            await self._write(job, writer, *stage.tail_range(len(tail)))
        except BaseExceptionGroup as errors:
            first = first_error(errors)
            raise first from first.__cause__

    async def _stage_all(
        self, job: Job, prepared: Prepared, stage: Stage, tail: bytes, ready: Sequence[Event], staged: Event
    ) -> None:
        loop = asyncio.get_running_loop()
        stop = threading.Event()
        values = job.taken.values

        def copy() -> None:
            for _, place in prepared.plan.staged:
                if values[place].data_ptr() == 0 and values[place].numel():  # to copy it would crash the process
                    raise CaptureError(job.taken.fqns[place], "its storage has been freed")
            wait_for_marks(job.marks)
            for number, event in enumerate(ready):
                if stop.is_set():
                    return
                try:
                    stage.copy(number, values)
                except Exception as error:
                    raise StageError(stage.layout.tail, f"the copy failed: {error!r}") from error
                segment = stage.layout.segments[number]
                job.log.report(staged=segment.stop - segment.start)
                if segment.stop <= HEAD_START * stage.layout.tail:
                    loop.call_soon_threadsafe(event.set)
            stage.put_tail(tail)
            job.log.report("write", staged=round_up(len(tail), BLOCK))
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
        values.clear()  # from here on the caller may free them
        for event in (*ready, staged):
            event.set()

    async def _write_segment(self, job: Job, stage: Stage, number: int, ready: Event, writer: Writer) -> None:
        await ready.wait()
        async with self._writing:
            await in_thread(self._threads.compute, stage.checksum, number, self._checksum)
            await self._write(job, writer, *stage.file_range(number))

    async def _write(self, job: Job, writer: Writer, offset: int, data: memoryview) -> None:
        with _write_errors(self._storage.locate(job.checkpoint_id)):
            await writer.write(offset, data)
        job.log.report(written=data.nbytes)


def _prepare(taken: Capture) -> Prepared:
    try:
        plan = plan_save(taken)
        layout = lay_out([chunk_of(item) for item, _ in plan.staged])
        return Prepared(plan=plan, layout=layout, record=CommitRecord(plan, layout))
    except CheckpointError:
        raise
    except Exception as error:
        raise SaveError(f"planning failed: {error!r}") from error


def _lay_tail(prepared: Prepared, taken: Capture) -> tuple[bytes, list[Item]]:
    """Join the frozen values, and tell where in the file each lies."""
    pieces: list[bytes] = []
    items: list[Item] = []
    position = 0
    for _, place in prepared.plan.frozen:
        data = taken.frozen[place].archive()
        items.append(Item(offset=prepared.layout.tail + position, nbytes=len(data)))
        filled = round_up(len(data), ALIGNMENT)
        pieces.append(data.ljust(filled, b"\0"))
        position += filled
    return b"".join(pieces), items


def _file_nbytes(prepared: Prepared, tail: bytes) -> int:
    return prepared.layout.tail + round_up(len(tail), BLOCK)


@contextmanager
def _write_errors(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteError(path, str(error)) from error
