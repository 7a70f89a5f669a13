"""What the ranks must agree on before a save begins: where to, with which plan, by which rules."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .._distributed.votes import Row
from ..errors import ArgumentError
from .sharing import POLICIES, OnDisagreement

KEPT_PLANS = 4  # structures remembered of a state: a run saves one or two, and each costs a few MB for 10,000 tensors

_SAVE_ID = struct.Struct("<qq")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanProposal:
    """Which of its kept plans a rank could use: the number of each."""

    plans: Sequence[int]

    def to_row(self) -> Row:
        """Return it as integers: as many as plans are kept, 0 for none."""
        return [*self.plans, *[0] * KEPT_PLANS][:KEPT_PLANS]


def agree_on_plan(table: Iterable[Row]) -> Row:
    """A kept plan is used if every rank has kept it, and nothing has changed on any; else 0: plan anew."""
    return [max(set.intersection(*({0, *row[:KEPT_PLANS]} for row in table)))]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveProposal:
    """What a rank begins a save with.

    Attributes:
        plans: numbers of the kept plans that it could use.
        id_digest: of the checkpoint's id.
        save_id: that the save would have if this rank were the coordinator: 32 hexadecimal digits.
        has_planner: whether the caller gave a planner.
        on_disagreement: the caller's choice.
    """

    plans: Sequence[int]
    id_digest: int
    save_id: str
    has_planner: bool
    on_disagreement: OnDisagreement

    def to_row(self) -> Row:
        """Return it as integers."""
        return [
            *PlanProposal(plans=self.plans).to_row(),
            self.id_digest,
            *_SAVE_ID.unpack(bytes.fromhex(self.save_id)),
            int(self.has_planner) | POLICIES.index(self.on_disagreement) << 1,
        ]

    @classmethod
    def from_row(cls, row: Row) -> SaveProposal:
        """Return what `to_row` was given."""
        id_digest, high, low, flags = row[KEPT_PLANS : KEPT_PLANS + 4]
        return cls(
            plans=row[:KEPT_PLANS],
            id_digest=id_digest,
            save_id=_SAVE_ID.pack(high, low).hex(),
            has_planner=bool(flags & 1),
            on_disagreement=POLICIES[flags >> 1],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveStart:
    """What all ranks begin a save with.

    Attributes:
        plan: number of the kept plan that is used; 0 to plan anew.
        save_id: the coordinator's.
    """

    plan: int
    save_id: str

    def to_row(self) -> Row:
        """Return it as integers."""
        return [self.plan, *_SAVE_ID.unpack(bytes.fromhex(self.save_id))]

    @classmethod
    def from_row(cls, row: Row) -> SaveStart:
        """Return what `to_row` was given."""
        return cls(plan=row[0], save_id=_SAVE_ID.pack(*row[1:3]).hex())


def agree_on_save(table: list[Row]) -> Row:
    """Agree on a plan, and on the coordinator's id for the save.

    Raises:
        ArgumentError: the ranks' callers want different things.
    """
    proposals = [SaveProposal.from_row(row) for row in table]
    if len({each.id_digest for each in proposals}) > 1:
        raise ArgumentError("checkpoint_id", "the ranks save to different checkpoints")
    if len({each.has_planner for each in proposals}) > 1:
        raise ArgumentError("planner", "passed on some ranks, not on others")
    if len(policies := {each.on_disagreement for each in proposals}) > 1:
        named = " and ".join(repr(each) for each in POLICIES if each in policies)
        raise ArgumentError("on_disagreement", f"must be the same on all ranks, got {named}")
    [plan] = agree_on_plan(table)
    return SaveStart(plan=plan, save_id=proposals[0].save_id).to_row()


@dataclass(frozen=True, slots=True, kw_only=True)
class PartProposal:
    """What a rank adds to a save of several states.

    Attributes:
        plans: numbers of the kept plans that it could use.
        name: of the state; None to commit.
    """

    plans: Sequence[int]
    name: str | None

    def to_row(self) -> Row:
        """Return it as integers, of the name only a checksum."""
        return [*PlanProposal(plans=self.plans).to_row(), zlib.crc32((self.name or "").encode())]


def agree_on_part(table: list[Row]) -> Row:
    """Agree on a plan.

    Raises:
        ArgumentError: the ranks add different states.
    """
    if len({row[KEPT_PLANS] for row in table}) > 1:
        raise ArgumentError("participant", "all ranks must add the same participants in the same order")
    return agree_on_plan(table)
