"""What saves of one structure have in common: the plan, made by all ranks together on the first save, and kept."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch.distributed.checkpoint.planner as dcp
from torch.distributed.checkpoint.planner import SavePlanner

from .._distributed.operation import Operation
from .._engine.gc_pause import gc_paused
from .._engine.threads import Threads, in_thread, in_thread_if_long
from .._format.arrays import Array
from .._format.layout import Layout
from .._log import SafeLogger
from .._state.capture import Capture
from ..errors import CheckpointError, DisagreementError, SaveError
from .holdings import RankGroup
from .manifest import ByteRange, ManifestTemplate, make_manifest
from .plan import GlobalPlan, LocalPlan, WritePlan
from .planning import finish_plan, plan_global, plan_local
from .sharing import OnDisagreement, SharedItems, SharingPlan, find_disagreements
from .start_agreement import KEPT_PLANS, LONGEST_PLAN_NBYTES, PlanProposal, PlanStart, agree_on_plan
from .state_table import StateTable, digest_of, pack_message, places_of, unpack_message
from .table_plan import TablePlan, plan_tables

log = SafeLogger(__name__)


WARNED_NAMES = 8  # named in one warning

FEW_RANKS = 8  # up to which a short state is planned for all of them as quickly as a thread is asked to

RANGE_NBYTES = 16  # by which a rank says where a frozen value lies


@dataclass(slots=True, kw_only=True)
class CachedPlan:
    """A plan, and all else that saves of one structure have in common.

    Attributes:
        number: the same on all ranks.
        plan: what this rank writes.
        manifest: `.metadata`, on the coordinator; of a state that is committed alone.
        planned: what all ranks write, on the coordinator; of a state that is committed with others.
        sharing: who holds the same, on the coordinator.
        frozen_ranges: where the frozen values of the last save lie: on the coordinator of every rank, else of this one.
    """

    number: int
    plan: WritePlan
    manifest: ManifestTemplate | None
    planned: GlobalPlan | TablePlan | None
    sharing: SharingPlan | None
    frozen_ranges: dict[int, list[ByteRange]]

    @property
    def layout(self) -> Layout:
        return self.plan.share.layout


class PlanCache:
    """The plans of one `Checkpointer`, by the name of the state; the one of a plain save has none."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._kept: dict[str | None, list[CachedPlan]] = {}
        self._joined: tuple[list[CachedPlan], ManifestTemplate] | None = None  # the last commit of several states
        self._made = 0
        self._disagreed: set[str] = set()  # fqns on which the ranks disagree: reported once, on all ranks alike

    async def begin(
        self,
        operation: Operation,
        name: str | None,
        captured: Capture,
        planner: SavePlanner | None = None,
        *,
        piece_nbytes: int | None,
    ) -> PlanRequest:
        """Look for the plans that are kept for what this rank has, or plan its part anew.

        Args:
            operation: the ranks that plan together.
            name: of the state.
            captured: the state.
            planner: the caller's own.
            piece_nbytes: as for `plan_local`.
        """
        kept = {
            cached.number: cached for cached in self._kept.get(name, ()) if cached.plan.fits(captured, piece_nbytes)
        }
        request = PlanRequest(name=name, captured=captured, planner=planner, piece_nbytes=piece_nbytes, kept=kept)
        if not kept:
            await self._plan_own(operation, request)
        return request

    async def make(
        self, operation: Operation, request: PlanRequest, start: PlanStart
    ) -> Callable[[], Awaitable[CachedPlan]]:
        """Plan anew, all ranks together, unless they have agreed on a kept plan.

        Returns:
            What finishes this rank's part, and keeps the plan: for the next phase to begin with, so that all hear of
            it if that fails. Who has not kept it will not propose it.
        """
        name, captured, planner = request.name, request.captured, request.planner
        if start.kept:
            kept = request.kept[start.kept]

            async def keep() -> CachedPlan:
                return kept

            return keep
        is_alone = operation.size == 1
        is_short = captured.is_short and planner is None and operation.size <= FEW_RANKS
        own, messages = await self._gather(operation, request, start)

        async def plan_globally() -> tuple[GlobalPlan | TablePlan, ManifestTemplate | None, list[bytes]] | None:
            if not operation.is_coordinator:
                return None
            plan_all = partial(plan_for_all, messages, own, planner, operation.rank, for_itself=name is None)
            return await in_thread_if_long(is_short, self._threads.compute, plan_all)

        self._made += 1
        planned, (number, longest, *_) = await operation.run_phase(
            "plan",
            plan_globally,
            propose=lambda planned: [self._made, max(map(len, planned[2])) if planned else 0],
            agree=lambda table: [max(row[0] for row in table), max(row[1] for row in table)],
        )
        self._made = number
        share, manifest, joined, sharing = None, None, None, None
        if planned is not None:
            plan, manifest, parts = planned
            share = plan.shares[operation.rank] if isinstance(plan, GlobalPlan) else None
            sharing, mine = plan.sharing, parts[operation.rank]
            joined = None if name is None else plan
        if not is_alone:
            mine = await operation.scatter(parts if planned is not None else [], longest)

        async def finish() -> CachedPlan:
            if planner is None:
                written, shared = _unpack_part(mine)
            else:
                written, shared, accepted = pickle.loads(mine)
                _finish_planner(planner, accepted)
            complete = partial(finish_plan, captured, own.local, written, shared, share)
            plan = await in_thread_if_long(captured.is_short, self._threads.compute, complete)
            plan.comparison.exclude(self._disagreed)
            cached = CachedPlan(
                number=number, plan=plan, manifest=manifest, planned=joined, sharing=sharing, frozen_ranges={}
            )
            self._kept[name] = [cached, *self._kept.get(name, [])[: KEPT_PLANS - 1]]
            return cached

        return finish

    async def _plan_own(self, operation: Operation, request: PlanRequest) -> LocalMessage:
        """Plan this rank's part, unless that is done."""
        if request.own is None:
            form: Form = "none" if operation.size == 1 else "table" if request.planner is None else "pickle"
            plan = partial(_plan_here, request, form, operation.rank)
            request.own = await in_thread_if_long(request.captured.is_short, self._threads.compute, plan)
        return request.own

    async def _gather(
        self, operation: Operation, request: PlanRequest, start: PlanStart
    ) -> tuple[LocalMessage, list[bytes]]:
        """Return this rank's part, and on the coordinator what all ranks have sent of theirs."""
        if operation.size == 1:
            return await self._plan_own(operation, request), []
        if not start.longest_nbytes:  # some ranks had kept a plan that others have not
            _, row = await operation.run_phase(
                "plan",
                partial(self._plan_own, operation, request),
                propose=lambda _: request.proposal.to_row(),
                agree=partial(agree_on_plan, coordinator=operation.rank),
            )
            start = PlanStart.from_row(row)
        own = await self._plan_own(operation, request)
        message = own.without_table if own.digest == start.known else own.whole
        return own, await operation.gather(message, start.longest_nbytes)

    async def compare(self, operation: Operation, cached: CachedPlan, policy: OnDisagreement) -> None:
        """Find the names on which the ranks disagree, and say so, once a name.

        Raises:
            RankError: `policy` is "raise".
        """
        comparison = cached.plan.comparison
        checksums = await operation.gather(comparison.packed())

        async def find() -> dict[str, int]:
            if cached.sharing is None:
                return {}
            found = await in_thread(self._threads.compute, find_disagreements, cached.sharing, checksums)
            if policy == "raise":
                raise DisagreementError(list(found))
            return found

        found, _ = await operation.run_phase("compare", find)
        new = {fqn: rank for fqn, rank in found.items() if fqn not in self._disagreed}
        if new:
            _warn({fqn: operation.world_rank(rank) for fqn, rank in new.items()})
        fqns = json.loads(await operation.broadcast(json.dumps(list(found)).encode()))
        self._disagreed.update(fqns)
        for each in [cached, *(each for kept in self._kept.values() for each in kept)]:
            each.plan.comparison.exclude(self._disagreed)

    async def share_frozen_ranges(
        self, operation: Operation, cached: CachedPlan, ranges: list[ByteRange], longest: int
    ) -> None:
        """Send the coordinator where the frozen values lie, which only changes when one of them grows or shrinks.

        Args:
            operation: the ranks.
            cached: the plan.
            ranges: where this rank's lie.
            longest: bytes by which a rank says so, at most.
        """
        flat = [number for item in ranges for number in (item.offset, item.nbytes)]
        for rank, data in enumerate(await operation.gather(struct.pack(f"<{len(flat)}q", *flat), longest)):
            numbers = struct.iter_unpack("<qq", data)
            cached.frozen_ranges[rank] = [ByteRange(offset=offset, nbytes=nbytes) for offset, nbytes in numbers]
        cached.frozen_ranges[operation.rank] = ranges

    async def manifest_of(self, parts: list[CachedPlan]) -> ManifestTemplate:
        if parts[0].manifest is not None:
            return parts[0].manifest
        known = self._joined
        if known is not None and list(map(id, known[0])) == list(map(id, parts)):
            return known[1]
        planned = [part.planned for part in parts if part.planned is not None]
        manifest = await in_thread(self._threads.compute, _make_manifest, planned)
        self._joined = parts, manifest
        return manifest

    def forget(self) -> None:
        """Forget all plans: the other ranks may not have kept the same."""
        self._kept.clear()
        self._joined = None

    def keep_only(self, names: set[str | None]) -> None:
        """Forget the plans of all other states."""
        self._kept = {name: kept for name, kept in self._kept.items() if name in names}


