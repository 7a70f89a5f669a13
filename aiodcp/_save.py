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
from dataclasses import dataclass

import anyio.lowlevel

from ._capture import Capture
from ._commit import (
    CommitRecord,
    Item,
    commit,
    find_replaced,
    forget_empty,
    live,
    may_be_committed,
    remove_files,
)
from ._comparison import OnDisagreement, agree
from ._devices import HOST
from ._engine import Threads
from ._judge import Row
from ._layout import ALIGNMENT, round_up
from ._names import METADATA_NAME, data_file
from ._note import seal
from ._prepare import KEPT_PLANS, Plans, Prepared, agree_on_plan, numbers_of
from ._ranks import PART, Operation
from ._transfer import Job, Tail, Transfer, write_errors
from .errors import ArgumentError, one_error
from .storage import Storage

POLICIES: tuple[OnDisagreement, ...] = ("warn", "raise", "ignore")


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A state that is staged and written, on all ranks, and not committed yet."""

    job: Job
    prepared: Prepared
    tables: Sequence[int]  # CRC32s of the tables in the data files, by rank; known to the coordinator


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the user of a checkpoint of several states wants next.

    Attributes:
        name: of the state; empty to commit.
        take: waits for the state.
    """

    name: str
    take: Callable[[], Awaitable[Job]] | None = None


class Attempt:
    """What a save has brought to storage so far, which is removed if it fails.

    Attributes:
        files: begun.
        written: whether all that has been begun is complete.
        committing: whether the commit may have been seen to.
    """

    def __init__(self, checkpoint_id: str, save_id: str) -> None:
        self.checkpoint_id = checkpoint_id
        self.save_id = save_id
        self.files: list[str] = []
        self.written = False
        self.committing = False


class Saver:
    """Plans and host memory kept from save to save. One flow at a time: its user holds the semaphore."""

    def __init__(
        self,
        storage: Storage,
        threads: Threads,
        make_transfer: Callable[[], Transfer],
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
        self._plans = Plans(threads)
        self._sharing = anyio.Semaphore(1)

    async def prepare(self, operation: Operation, take: Callable[[], Awaitable[Capture]]) -> None:
        """Plan, and have host memory ready, so that the first save is as quick as the others."""

        async def begin() -> tuple[Capture, dict[int, Prepared]]:
            taken = await take()
            return taken, self._plans.find("", taken)

        (taken, kept), answer = await operation.together(
            "capture", begin, facts=lambda begun: numbers_of(begun[1]), decide=agree_on_plan
        )
        prepared = kept.get(answer[0]) or await self._plans.make(operation, "", taken)

        async def have_stage() -> None:
            tail, _ = _lay_tail(prepared, taken)
            device = next((each for each in taken.devices if each.type not in HOST), None)
            await self._transfers[""].make_room(prepared.plan, tail.nbytes, pin_for=device)

        await operation.together("stage", have_stage)

    async def save(self, operation: Operation, place: int, take: Callable[[], Awaitable[Job]]) -> list[str]:
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

        async def begin() -> tuple[Job, dict[int, Prepared]]:
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
        wishes: Callable[[], Awaitable[Wish]],
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
        written: dict[int, Written] = {}

        async def write(branch: Operation, attempt: Attempt, number: int, wish: Wish) -> None:
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

    async def _write_part(self, operation: Operation, attempt: Attempt, wish: Wish, file: str) -> Written | None:
        """Write one of several states; or, when no more is wished for, agree on that with the other ranks."""

        async def begin() -> tuple[Job | None, dict[int, Prepared]]:
            await anyio.lowlevel.checkpoint()
            if wish.take is None:
                return None, {}
            job = await wish.take()
            return job, self._plans.find(wish.name, job.taken)

        (job, kept), answer = await operation.together(
            PART,
            begin,
            facts=lambda begun: [*numbers_of(begun[1]), zlib.crc32(wish.name.encode())],
            decide=_agree_on_part,
        )
        if job is None:
            return None
        async with self._sharing if self._share_transfer else nullcontext():
            return await self._write(operation, attempt, wish.name, job, kept.get(answer[0]), file)

    @asynccontextmanager
    async def _all_or_nothing(self, operation: Operation, checkpoint_id: str, save_id: str) -> AsyncIterator[Attempt]:
        """Remove what the block has written if it fails, unless it may have been committed all the same."""
        attempt = Attempt(checkpoint_id, save_id)
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
        self, operation: Operation, attempt: Attempt, name: str, job: Job, kept: Prepared | None, file: str
    ) -> Written:
        """Plan, stage, checksum and write one state, on all ranks."""
        voting = 0.0
        transfer = self._transfer_of(name)
        compares = operation.size > 1 and self._on_disagreement != "ignore"
        seed = int(attempt.save_id[:8], 16)

        async def write(prepared: Prepared) -> tuple[list[Item], int, int]:
            nonlocal voting
            tail, places = _lay_tail(prepared, job.taken)
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
        return Written(job=job, prepared=prepared, tables=tables)

    async def _commit(
        self, operation: Operation, attempt: Attempt, parts: Sequence[Written], note: Callable[[], bytes]
    ) -> CommitRecord | None:
        """Make what is written the checkpoint; return its record, on the coordinator."""
        place, save_id = attempt.checkpoint_id, attempt.save_id

        async def commit_all() -> CommitRecord | None:
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

    async def _told(self, jobs: Sequence[Job], record: CommitRecord | None, save_id: str) -> list[str]:
        """Tell those who wait that it is committed; return the files that are to be removed now."""
        for job in jobs:
            job.log.report("done")
            job.uploaded.reach()
        if record is None:
            return []
        return await find_replaced(self._storage, jobs[0].checkpoint_id, record.files(save_id))

    def _flags(self, has_planner: bool) -> int:
        return int(has_planner) | self._policy << 1

    def _transfer_of(self, name: str) -> Transfer:
        name = "" if self._share_transfer else name
        if name not in self._transfers:
            self._transfers[name] = self._make_transfer()
        return self._transfers[name]

    def _keep_only(self, names: set[str]) -> None:
        """Let go of host memory and plans of states that the last checkpoint had not."""
        self._transfers = {name: transfer for name, transfer in self._transfers.items() if name in names}
        self._plans.keep_only(names)


