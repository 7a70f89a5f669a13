"""What the ranks must agree on before a save begins."""

from __future__ import annotations

from .._distributed.votes import Row
from ..errors import ArgumentError
from .plan_cache import KEPT_PLANS, agree_on_plan
from .sharing import OnDisagreement

POLICIES: tuple[OnDisagreement, ...] = ("warn", "raise", "ignore")


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


def agree_on_part(table: list[Row]) -> list[int]:
    if len({row[KEPT_PLANS] for row in table}) > 1:
        raise ArgumentError("participant", "the ranks do not add the same, in the same order")
    return agree_on_plan(table)
