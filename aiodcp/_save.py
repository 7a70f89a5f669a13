"""The save flow: capture, plan, stage, checksum, write, vote, commit. Runs on the engine's loop.

Stage, checksum and write are each rank's own (`_transfer`), all else is done together. Nothing that is written counts
before the commit.
"""

from __future__ import annotations

import logging
import pickle
import struct
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest

import anyio
import torch.distributed.checkpoint.planner as dcp
from torch.distributed.checkpoint.planner import SavePlanner

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
from ._devices import is_on_device
from ._engine import Threads, in_thread
from ._judge import Row
from ._layout import ALIGNMENT, Layout, round_up
from ._names import METADATA_NAME, data_file
from ._plan import GlobalPlan, LocalPlan, SavePlan, finish_plan, plan_global, plan_local
from ._ranks import Operation
from ._transfer import Job, Transfer, write_errors
from .errors import ArgumentError, CheckpointError, SaveError
from .metadata import gc_held_off
from .storage import Storage

_log = logging.getLogger("aiodcp")

WARNED_NAMES = 8  # named in one warning
KEPT_PLANS = 4  # structures remembered: a run saves one or two, and each costs a few MB for 10,000 tensors


@dataclass(slots=True, kw_only=True)
class Prepared:
    """All that saves of one structure have in common.

    Attributes:
        number: the same on all ranks.
        plan: what this rank writes.
        record: `.metadata`, on the coordinator.
        places: where the frozen values of the last save lie: on the coordinator of every rank, else of this one.
    """

    number: int
    plan: SavePlan
    record: CommitRecord | None
    places: dict[int, list[Item]]

    @property
    def layout(self) -> Layout:
        return self.plan.share.layout


