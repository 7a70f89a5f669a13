"""What saves of one structure have in common: the plan, made by all ranks together on the first save, and kept."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest

import torch.distributed.checkpoint.planner as dcp
from torch.distributed.checkpoint.planner import SavePlanner

from .._distributed.operation import Operation
from .._engine.gc_pause import gc_paused
from .._engine.threads import Threads, in_thread
from .._format.layout import Layout
from .._log import SafeLogger
from .._state.capture import Capture
from ..errors import CheckpointError, DisagreementError, SaveError
from .manifest import ByteRange, ManifestTemplate
from .plan import GlobalPlan, LocalPlan, WritePlan
from .planning import finish_plan, plan_global, plan_local
from .sharing import OnDisagreement, SharingPlan, find_disagreements
from .start_agreement import KEPT_PLANS

log = SafeLogger(__name__)


WARNED_NAMES = 8  # named in one warning


@dataclass(slots=True, kw_only=True)
class CachedPlan:
    """A plan, and all else that saves of one structure have in common.

    Attributes:
        number: the same on all ranks.
        plan: what this rank writes.
        manifest: `.metadata`, on the coordinator; of a state that is committed alone.
        planned: what all ranks write, on the coordinator; of one that is committed with others.
        sharing: who holds the same, on the coordinator.
        frozen_ranges: where the frozen values of the last save lie: on the coordinator of every rank, else of this one.
    """

    number: int
    plan: WritePlan
    manifest: ManifestTemplate | None
    planned: GlobalPlan | None
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

    def find(self, name: str | None, captured: Capture, piece_nbytes: int | None) -> dict[int, CachedPlan]:
        """Return the plans for what this rank has, by number: it may be the same while that of others differs."""
        kept = self._kept.get(name, ())
        return {cached.number: cached for cached in kept if cached.plan.fits(captured, piece_nbytes)}

    async def make(
        self,
        operation: Operation,
        name: str | None,
        captured: Capture,
        planner: SavePlanner | None = None,
        *,
        piece_nbytes: int | None = None,
    ) -> CachedPlan:
        """Plan anew, all ranks together, and keep the plan; `piece_nbytes` as for `plan_local`."""
        is_alone = operation.size == 1

        async def plan_here() -> tuple[LocalPlan, bytes]:
            return await in_thread(self._threads.compute, _plan_here, captured, piece_nbytes, is_alone)

        (local, message), _ = await operation.run_phase("plan", plan_here)
        messages = [] if is_alone else await operation.gather(message)

        async def plan_globally() -> tuple[GlobalPlan, ManifestTemplate | None, list[bytes]] | None:
            if not operation.is_coordinator:
                return None
            locals_ = [local] if is_alone else messages
            return await in_thread(self._threads.compute, plan_for_all, locals_, planner, name is None)

        self._made += 1
        planned, (number, *_) = await operation.run_phase(
            "plan", plan_globally, propose=lambda _: [self._made], agree=lambda table: [max(row[0] for row in table)]
        )
        self._made = number
        share, manifest, joined, sharing = None, None, None, None
        if planned is not None:
            plan, manifest, parts = planned
            share, sharing, mine = plan.shares[operation.rank], plan.sharing, parts[operation.rank]
            joined = None if name is None else plan
        if not is_alone:
            mine = await operation.scatter(parts if planned is not None else [])

        async def finish() -> CachedPlan:
            kept, shared, accepted = pickle.loads(mine)
            if planner is not None:
                _finish_planner(planner, accepted)
            finished = await in_thread(self._threads.compute, finish_plan, captured, local, kept, shared, share)
            finished.comparison.exclude(self._disagreed)
            return CachedPlan(
                number=number, plan=finished, manifest=manifest, planned=joined, sharing=sharing, frozen_ranges={}
            )

        cached, _ = await operation.run_phase("plan", finish)
        self._kept[name] = [cached, *self._kept.get(name, [])[: KEPT_PLANS - 1]]
        return cached

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

    async def share_frozen_ranges(self, operation: Operation, cached: CachedPlan, ranges: list[ByteRange]) -> None:
        """Send the coordinator where the frozen values lie, which only changes when one of them grows or shrinks."""
        flat = [number for item in ranges for number in (item.offset, item.nbytes)]
        for rank, data in enumerate(await operation.gather(struct.pack(f"<{len(flat)}q", *flat))):
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

    def keep_only(self, names: set[str | None]) -> None:
        """Forget the plans of all other states."""
        self._kept = {name: kept for name, kept in self._kept.items() if name in names}


def _make_manifest(plans: Sequence[GlobalPlan]) -> ManifestTemplate:
    with gc_paused():
        return ManifestTemplate(*plans)


def _warn(disagreed: Mapping[str, int]) -> None:
    """Say whose values are saved, by the ranks of the world."""
    named = [f"{fqn} (rank {rank}'s is saved)" for fqn, rank in list(disagreed.items())[:WARNED_NAMES]]
    more = f" and {len(disagreed) - WARNED_NAMES} more" if len(disagreed) > WARNED_NAMES else ""
    log.warning(
        "the ranks hold different values of %s%s: wrap what is each rank's own in aiodcp.PerRank",
        ", ".join(named),
        more,
    )


def _plan_here(captured: Capture, piece_nbytes: int | None, is_alone: bool) -> tuple[LocalPlan, bytes]:
    with _planning_errors():
        local = plan_local(captured, piece_nbytes)
        return local, b"" if is_alone else pickle.dumps(local)


def plan_for_all(
    plans: Sequence[LocalPlan | bytes], planner: SavePlanner | None, for_itself: bool = True
) -> tuple[GlobalPlan, ManifestTemplate | None, list[bytes]]:
    """Plan, on the coordinator, from what all ranks have sent; with what each of them gets.

    With `.metadata`, if the state is to be committed by itself. The parts are pickles of what the rank writes of its
    local plan, and of the planner's plan for it if there is one.
    """
    with _planning_errors(), gc_paused():
        plan = plan_global([each if isinstance(each, LocalPlan) else pickle.loads(each) for each in plans], planner)
        parts = [pickle.dumps(part) for part in zip_longest(plan.kept, plan.sharing.parts, plan.plans)]
        return plan, ManifestTemplate(plan) if for_itself else None, parts


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
