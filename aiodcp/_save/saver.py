"""The save flow: capture, plan, stage, checksum, write, vote, commit. Runs on the engine's loop.

Stage, checksum and write are each rank's own (`_transfer`), all else is done together. Nothing that is written counts
before the commit.
"""

from __future__ import annotations

import struct
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, nullcontext

import anyio.lowlevel

from .._distributed.operation import PART, Operation
from .._distributed.votes import Row
from .._engine.device_copies import HOST
from .._engine.task_groups import one_error
from .._engine.threads import Threads
from .._format.naming import METADATA_NAME, data_file
from .._format.seal import seal
from .._state.capture import Capture
from ..storage.base import Storage
from ..storage.error_mapping import write_errors
from .commit import UncommittedFiles, commit, find_replaced, forget_empty, live, may_be_committed, remove_files
from .manifest import ByteRange, ManifestTemplate
from .pipeline import WritePipeline
from .plan_cache import CachedPlan, PlanCache, agree_on_plan, numbers_of
from .request import PartRequest, SaveJob, WrittenPart
from .sharing import OnDisagreement, agree
from .start_agreement import POLICIES, agree_on_part, agree_on_start
from .tail import lay_tail


class Saver:
    """Plans and host memory kept from save to save. One flow at a time: its user holds the semaphore."""

    def __init__(
        self,
        storage: Storage,
        threads: Threads,
        make_transfer: Callable[[], WritePipeline],
        *,
        share_transfer: bool,
        on_disagreement: OnDisagreement,
    ) -> None:
        """Begin.

        Args:
            storage: where to.
            threads: the engine's.
            make_transfer: makes host memory for one state.
            share_transfer: whether the states of one checkpoint go through the same memory, one after the other.
            on_disagreement: what to do where ranks hold different values of what is saved once.
        """
        self._on_disagreement = on_disagreement
        self._policy = POLICIES.index(on_disagreement)
        self._storage = storage
        self._threads = threads
        self._make_transfer = make_transfer
        self._share_transfer = share_transfer
        self._transfers = {"": make_transfer()}  # by the name of the state
        self._plans = PlanCache(threads)
        self._sharing = anyio.Semaphore(1)

    async def prepare(self, operation: Operation, take: Callable[[], Awaitable[Capture]]) -> None:
        """Plan, and have host memory ready, so that the first save is as quick as the others."""

        async def begin() -> tuple[Capture, dict[int, CachedPlan]]:
            taken = await take()
            return taken, self._plans.find("", taken)

        (taken, kept), answer = await operation.together(
            "capture", begin, facts=lambda begun: numbers_of(begun[1]), decide=agree_on_plan
        )
        prepared = kept.get(answer[0]) or await self._plans.make(operation, "", taken)

        async def have_stage() -> None:
            tail, _ = lay_tail(prepared, taken)
            device = next((each for each in taken.devices if each.type not in HOST), None)
            await self._transfers[""].make_room(prepared.plan, tail.nbytes, pin_for=device)

        await operation.together("stage", have_stage)

    async def save(self, operation: Operation, place: int, take: Callable[[], Awaitable[SaveJob]]) -> list[str]:
        """Save what `take` captures, and return the files that are to be removed now.

        Args:
            operation: the ranks that save.
            place: a digest of where to, the same on all ranks.
            take: waits for the caller.

        Raises:
            SaveError: nothing was committed, and what was written is removed.

        Cancellation: `operation.cancel()` takes effect after the copy or write under way; nothing is committed, and
        what was written is removed. Once the commit has begun the save is finished instead.
        """

        async def begin() -> tuple[SaveJob, dict[int, CachedPlan]]:
            job = await take()
            return job, self._plans.find("", job.taken)

        halves = struct.unpack("<qq", uuid.uuid4().bytes)
        (job, kept), answer = await operation.together(
            "capture",
            begin,
            facts=lambda begun: [*numbers_of(begun[1]), place, *halves, self._flags(begun[0].planner is not None)],
            decide=agree_on_start,
        )
        save_id = struct.pack("<qq", *answer[1:3]).hex()
        async with self._all_or_nothing(operation, job.checkpoint_id, save_id) as attempt:
            file = data_file(operation.rank, save_id)
            written = await self._write(operation, attempt, "", job, kept.get(answer[0]), file)
            record = await self._commit(operation, attempt, [written], job.note)
        return await self._told([job], record, save_id)

    async def save_several(
        self,
        operation: Operation,
        place: int,
        checkpoint_id: str,
        note: Callable[[], bytes],
        wishes: Callable[[], Awaitable[PartRequest]],
    ) -> list[str]:
        """Save several states, each when it is there, in one checkpoint; return the files that are to be removed now.

        Alone, the states are planned, staged and written beside each other; where they share bounded memory, one after
        the other as they are there; with other ranks, in the order in which they were wished for.

        Args:
            operation: the ranks that save.
            place: a digest of where to, the same on all ranks.
            checkpoint_id: where to.
            note: returns the custom metadata, encoded, when all states are there; called by the coordinator.
            wishes: waits for the next one; the last has no name.

        Raises:
            SaveError: nothing was committed, and what was written is removed.

        Cancellation: as for `save`.
        """

        halves = struct.unpack("<qq", uuid.uuid4().bytes)
        _, answer = await operation.together(
            "begin",
            anyio.lowlevel.checkpoint,
            facts=lambda _: [*numbers_of([]), place, *halves, self._flags(False)],
            decide=agree_on_start,
        )
        save_id = struct.pack("<qq", *answer[1:3]).hex()
        names: list[str] = []
        written: dict[int, WrittenPart] = {}

        async def write(branch: Operation, attempt: UncommittedFiles, number: int, wish: PartRequest) -> None:
            found = await self._write_part(branch, attempt, wish, data_file(operation.rank, save_id, number))
            if found is not None:
                written[number] = found

        try:
            async with self._all_or_nothing(operation, checkpoint_id, save_id) as attempt:
                with one_error():
                    async with anyio.create_task_group() as group:
                        while (wish := await operation.wait_for(wishes)).name:
                            names.append(wish.name)
                            if operation.size == 1:
                                group.start_soon(write, operation.branch(), attempt, len(names) - 1, wish)
                            else:
                                await write(operation, attempt, len(names) - 1, wish)
                await self._write_part(operation, attempt, wish, "")
                parts = [written[number] for number in range(len(names))]
                record = await self._commit(operation, attempt, parts, note)
        finally:
            self._keep_only({"", *names})
        return await self._told([part.job for part in parts], record, save_id)

    async def _write_part(
        self, operation: Operation, attempt: UncommittedFiles, wish: PartRequest, file: str
    ) -> WrittenPart | None:
        """Write one of several states; or, when no more is wished for, agree on that with the other ranks."""

        async def begin() -> tuple[SaveJob | None, dict[int, CachedPlan]]:
            await anyio.lowlevel.checkpoint()
            if wish.take is None:
                return None, {}
            job = await wish.take()
            return job, self._plans.find(wish.name, job.taken)

        (job, kept), answer = await operation.together(
            PART,
            begin,
            facts=lambda begun: [*numbers_of(begun[1]), zlib.crc32(wish.name.encode())],
            decide=agree_on_part,
        )
        if job is None:
            return None
        async with self._sharing if self._share_transfer else nullcontext():
            return await self._write(operation, attempt, wish.name, job, kept.get(answer[0]), file)

    @asynccontextmanager
    async def _all_or_nothing(
        self, operation: Operation, checkpoint_id: str, save_id: str
    ) -> AsyncIterator[UncommittedFiles]:
        """Remove what the block has written if it fails, unless it may have been committed all the same."""
        attempt = UncommittedFiles(checkpoint_id, save_id)
        above, _, _ = checkpoint_id.rpartition("/")
        try:
            async with AsyncExitStack() as stack:
                stack.enter_context(live(save_id))
                if operation.is_coordinator and above:  # where a manager may clear up
                    with write_errors(self._storage.locate(above)):
                        await stack.enter_async_context(self._storage.join(above))
                yield attempt
        except BaseException:
            if not operation.agreed:
                self._plans.forget()
            kept_data = attempt.written and (
                not operation.agreed  # the coordinator may have gone on to the commit
                or (attempt.committing and await may_be_committed(self._storage, checkpoint_id, save_id))
            )
            if not kept_data:
                await remove_files(self._storage, checkpoint_id, attempt.files)
            await forget_empty(self._storage, checkpoint_id)
            raise
        finally:
            for transfer in self._transfers.values():
                transfer.done()

    async def _write(
        self,
        operation: Operation,
        attempt: UncommittedFiles,
        name: str,
        job: SaveJob,
        kept: CachedPlan | None,
        file: str,
    ) -> WrittenPart:
        """Plan, stage, checksum and write one state, on all ranks."""
        voting = 0.0
        transfer = self._transfer_of(name)
        compares = operation.size > 1 and self._on_disagreement != "ignore"
        seed = int(attempt.save_id[:8], 16)

        async def write(prepared: CachedPlan) -> tuple[list[ByteRange], int, int]:
            nonlocal voting
            tail, places = lay_tail(prepared, job.taken)
            room = await transfer.make_room(prepared.plan, tail.nbytes, pin_for=job.device_copies.first_device)
            attempt.files.append(file)
            attempt.written = False
            digest, table_crc = await transfer.run(
                job, prepared.plan, room, tail, file, seed=seed if compares else None
            )
            attempt.written = True
            voting = time.perf_counter()
            return places, digest, table_crc

        prepared = kept or await self._plans.make(operation, name, job.taken, job.planner)
        captured = job.timeline.between("capture")
        assert captured is not None
        job.timeline.add("plan", captured[1])
        tables: list[int] = []

        def decide(table: list[Row]) -> list[int]:
            tables[:] = [row[2] for row in table]
            return [any(row[0] for row in table), not agree([row[1] for row in table])]

        (places, _, _), answer = await operation.together(
            "write",
            lambda: write(prepared),
            facts=lambda written: [prepared.places.get(operation.rank) != written[0], *written[1:]],
            decide=decide,
        )
        if answer[0]:
            await self._plans.share_places(operation, prepared, places)
        if compares and answer[1]:
            await self._plans.compare(operation, prepared, self._on_disagreement)
        job.timeline.add("vote", voting)
        return WrittenPart(job=job, prepared=prepared, tables=tables)

    async def _commit(
        self, operation: Operation, attempt: UncommittedFiles, parts: Sequence[WrittenPart], note: Callable[[], bytes]
    ) -> ManifestTemplate | None:
        """Make what is written the checkpoint; return its record, on the coordinator."""
        place, save_id = attempt.checkpoint_id, attempt.save_id

        async def commit_all() -> ManifestTemplate | None:
            if not operation.is_coordinator:
                return None
            record = await self._plans.record_of([part.prepared for part in parts])
            await anyio.lowlevel.checkpoint()  # the last moment at which a cancelled save is not committed
            places = [[part.prepared.places[rank] for rank in range(operation.size)] for part in parts]
            with write_errors(self._storage.locate(place, METADATA_NAME)):
                tables = record.in_order_of_files(save_id, [part.tables for part in parts])
                content = seal(record.render(place, save_id, places), note(), tables)
                await commit(self._storage, place, content, record.files(save_id))
            return record

        attempt.committing = True
        with ExitStack() as stack:
            for part in parts:
                part.job.log.report("commit")
                stack.enter_context(part.job.timeline.record("commit"))
            record, _ = await operation.together("commit", commit_all, last=True)
        return record

    async def _told(self, jobs: Sequence[SaveJob], record: ManifestTemplate | None, save_id: str) -> list[str]:
        """Tell those who wait that it is committed; return the files that are to be removed now."""
        for job in jobs:
            job.log.report("done")
            job.uploaded.reach()
        if record is None:
            return []
        return await find_replaced(self._storage, jobs[0].checkpoint_id, record.files(save_id))

    def _flags(self, has_planner: bool) -> int:
        return int(has_planner) | self._policy << 1

    def _transfer_of(self, name: str) -> WritePipeline:
        name = "" if self._share_transfer else name
        if name not in self._transfers:
            self._transfers[name] = self._make_transfer()
        return self._transfers[name]

    def _keep_only(self, names: set[str]) -> None:
        """Let go of host memory and plans of states that the last checkpoint had not."""
        self._transfers = {name: transfer for name, transfer in self._transfers.items() if name in names}
        self._plans.keep_only(names)