class Saver:
    """Plans and host memory kept from save to save. One flow at a time: its user holds the semaphore."""

    def __init__(self, storage: Storage, threads: Threads, transfer: Transfer) -> None:
        self._storage = storage
        self._threads = threads
        self._transfer = transfer
        self._kept: list[Prepared] = []
        self._plans = 0
        self._warned: set[str] = set()  # fqns on which the ranks disagree: told once

    async def prepare(self, operation: Operation, take: Callable[[], Awaitable[Capture]]) -> None:
        """Plan, and have host memory ready, so that the first save is as quick as the others."""

        async def begin() -> tuple[Capture, dict[int, Prepared]]:
            taken = await take()
            return taken, self._find_kept(taken)

        (taken, kept), answer = await operation.together(
            "capture", begin, facts=lambda begun: _numbers(begun[1]), decide=_agree_on_plan
        )
        prepared = kept.get(answer[0]) or await self._plan(operation, taken)

        async def have_stage() -> None:
            tail, _ = _lay_tail(prepared, taken)
            await self._transfer.make_room(prepared.plan, len(tail), pin=is_on_device(taken.values))

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
            return job, self._find_kept(job.taken)

        halves = struct.unpack("<qq", uuid.uuid4().bytes)
        (job, kept), answer = await operation.together(
            "capture",
            begin,
            facts=lambda begun: [*_numbers(begun[1]), place, *halves, begun[0].planner is not None],
            decide=agree_on_start,
        )
        save_id = struct.pack("<qq", *answer[1:3]).hex()
        file = data_file(operation.rank, save_id)
        with live(save_id):
            record = await self._save(operation, job, kept.get(answer[0]), save_id, file)
            job.log.report("done")
            job.uploaded.reach()
            if record is None:
                return []
            return await find_replaced(self._storage, job.checkpoint_id, record.files(save_id))

    async def _save(
        self, operation: Operation, job: Job, kept: Prepared | None, save_id: str, file: str
    ) -> CommitRecord | None:
        writing = written = committing = False
        voting = 0.0

        async def write(prepared: Prepared) -> list[Item]:
            nonlocal writing, written, voting
            tail, places = _lay_tail(prepared, job.taken)
            room = await self._transfer.make_room(prepared.plan, len(tail), pin=bool(job.crossing))
            writing = True
            await self._transfer.run(job, prepared.plan, room, tail, file)
            written = True
            voting = time.perf_counter()
            return places

        async def commit_all(prepared: Prepared) -> None:
            if prepared.record is not None:
                await anyio.lowlevel.checkpoint()  # the last moment at which a cancelled save is not committed
                places = [prepared.places[rank] for rank in range(operation.size)]
                record = prepared.record.render(job.checkpoint_id, save_id, places) + job.note
                with write_errors(self._storage.locate(job.checkpoint_id, METADATA_NAME)):
                    await commit(self._storage, job.checkpoint_id, record, prepared.record.files(save_id))

        try:
            prepared = kept or await self._plan(operation, job.taken, job.planner)
            captured = job.timeline.between("capture")
            assert captured is not None
            job.timeline.add("plan", captured[1])
            places, answer = await operation.together(
                "write",
                lambda: write(prepared),
                facts=lambda places: [prepared.places.get(operation.rank) != places],
                decide=lambda table: [any(row[0] for row in table)],
            )
            if answer[0]:
                await self._share_places(operation, prepared, places)
            job.timeline.add("vote", voting)
            job.log.report("commit")
            committing = True
            with job.timeline.record("commit"):
                await operation.together("commit", lambda: commit_all(prepared), last=True)
        except BaseException:
            if not operation.agreed:
                self._kept.clear()  # the others may not have kept the same
            kept_data = written and (
                not operation.agreed  # the coordinator may have gone on to the commit
                or (committing and await may_be_committed(self._storage, job.checkpoint_id, save_id))
            )
            if writing and not kept_data:
                await remove_files(self._storage, job.checkpoint_id, [file])
            await forget_empty(self._storage, job.checkpoint_id)
            raise
        finally:
            self._transfer.done()
        return prepared.record

    def _find_kept(self, taken: Capture) -> dict[int, Prepared]:
        """Return the plans for what this rank has, by number: it may be the same while that of others differs."""
        return {prepared.number: prepared for prepared in self._kept if prepared.plan.fits(taken)}

    async def _plan(self, operation: Operation, taken: Capture, planner: SavePlanner | None = None) -> Prepared:
        """Plan anew, all ranks together."""
        alone = operation.size == 1

        async def plan_here() -> tuple[LocalPlan, bytes]:
            return await in_thread(self._threads.compute, _plan_here, taken, alone)

        (local, message), _ = await operation.together("plan", plan_here)
        messages = [] if alone else await operation.gather(message)

        async def plan_globally() -> tuple[GlobalPlan, CommitRecord, list[bytes]] | None:
            if not operation.is_coordinator:
                return None
            return await in_thread(self._threads.compute, plan_for_all, [local] if alone else messages, planner)

        self._plans += 1
        planned, answer = await operation.together(
            "plan", plan_globally, facts=lambda _: [self._plans], decide=lambda table: [max(row[0] for row in table)]
        )
        self._plans = answer[0]
        share, record = None, None
        if planned is not None:
            plan, record, parts = planned
            share, mine = plan.shares[operation.rank], parts[operation.rank]
            self._warn(plan.disagreed)
        if not alone:
            mine = await operation.scatter(parts if planned is not None else [])

        async def finish() -> Prepared:
            kept, accepted = pickle.loads(mine)
            if planner is not None:
                _accept(planner, accepted)
            finished = await in_thread(self._threads.compute, finish_plan, taken, local, kept, share)
            return Prepared(number=self._plans, plan=finished, record=record, places={})

        prepared, _ = await operation.together("plan", finish)
        self._kept = [prepared, *self._kept[: KEPT_PLANS - 1]]
        return prepared

    def _warn(self, disagreed: Sequence[str]) -> None:
        new = [fqn for fqn in disagreed if fqn not in self._warned]
        self._warned.update(new)
        if new:
            more = f" and {len(new) - WARNED_NAMES} more" if len(new) > WARNED_NAMES else ""
            _log.warning(
                "the ranks hold different values of %s%s; of each only one rank's is saved: wrap what is each rank's "
                "own in aiodcp.PerRank",
                ", ".join(new[:WARNED_NAMES]),
                more,
            )

    async def _share_places(self, operation: Operation, prepared: Prepared, places: list[Item]) -> None:
        """Tell the coordinator where the frozen values lie, which only changes when one of them grows or shrinks."""
        flat = [number for item in places for number in (item.offset, item.nbytes)]
        for rank, data in enumerate(await operation.gather(struct.pack(f"<{len(flat)}q", *flat))):
            numbers = struct.iter_unpack("<qq", data)
            prepared.places[rank] = [Item(offset=offset, nbytes=nbytes) for offset, nbytes in numbers]
        prepared.places[operation.rank] = places


