"""What the ranks must agree on before a save begins: where to, with which plan, by which rules."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from .._distributed.votes import Proposal, Row
from ..errors import ArgumentError
from .sharing import POLICIES, OnDisagreement

KEPT_PLANS = 4  # structures remembered of a state: a run saves one or two, and each costs a few MB for 10,000 tensors

_SAVE_ID = struct.Struct("<qq")

_LENGTH_BITS = 32

LONGEST_PLAN_NBYTES = (1 << 31) - 1  # of what a rank sends of its part: two lengths are one integer


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanProposal:
    """What a rank brings to a plan.

    Attributes:
        kept: numbers of the kept plans that it could use.
        digest: of the table of its own part of a new one.
        whole_nbytes: of that part, as it is sent; 0 if it has not planned anew.
        rest_nbytes: of it without the table.
    """

    kept: Sequence[int] = ()
    digest: int = 0
    whole_nbytes: int = 0
    rest_nbytes: int = 0

    def to_row(self) -> Row:
        """Return it as integers; 0 in place of plans that are not kept."""
        kept = [*self.kept, *[0] * KEPT_PLANS][:KEPT_PLANS]
        return [*kept, self.digest, self.whole_nbytes << _LENGTH_BITS | self.rest_nbytes]

    @classmethod
    def from_row(cls, row: Row) -> PlanProposal:
        """Return what `to_row` was given."""
        digest, lengths = row[KEPT_PLANS:_PLAN_LENGTH]
        whole, rest = divmod(lengths, 1 << _LENGTH_BITS)
        return cls(kept=row[:KEPT_PLANS], digest=digest, whole_nbytes=whole, rest_nbytes=rest)


_PLAN_LENGTH = len(PlanProposal().to_row())


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanStart(Proposal):
    """What all ranks plan with.

    Attributes:
        kept: number of the kept plan that is used; 0 to plan anew.
        known: digest of the coordinator's table, which nobody else need send.
        longest_nbytes: of what any rank sends; 0 if they do not all know that yet, or send nothing.
    """

    kept: int
    known: int = 0
    longest_nbytes: int = 0


def agree_on_plan(table: list[Row], coordinator: int) -> Row:
    """A kept plan is used if every rank has kept it, and nothing has changed on any; else all plan anew."""
    return _agreed_plan(table, coordinator).to_row()


def _agreed_plan(table: list[Row], coordinator: int) -> PlanStart:
    kept = max(set.intersection(*({0, *row[:KEPT_PLANS]} for row in table)))
    if kept:
        return PlanStart(kept=kept)
    proposals = [PlanProposal.from_row(row) for row in table]
    if not all(each.whole_nbytes for each in proposals):
        return PlanStart(kept=0)
    known = proposals[coordinator].digest
    sent = (each.rest_nbytes if each.digest == known else each.whole_nbytes for each in proposals)
    return PlanStart(kept=0, known=known, longest_nbytes=max(sent))


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveProposal:
    """What a rank begins a save with.

    Attributes:
        plan: what it brings to the plan.
        id_digest: of the checkpoint's id.
        has_planner: whether the caller gave a planner.
        overwrites: whether a checkpoint that is there may be replaced.
        on_disagreement: the caller's choice.
    """

    plan: PlanProposal
    id_digest: int
    has_planner: bool
    overwrites: bool
    on_disagreement: OnDisagreement

    def to_row(self) -> Row:
        """Return it as integers."""
        flags = int(self.has_planner) | int(self.overwrites) << 1 | POLICIES.index(self.on_disagreement) << 2
        return [*self.plan.to_row(), self.id_digest, flags]

    @classmethod
    def from_row(cls, row: Row) -> SaveProposal:
        """Return what `to_row` was given."""
        id_digest, flags = row[_PLAN_LENGTH : _PLAN_LENGTH + 2]
        return cls(
            plan=PlanProposal.from_row(row),
            id_digest=id_digest,
            has_planner=bool(flags & 1),
            overwrites=bool(flags & 2),
            on_disagreement=POLICIES[flags >> 2],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveStart:
    """What all ranks begin a save with.

    Attributes:
        plan: what they plan with.
        save_id: the coordinator's: 32 hexadecimal digits.
    """

    plan: PlanStart
    save_id: str

    def to_row(self) -> Row:
        """Return it as integers."""
        return [*_SAVE_ID.unpack(bytes.fromhex(self.save_id)), *self.plan.to_row()]

    @classmethod
    def from_row(cls, row: Row) -> SaveStart:
        """Return what `to_row` was given."""
        return cls(save_id=_SAVE_ID.pack(*row[:2]).hex(), plan=PlanStart.from_row(row[2:]))


def agree_on_save(table: list[Row], coordinator: int, save_id: str) -> Row:
    """Agree on a plan, and on the coordinator's id for the save.

    Raises:
        ArgumentError: the ranks' callers want different things.
    """
    # Most ranks propose the same: of thousands few are told apart.
    proposals = [SaveProposal.from_row([*row]) for row in {tuple(row) for row in table}]
    if len({each.id_digest for each in proposals}) > 1:
        raise ArgumentError("checkpoint_id", "the ranks save to different checkpoints")
    if len({each.has_planner for each in proposals}) > 1:
        raise ArgumentError("planner", "passed on some ranks, not on others")
    if len({each.overwrites for each in proposals}) > 1:
        raise ArgumentError("overwrite", "must be the same on all ranks, got True and False")
    if len(policies := {each.on_disagreement for each in proposals}) > 1:
        named = " and ".join(repr(each) for each in POLICIES if each in policies)
        raise ArgumentError("on_disagreement", f"must be the same on all ranks, got {named}")
    return SaveStart(plan=_agreed_plan(table, coordinator), save_id=save_id).to_row()


@dataclass(frozen=True, slots=True, kw_only=True)
class PartProposal:
    """What a rank adds to a save of several states.

    Attributes:
        plan: what it brings to the plan.
        name: of the state; None to commit.
    """

    plan: PlanProposal
    name: str | None

    def to_row(self) -> Row:
        """Return it as integers, of the name only a checksum."""
        return [*self.plan.to_row(), zlib.crc32((self.name or "").encode())]


def agree_on_part(table: list[Row], coordinator: int) -> Row:
    """Agree on a plan.

    Raises:
        ArgumentError: the ranks add different states.
    """
    if len({row[_PLAN_LENGTH] for row in table}) > 1:
        raise ArgumentError("participant", "all ranks must add the same participants in the same order")
    return agree_on_plan(table, coordinator)
