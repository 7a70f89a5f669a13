"""What the ranks must agree on before a load begins: where from, by which rules, and how they have planned."""

from __future__ import annotations

from dataclasses import dataclass

from .._distributed.votes import Proposal, Row
from ..errors import ArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundMetadata(Proposal):
    """Whether there is a checkpoint, as one rank says that looks for it, or all.

    Attributes:
        is_absent: whether there is no metadata.
        nbytes: of it.
    """

    is_absent: bool
    nbytes: int

    @classmethod
    def of(cls, data: bytes | None) -> FoundMetadata:
        """Return what a rank has found: no bytes if it has not looked, None if there are none."""
        return cls(is_absent=data is None, nbytes=len(data or b""))


def agree_on_metadata(table: list[Row]) -> Row:
    """Agree on a `FoundMetadata`."""
    found = [FoundMetadata.from_row(row) for row in table]
    is_absent = any(each.is_absent for each in found)
    return FoundMetadata(is_absent=is_absent, nbytes=max(each.nbytes for each in found)).to_row()


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProposal:
    """What a rank begins a load with.

    Attributes:
        found: of the metadata.
        id_digest: of the checkpoint's id.
        has_planner: whether the caller gave a planner.
    """

    found: FoundMetadata
    id_digest: int
    has_planner: bool

    def to_row(self) -> Row:
        """Return it as integers."""
        return [*self.found.to_row(), self.id_digest, int(self.has_planner)]


def agree_on_load(table: list[Row]) -> Row:
    """Agree on a `FoundMetadata`.

    Raises:
        ArgumentError: the ranks' callers want different things.
    """
    _, _, id_digests, planners, *_ = zip(*table, strict=True)
    if len({*id_digests}) > 1:
        raise ArgumentError("checkpoint_id", "the ranks load different checkpoints")
    if len({*planners}) > 1:
        raise ArgumentError("planner", "passed on some ranks, not on others")
    return agree_on_metadata(table)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlanProposal(Proposal):
    """How a rank has planned, or any.

    Attributes:
        is_replaced: whether a save has replaced the checkpoint meanwhile.
        has_unexpected: whether names are stored that this rank does not want.
    """

    is_replaced: bool
    has_unexpected: bool


def agree_on_load_plan(table: list[Row]) -> Row:
    """Agree on a `LoadPlanProposal`: of any rank."""
    proposals = [LoadPlanProposal.from_row(row) for row in table]
    return LoadPlanProposal(
        is_replaced=any(each.is_replaced for each in proposals),
        has_unexpected=any(each.has_unexpected for each in proposals),
    ).to_row()