def _plan_here(taken: Capture, alone: bool) -> tuple[LocalPlan, bytes]:
    with _planning_errors():
        local = plan_local(taken, alone=alone)
        return local, b"" if alone else pickle.dumps(local)


def plan_for_all(
    plans: Sequence[LocalPlan | bytes], planner: SavePlanner | None
) -> tuple[GlobalPlan, CommitRecord, list[bytes]]:
    """Plan, on the coordinator, from what all ranks have sent; with what each of them gets.

    The parts are pickles of what the rank writes of its local plan, and of the planner's plan for it if there is one.
    """
    with _planning_errors(), gc_held_off():
        plan = plan_global([each if isinstance(each, LocalPlan) else pickle.loads(each) for each in plans], planner)
        parts = [pickle.dumps(part) for part in zip_longest(plan.kept, plan.plans)]
        return plan, CommitRecord(plan), parts


def _accept(planner: SavePlanner, plan: dcp.SavePlan) -> None:
    """Let the caller's planner see its part of the global plan, which by then is settled."""
    with _planning_errors():
        finished = planner.finish_plan(plan)
        if [item.index for item in finished.items] != [item.index for item in plan.items]:
            raise SaveError(f"finish_plan of {type(planner).__name__} returned other items than the global plan's")


@contextmanager
def _planning_errors() -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise SaveError(f"planning failed: {error!r}") from error


def _numbers(kept: Iterable[int]) -> list[int]:
    return [*kept, *[0] * KEPT_PLANS][:KEPT_PLANS]


def _agree_on_plan(table: list[Row]) -> list[int]:
    """A kept plan is used if every rank has kept it, and nothing has changed on any; else 0: plan anew."""
    return [max(set.intersection(*({0, *row[:KEPT_PLANS]} for row in table)))]


def agree_on_start(table: list[Row]) -> list[int]:
    """Return the number of the plan that all have kept, or 0, and the coordinator's id for the save."""
    if len({row[KEPT_PLANS] for row in table}) > 1:
        raise ArgumentError("checkpoint_id", "the ranks save to different places")
    if len({row[KEPT_PLANS + 3] for row in table}) > 1:
        raise ArgumentError("planner", "some ranks have one, others have not")
    return [*_agree_on_plan(table), *table[0][KEPT_PLANS + 1 : KEPT_PLANS + 3]]


def _lay_tail(prepared: Prepared, taken: Capture) -> tuple[bytes, list[Item]]:
    """Join the frozen values, and tell where in the file each lies."""
    pieces: list[bytes] = []
    items: list[Item] = []
    position = 0
    for place in prepared.plan.frozen:
        data = taken.frozen[place].archive()
        items.append(Item(offset=prepared.layout.tail + position, nbytes=len(data)))
        filled = round_up(len(data), ALIGNMENT)
        pieces.append(data.ljust(filled, b"\0"))
        position += filled
    return b"".join(pieces), items
