"""What the ranks must agree on before a load begins: where from, by which rules, and how they have planned."""

from __future__ import annotations

from dataclasses import dataclass

from .._distributed.votes import Proposal, Row
from ..errors import ArgumentError


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProposal(Proposal):
    """What a rank begins a load with.

    Attributes:
        is_absent: whether it has looked for the metadata and found none.
        id_digest: of the checkpoint's id.
        has_planner: whether the caller gave a planner.
    """

    is_absent: bool
    id_digest: int
    has_planner: bool


def agree_on_load(table: list[Row]) -> Row:
    """Agree on whether there is a checkpoint.

    Raises:
        ArgumentError: the ranks' callers want different things.
    """
    proposals = [LoadProposal.from_row(row) for row in table]
    if len({each.id_digest for each in proposals}) > 1:
        raise ArgumentError("checkpoint_id", "the ranks load different checkpoints")
    if len({each.has_planner for each in proposals}) > 1:
        raise ArgumentError("planner", "passed on some ranks, not on others")
    return [any(each.is_absent for each in proposals)]


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
