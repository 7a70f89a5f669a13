"""What the ranks must agree on before a load begins: where from, by which rules, and how they have planned."""

from __future__ import annotations

from dataclasses import dataclass

from .._distributed.votes import Proposal, Row
from ..errors import ArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class StartProposal(Proposal):
    """What a rank begins a load with.

    Attributes:
        is_absent: whether it has looked for the metadata and found none.
        path: a digest of where from.
        has_planner: whether the caller gave a planner.
    """

    is_absent: bool
    path: int
    has_planner: bool


def agree_on_start(table: list[Row]) -> Row:
    """Agree on whether there is a checkpoint.

    Raises:
        ArgumentError: the ranks' callers want different things.
    """
    proposals = [StartProposal.from_row(row) for row in table]
    if len({each.path for each in proposals}) > 1:
        raise ArgumentError("checkpoint_id", "the ranks load from different places")
    if len({each.has_planner for each in proposals}) > 1:
        raise ArgumentError("planner", "some ranks have one, others have not")
    return [any(each.is_absent for each in proposals)]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanProposal(Proposal):
    """How a rank has planned, or any.

    Attributes:
        is_replaced: whether a save has replaced the checkpoint meanwhile.
        has_unexpected: whether names are stored that this rank does not want.
    """

    is_replaced: bool
    has_unexpected: bool


def agree_on_plan(table: list[Row]) -> Row:
    """Agree on a `PlanProposal`: of any rank."""
    proposals = [PlanProposal.from_row(row) for row in table]
    return PlanProposal(
        is_replaced=any(each.is_replaced for each in proposals),
        has_unexpected=any(each.has_unexpected for each in proposals),
    ).to_row()
