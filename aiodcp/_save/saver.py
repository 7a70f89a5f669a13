"""The save flow: capture, plan, stage, checksum, write, vote, commit. Runs on the engine's loop.

Stage, checksum and write are each rank's own (`pipeline`), all else is done together. Nothing that is written counts
before the commit.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, nullcontext
from functools import partial

import anyio.lowlevel

from .._distributed.operation import PART, Operation
from .._distributed.votes import Agree, Row, any_rank
from .._engine.device_copies import HOST
from .._engine.task_groups import single_error
from .._engine.threads import Threads
from .._format.naming import METADATA_NAME, data_file
from .._format.seal import seal
from .._state.capture import Capture
from ..errors import SaveCancelled
from ..storage.base import Storage, object_limits
from ..storage.error_mapping import write_errors
from .bounded_staging import largest_piece
from .commit import (
    Replaced,
    UncommittedFiles,
    commit,
    live,
    may_be_committed,
    refuse_existing,
    remove_files,
    remove_if_empty,
    remove_replaced,
)
from .manifest import names_of
from .parts import PartExchange, PartTicket, join
from .pipeline import WritePipeline
from .plan_cache import PlanCache, PlanRequest
from .request import PartRequest, SaveJob, WrittenHere, WrittenPart
from .sharing import OnDisagreement
from .start_agreement import (
    PartProposal,
    PlanProposal,
    PlanStart,
    SaveProposal,
    SaveStart,
    agree_on_part,
    agree_on_plan,
    agree_on_save,
)
from .tail import lay_tail
from .write_agreement import WriteAgreed, agree_on_write


class Saver:
    """Plans and host memory kept from save to save. One flow at a time: its user holds the semaphore."""

    def __init__(
        self,
        storage: Storage,
        threads: Threads,
        make_pipeline: Callable[[], WritePipeline],
        *,
        share_pipeline: bool,
        max_host_nbytes: int | None,
        on_disagreement: OnDisagreement,
    ) -> None:
        """Begin.

        Args:
            storage: where to.
            threads: the engine's.
            make_pipeline: makes host memory for one state.
            share_pipeline: whether the states of one checkpoint go through the same memory, one after the other.
            max_host_nbytes: of that memory, for one state.
            on_disagreement: what to do where ranks hold different values of what is saved once.
        """
        self._on_disagreement = on_disagreement
        self._storage = storage
        self._make_pipeline = make_pipeline
        self._share_pipeline = share_pipeline
        self._max_host_nbytes = max_host_nbytes
        self._pipelines: dict[str | None, WritePipeline] = {None: make_pipeline()}  # by the name of the state
        self._plans = PlanCache(threads)
        self._sharing = anyio.Semaphore(1)

    def _piece_nbytes(self, checkpoint_id: str) -> int | None:
        """Return how many bytes of tensors go into one file of a checkpoint; None where each rank has one file."""
        limits = object_limits(self._storage, checkpoint_id)
        if limits is None:
            return None
        if self._max_host_nbytes is None:
            return limits.object_nbytes
        return min(limits.object_nbytes, largest_piece(self._max_host_nbytes))

    async def prepare(self, operation: Operation, checkpoint_id: str, take: Callable[[], Awaitable[Capture]]) -> None:
        """Plan, and have host memory ready, so that the first save is as quick as the others."""
        piece_nbytes = self._piece_nbytes(checkpoint_id)

        async def begin() -> PlanRequest:
            return await self._plans.begin(operation, None, await take(), piece_nbytes=piece_nbytes)

        request, row = await operation.run_phase(
            "capture",
            begin,
            propose=lambda request: request.proposal.to_row(),
            agree=partial(agree_on_plan, coordinator=operation.rank),
        )
        captured = request.captured
        finish = await self._plans.make(operation, request, PlanStart.from_row(row))

        async def take_memory() -> None:
            cached = await finish()
            tail, _ = lay_tail(cached, captured)
            device = next((each for each in captured.devices if each.type not in HOST), None)
            await self._pipelines[None].take_memory(cached.plan, tail.nbytes, pin_for=device)

        await operation.run_phase("stage", take_memory)

    async def save(
        self,
        operation: Operation,
        id_digest: int,
        take: Callable[[], Awaitable[SaveJob]],
        part: PartExchange | None = None,
    ) -> Replaced:
        """Save what `take` captures, and return the files that are to be removed now.

        Args:
            operation: the ranks that save.
            id_digest: of the checkpoint's id, the same on all ranks.
            take: waits for the caller.
            part: where this is a part of a checkpoint that another process commits, how the caller hears of it.

        Raises:
            SaveError: nothing was committed, and what was written is removed.

        Cancellation: `operation.cancel()` takes effect after the copy or write under way; nothing is committed, and
        what was written is removed. Once the commit has begun the save is finished instead.
        """

        async def begin() -> tuple[SaveJob, PlanRequest]:
            return await self._begin(operation, None, await take())

        def propose(begun: tuple[SaveJob, PlanRequest]) -> Row:
            return self._propose(id_digest, begun[1].proposal, begun[0])

        (job, request), row = await operation.run_phase(
            "capture", begin, propose=propose, agree=self._agree_on_save(operation)
        )
        start = SaveStart.from_row(row)
        async with self._all_or_nothing(operation, job.checkpoint_id, start.save_id) as files:
            file = data_file(operation.rank, start.save_id)
            written = await self._write(operation, files, job, request, start.plan, file)
            if part is not None:
                await self._hand_over(operation, files, written, part)
                job.log.report("done")
                job.uploaded.reach()
                return Replaced()
            replaced = await self._commit(operation, files, [written], job.custom_metadata)
        self._finish([job])
        return replaced

    async def _hand_over(
        self, operation: Operation, files: UncommittedFiles, written: WrittenPart, part: PartExchange
    ) -> None:
        """Offer what is written, and wait until the caller knows whether it has been committed.

        Raises:
            SaveCancelled: it has not.
        """
        path, save_id = files.checkpoint_id, files.save_id

        async def offer() -> bool:
            if not operation.is_coordinator:
                part.offer(None)
                return True
            manifest = await self._plans.manifest_of([written.plan])
            ranges = [[written.plan.frozen_ranges[rank] for rank in range(operation.size)]]
            tables = manifest.in_order_of_files(save_id, [written.tables])
            named = zip(manifest.table_files(save_id), tables, strict=True)
            part.offer(
                PartTicket(
                    checkpoint_id=path,
                    files=tuple(sorted(manifest.files(save_id))),
                    metadata=manifest.render(path, save_id, ranges),
                    tables=tuple(named),
                )
            )
            return await operation.wait_for(part.decision)

        files.may_be_committed = True
        _, (is_refused, *_) = await operation.run_phase(
            "commit", offer, propose=lambda is_committed: [not is_committed], agree=any_rank, last=True
        )
        if is_refused:
            files.are_given_up = True
            raise SaveCancelled(path)

    async def commit_parts(
        self,
        checkpoint_id: str,
        tickets: Sequence[PartTicket],
        custom_metadata: Callable[[], bytes],
        *,
        overwrite: bool,
    ) -> None:
        """Commit what other processes have written, and remove what that replaces. On one rank.

        Raises:
            ArgumentError: the parts do not make up a checkpoint.
            SaveError: a part is gone, or storage failed; nothing was committed.
        """
        joined = join(tickets, checkpoint_id, uuid.uuid4().hex)
        async with AsyncExitStack() as stack:
            await self._lock(stack, checkpoint_id)
            if not overwrite:
                await refuse_existing(self._storage, checkpoint_id)
            with write_errors(self._storage.describe(checkpoint_id, METADATA_NAME)):
                content = seal(joined.pickled, custom_metadata(), joined.tables, joined.outline)
                replaced = await commit(self._storage, checkpoint_id, content, joined.files)
            await remove_replaced(self._storage, checkpoint_id, replaced)

    async def _begin(self, operation: Operation, name: str | None, job: SaveJob) -> tuple[SaveJob, PlanRequest]:
        piece_nbytes = self._piece_nbytes(job.checkpoint_id)
        request = await self._plans.begin(operation, name, job.captured, job.planner, piece_nbytes=piece_nbytes)
        return job, request

    def _propose(self, id_digest: int, plan: PlanProposal, job: SaveJob | None = None) -> Row:
        return SaveProposal(
            plan=plan,
            id_digest=id_digest,
            has_planner=job is not None and job.planner is not None,
            overwrites=job is None or job.overwrite,
            on_disagreement=self._on_disagreement,
        ).to_row()

    @staticmethod
    def _agree_on_save(operation: Operation) -> Agree:
        return partial(agree_on_save, coordinator=operation.rank, save_id=uuid.uuid4().hex)

    async def save_several(
        self,
        operation: Operation,
        id_digest: int,
        checkpoint_id: str,
        custom_metadata: Callable[[], bytes],
        next_part: Callable[[], Awaitable[PartRequest]],
    ) -> Replaced:
        """Save several states, each when it is there, in one checkpoint; return the files that are to be removed now.

        Alone, the states are planned, staged and written beside each other; where they share bounded memory, one after
        the other as they are there; with other ranks, in the order in which they were asked for.

        Args:
            operation: the ranks that save.
            id_digest: of the checkpoint's id, the same on all ranks.
            checkpoint_id: where to.
            custom_metadata: returns it encoded, when all states are there; called by the coordinator.
            next_part: waits for the next request; the last has no name.

        Raises:
            SaveError: nothing was committed, and what was written is removed.

        Cancellation: as for `save`.
        """

        _, agreed = await operation.run_phase(
            "begin joint save",
            anyio.lowlevel.checkpoint,
            propose=lambda _: self._propose(id_digest, PlanProposal()),
            agree=self._agree_on_save(operation),
        )
        save_id = SaveStart.from_row(agreed).save_id
        names: list[str] = []
        written: dict[int, WrittenPart] = {}

        async def write(branch: Operation, files: UncommittedFiles, number: int, request: PartRequest) -> None:
            file = data_file(operation.rank, save_id, number)
            written[number] = await self._write_part(branch, files, request, file)

        try:
            async with self._all_or_nothing(operation, checkpoint_id, save_id) as files:
                with single_error():
                    async with anyio.create_task_group() as group:
                        while (request := await operation.wait_for(next_part)).name is not None:
                            names.append(request.name)
                            if operation.size == 1:
                                group.start_soon(write, operation.branch(), files, len(names) - 1, request)
                            else:
                                await write(operation, files, len(names) - 1, request)
                await self._agree_on_end(operation)
                parts = [written[number] for number in range(len(names))]
                replaced = await self._commit(operation, files, parts, custom_metadata)
        finally:
            self._keep_only({None, *names})
        self._finish([part.job for part in parts])
        return replaced

    async def _write_part(
        self, operation: Operation, files: UncommittedFiles, request: PartRequest, file: str
    ) -> WrittenPart:
        """Write one of several states, which all ranks add now."""
        name, take = request.name, request.take
        assert name is not None
        assert take is not None

        async def begin() -> tuple[SaveJob, PlanRequest]:
            await anyio.lowlevel.checkpoint()
            return await self._begin(operation, name, await take())

        (job, plan), row = await operation.run_phase(
            PART,
            begin,
            propose=lambda begun: PartProposal(plan=begun[1].proposal, name=name).to_row(),
            agree=partial(agree_on_part, coordinator=operation.rank),
        )
        async with self._sharing if self._share_pipeline else nullcontext():
            return await self._write(operation, files, job, plan, PlanStart.from_row(row), file)

    async def _agree_on_end(self, operation: Operation) -> None:
        """Agree with the other ranks that no more states are added."""
        end, agree = PartProposal(plan=PlanProposal(), name=None).to_row(), partial(agree_on_part, coordinator=0)
        await operation.run_phase(PART, anyio.lowlevel.checkpoint, propose=lambda _: end, agree=agree)

    @asynccontextmanager
    async def _all_or_nothing(
        self, operation: Operation, checkpoint_id: str, save_id: str
    ) -> AsyncIterator[UncommittedFiles]:
        """Remove what the block has written if it fails, unless it may have been committed all the same."""
        files = UncommittedFiles(checkpoint_id, save_id)
        try:
            async with AsyncExitStack() as stack:
                stack.enter_context(live(save_id))
                if operation.is_coordinator:
                    files.lock = partial(self._lock, stack, checkpoint_id)
                yield files
        except BaseException:
            is_agreed = operation.is_failure_agreed or files.are_given_up
            if not is_agreed:
                self._plans.forget()
            kept_data = files.are_written and (
                not is_agreed  # the coordinator may have gone on to the commit
                or (files.may_be_committed and await may_be_committed(self._storage, checkpoint_id, save_id))
            )
            if not kept_data:
                await remove_files(self._storage, checkpoint_id, files.names)
            await remove_if_empty(self._storage, checkpoint_id)
            raise
        finally:
            for pipeline in self._pipelines.values():
                pipeline.finish()

    async def _lock(self, stack: AsyncExitStack, checkpoint_id: str) -> None:
        """Keep others from clearing up what is being saved: by the root, if managers lock that, or by itself."""
        above, _, _ = checkpoint_id.rpartition("/")
        is_locked = object_limits(self._storage, checkpoint_id) is None
        if above and not above.endswith(":/"):  # else the checkpoint is a bucket
            with write_errors(self._storage.describe(above)):
                is_locked = await stack.enter_async_context(self._storage.lock(above, exclusive=False, create=False))
        if not is_locked:
            with write_errors(self._storage.describe(checkpoint_id)):
                await stack.enter_async_context(self._storage.lock(checkpoint_id, exclusive=False))

    async def _write(
        self,
        operation: Operation,
        files: UncommittedFiles,
        job: SaveJob,
        request: PlanRequest,
        start: PlanStart,
        file: str,
    ) -> WrittenPart:
        """Plan, stage, checksum and write one state, on all ranks."""
        voting = 0.0
        pipeline = self._pipeline_of(request.name)
        compares = operation.size > 1 and self._on_disagreement != "ignore"
        seed = int(files.save_id[:8], 16)
        finish = await self._plans.make(operation, request, start)

        async def write() -> WrittenHere:
            nonlocal voting
            cached = await finish()
            captured = job.timeline.between("capture")
            assert captured is not None
            job.timeline.add("plan", captured[1])
            tail, ranges = lay_tail(cached, job.captured)
            admitted = anyio.Event()

            async def admit() -> None:  # meanwhile: on a network file system a lock takes its time
                await files.lock_once()
                if operation.is_coordinator and not job.overwrite:
                    await refuse_existing(self._storage, job.checkpoint_id)
                admitted.set()

            with single_error():
                async with anyio.create_task_group() as group:
                    group.start_soon(admit)
                    memory_for = job.device_copies.first_device
                    buffer = await pipeline.take_memory(cached.plan, tail.nbytes, pin_for=memory_for)
                    files.names += names_of(file, cached.layout)
                    files.are_written = False
                    digest, table_crc = await pipeline.run(
                        job, cached.plan, buffer, tail, file, admitted, seed=seed if compares else None
                    )
            files.are_written = True
            voting = time.perf_counter()
            return WrittenHere(plan=cached, ranges=ranges, digest=digest, table_crc=table_crc)

        tables: list[int] = []

        def settle(table: list[Row]) -> Row:
            agreed, tables[:] = agree_on_write(table)
            return agreed.to_row()

        written, row = await operation.run_phase(
            "write", write, propose=lambda written: written.proposal(operation.rank).to_row(), agree=settle
        )
        agreed = WriteAgreed.from_row(row)
        if agreed.is_moved:
            await self._plans.share_frozen_ranges(operation, written.plan, written.ranges, agreed.ranges_nbytes)
        if compares and agreed.differs:
            await self._plans.compare(operation, written.plan, self._on_disagreement)
        job.timeline.add("vote", voting)
        return WrittenPart(job=job, plan=written.plan, tables=tables)

    async def _commit(
        self,
        operation: Operation,
        files: UncommittedFiles,
        parts: Sequence[WrittenPart],
        custom_metadata: Callable[[], bytes],
    ) -> Replaced:
        """Make what is written the checkpoint; return the files that are to be removed now, on the coordinator."""
        path, save_id = files.checkpoint_id, files.save_id

        async def commit_all() -> Replaced:
            if not operation.is_coordinator:
                return Replaced()
            manifest = await self._plans.manifest_of([part.plan for part in parts])
            await anyio.lowlevel.checkpoint()  # the last moment at which a cancelled save is not committed
            if not all(part.job.overwrite for part in parts):
                await refuse_existing(self._storage, path)
            ranges = [[part.plan.frozen_ranges[rank] for rank in range(operation.size)] for part in parts]
            with write_errors(self._storage.describe(path, METADATA_NAME)):
                tables = manifest.in_order_of_files(save_id, [part.tables for part in parts])
                pickled, index = manifest.render(path, save_id, ranges), manifest.index(save_id, ranges)
                content = seal(pickled, custom_metadata(), tables, index)
                return await commit(self._storage, path, content, manifest.files(save_id))

        files.may_be_committed = True
        with ExitStack() as stack:
            for part in parts:
                part.job.log.report("commit")
                stack.enter_context(part.job.timeline.record("commit"))
            replaced, _ = await operation.run_phase("commit", commit_all, last=True)
        return replaced

    @staticmethod
    def _finish(jobs: Sequence[SaveJob]) -> None:
        """Let those who wait know that it is committed."""
        for job in jobs:
            job.log.report("done")
            job.uploaded.reach()

    def close(self) -> None:
        """Give all host memory back, and forget all plans."""
        for pipeline in self._pipelines.values():
            pipeline.close()
        self._plans.forget()

    def _pipeline_of(self, name: str | None) -> WritePipeline:
        name = None if self._share_pipeline else name
        if name not in self._pipelines:
            self._pipelines[name] = self._make_pipeline()
        return self._pipelines[name]

    def _keep_only(self, names: set[str | None]) -> None:
        """Let go of host memory and plans of states that the last checkpoint had not."""
        for name in [name for name in self._pipelines if name not in names]:
            self._pipelines.pop(name).close()
        self._plans.keep_only(names)