def _make_manifest(plans: Sequence[GlobalPlan | TablePlan]) -> ManifestTemplate:
    with gc_paused():
        return make_manifest(plans)


def _warn(disagreed: Mapping[str, int]) -> None:
    """Say whose values are saved, by the ranks of the world."""
    named = [f"{fqn} (rank {rank}'s is saved)" for fqn, rank in list(disagreed.items())[:WARNED_NAMES]]
    more = f" and {len(disagreed) - WARNED_NAMES} more" if len(disagreed) > WARNED_NAMES else ""
    log.warning(
        "the ranks hold different values of %s%s: wrap what is each rank's own in aiodcp.PerRank",
        ", ".join(named),
        more,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalMessage:
    """A rank's own plan, and what it sends of it.

    Attributes:
        local: the plan.
        table: what it has in common with other ranks, as text; empty if there are none, or the caller's own planner is
            to see the plan itself.
        digest: of the table.
        whole: what the coordinator needs of the plan.
        without_table: the same, if it knows the table.
    """

    local: LocalPlan
    table: bytes = b""
    digest: int = 0
    whole: bytes = b""
    without_table: bytes = b""


Form = Literal["table", "pickle", "none"]
"""In which form a plan is sent: as a table, pickled for the caller's own planner, or not at all."""


@dataclass(slots=True, kw_only=True)
class PlanRequest:
    """What this rank wants planned.

    Attributes:
        name, captured, planner, piece_nbytes: as `PlanCache.begin` was given.
        kept: the plans that it could use, by number: it may have kept them while what others hold has changed.
        own: its part of a new one, once that is planned.
    """

    name: str | None
    captured: Capture
    planner: SavePlanner | None
    piece_nbytes: int | None
    kept: dict[int, CachedPlan]
    own: LocalMessage | None = None

    @property
    def proposal(self) -> PlanProposal:
        """What it brings to the plan."""
        kept, own = [*self.kept], self.own
        if own is None:
            return PlanProposal(kept=kept)
        whole, rest = len(own.whole), len(own.without_table)
        return PlanProposal(kept=kept, digest=own.digest, whole_nbytes=whole, rest_nbytes=rest)


def _plan_here(request: PlanRequest, form: Form, rank: int) -> LocalMessage:
    with _planning_errors(), gc_paused():
        message = message_of(plan_local(request.captured, request.piece_nbytes), form, rank)
    if len(message.whole) > LONGEST_PLAN_NBYTES:
        raise SaveError(f"this rank's plan takes {len(message.whole)} bytes, more than can be sent")
    return message


def message_of(local: LocalPlan, form: Form, rank: int) -> LocalMessage:
    """Return a rank's plan with what is sent of it."""
    if form == "none":
        return LocalMessage(local=local)
    if form == "pickle":
        pickled = pickle.dumps(local)
        return LocalMessage(local=local, whole=pickled, without_table=pickled)
    table, places = StateTable.of(local, rank).pack(), places_of(local)
    return LocalMessage(
        local=local,
        table=table,
        digest=digest_of(table),
        whole=pack_message(table, places),
        without_table=pack_message(b"", places),
    )


def plan_for_all(
    messages: Sequence[bytes], mine: LocalMessage, planner: SavePlanner | None, rank: int, *, for_itself: bool = True
) -> tuple[GlobalPlan | TablePlan, ManifestTemplate | None, list[bytes]]:
    """Plan, on the coordinator, from what all ranks have sent; with what each of them gets.

    Args:
        messages: by rank; not looked at if there is only one.
        mine: the coordinator's own.
        planner: the caller's own.
        rank: the coordinator's.
        for_itself: whether the state is committed by itself: then with `.metadata`.
    """
    with _planning_errors(), gc_paused():
        plan: GlobalPlan | TablePlan
        if planner is not None:
            locals_ = [mine.local if each == rank else pickle.loads(data) for each, data in enumerate(messages)]
            plan = plan_global(locals_ or [mine.local], planner)
            parts = [pickle.dumps(part) for part in zip(plan.kept, plan.sharing.parts, plan.plans, strict=True)]
        else:
            plan = plan_tables(_group(messages, mine))
            parts = [_pack_part(*part) for part in zip(plan.kept, plan.sharing.parts, strict=True)]
        return plan, make_manifest([plan]) if for_itself else None, parts


def _group(messages: Sequence[bytes], mine: LocalMessage) -> list[RankGroup]:
    """Return the ranks, those with the same table together."""
    if len(messages) < 2:
        alone = places_of(mine.local).reshape(1, -1)
        return [RankGroup(table=StateTable.of(mine.local), ranks=np.zeros(1, dtype=np.int64), places=alone)]
    places: dict[bytes, list[tuple[int, Array]]] = {}
    for rank, message in enumerate(messages):
        table, numbers = unpack_message(message)
        places.setdefault(table or mine.table, []).append((rank, numbers))
    return [
        RankGroup(
            table=StateTable.unpack(table),
            ranks=np.array([rank for rank, _ in rows], dtype=np.int64),
            places=np.stack([numbers for _, numbers in rows]),
        )
        for table, rows in places.items()
    ]


def _pack_part(kept: Array, shared: SharedItems) -> bytes:
    return len(kept).to_bytes(8, "little") + kept.astype(np.int32).tobytes() + shared.pack()


def _unpack_part(part: bytes) -> tuple[list[int], SharedItems]:
    """Return which items of its local plan a rank writes, and which it shares."""
    count = int.from_bytes(part[:8], "little")
    kept = np.frombuffer(part, dtype=np.int32, offset=8, count=count)
    return kept.tolist(), SharedItems.unpack(part[8 + 4 * count :])


def _finish_planner(planner: SavePlanner, plan: dcp.SavePlan) -> None:
    """Let the caller's planner see its part of the global plan, which by then is settled."""
    with _planning_errors():
        finished = planner.finish_plan(plan)
        if [item.index for item in finished.items] != [item.index for item in plan.items]:
            raise SaveError(f"{type(planner).__name__}.finish_plan() changed the items of the global plan")


@contextmanager
def _planning_errors() -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise SaveError(f"planning failed: {error!r}") from error