def agree_on_start(table: list[Row]) -> list[int]:
    """Return the number of the plan that all have kept, or 0, and the coordinator's id for the save."""
    if len({row[KEPT_PLANS] for row in table}) > 1:
        raise ArgumentError("checkpoint_id", "the ranks save to different places")
    if len({row[KEPT_PLANS + 3] & 1 for row in table}) > 1:
        raise ArgumentError("planner", "some ranks have one, others have not")
    if len(policies := {row[KEPT_PLANS + 3] >> 1 for row in table}) > 1:
        named = " and ".join(repr(POLICIES[each]) for each in sorted(policies))
        raise ArgumentError("on_disagreement", f"the ranks have {named}: it must be the same on all")
    return [*agree_on_plan(table), *table[0][KEPT_PLANS + 1 : KEPT_PLANS + 3]]


def _agree_on_part(table: list[Row]) -> list[int]:
    if len({row[KEPT_PLANS] for row in table}) > 1:
        raise ArgumentError("participant", "the ranks do not add the same, in the same order")
    return agree_on_plan(table)


def _lay_tail(prepared: Prepared, taken: Capture) -> tuple[Tail, list[Item]]:
    """Join the frozen values, and tell where in the file each lies."""
    pieces: list[bytes] = []
    crcs: list[int] = []
    items: list[Item] = []
    position = 0
    for place in prepared.plan.frozen:
        data = taken.frozen[place].archive()
        items.append(Item(offset=prepared.layout.tail + position, nbytes=len(data)))
        crcs.append(zlib.crc32(data))
        filled = round_up(len(data), ALIGNMENT)
        pieces.append(data.ljust(filled, b"\0"))
        position += filled
    return Tail(data=b"".join(pieces), crcs=crcs, items=len(prepared.layout.frames) + len(items)), items
