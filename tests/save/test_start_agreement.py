"""What ranks propose and agree on before a save, as rows of integers and back."""

from __future__ import annotations

import pytest

from aiodcp import ArgumentError
from aiodcp._distributed.votes import PROPOSAL_LENGTH
from aiodcp._save.sharing import POLICIES
from aiodcp._save.start_agreement import (
    LONGEST_PLAN_NBYTES,
    PartProposal,
    PlanProposal,
    PlanStart,
    SaveProposal,
    SaveStart,
    agree_on_part,
    agree_on_plan,
    agree_on_save,
)


def proposal(**changes: object) -> SaveProposal:
    facts: dict[str, object] = {
        "plan": PlanProposal(kept=[3, 1]),
        "id_digest": -(1 << 63),
        "has_planner": False,
        "overwrites": True,
        "on_disagreement": "warn",
    }
    return SaveProposal(**(facts | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("has_planner", [False, True])
@pytest.mark.parametrize("overwrites", [False, True])
def test_a_proposal_comes_back_from_its_row(policy: str, has_planner: bool, overwrites: bool) -> None:
    plan = PlanProposal(kept=[7, 5, 2, 1], digest=-5, whole_nbytes=LONGEST_PLAN_NBYTES, rest_nbytes=LONGEST_PLAN_NBYTES)
    mine = proposal(plan=plan, has_planner=has_planner, overwrites=overwrites, on_disagreement=policy)
    row = mine.to_row()
    assert len(row) <= PROPOSAL_LENGTH
    assert all(-(1 << 63) <= number < 1 << 63 for number in row)
    assert SaveProposal.from_row(row) == mine


def test_the_start_is_the_newest_common_plan_and_the_coordinators_id() -> None:
    table = [proposal(plan=PlanProposal(kept=kept)).to_row() for kept in ([3, 2, 1], [2, 1], [4, 2])]
    start = SaveStart.from_row(agree_on_save(table, 1, "f" * 32))
    assert start == SaveStart(plan=PlanStart(kept=2), save_id="f" * 32)
    assert SaveStart.from_row(start.to_row()) == start


def test_ranks_without_a_common_plan_plan_anew() -> None:
    mine = PlanProposal(digest=7, whole_nbytes=100, rest_nbytes=10)
    rows = [PlanProposal(kept=[1, 2]).to_row(), mine.to_row(), PlanProposal(kept=[2]).to_row()]
    assert PlanStart.from_row(agree_on_plan(rows, 1)) == PlanStart(kept=0)


def test_the_coordinators_table_is_sent_by_nobody() -> None:
    rows = [
        PlanProposal(digest=digest, whole_nbytes=whole, rest_nbytes=whole - 80).to_row()
        for digest, whole in ((7, 90), (5, 100), (5, 110))
    ]
    assert PlanStart.from_row(agree_on_plan(rows, 1)) == PlanStart(kept=0, known=5, longest_nbytes=90)
    assert PlanStart.from_row(agree_on_plan(rows[1:], 0)) == PlanStart(kept=0, known=5, longest_nbytes=30)


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"id_digest": 7}, "checkpoint_id"),
        ({"has_planner": True}, "planner"),
        ({"overwrites": False}, "overwrite"),
        ({"on_disagreement": "raise"}, "raise"),
    ],
)
def test_what_the_callers_want_differently_is_named(change: dict[str, object], argument: str) -> None:
    with pytest.raises(ArgumentError, match=argument):
        agree_on_save([proposal().to_row(), proposal(**change).to_row()], 0, "f" * 32)


def test_ranks_that_add_different_states_or_none_are_refused() -> None:
    kept = PlanProposal(kept=[1])
    for other in ("optim", None):
        with pytest.raises(ArgumentError, match="participant"):
            agree_on_part([PartProposal(plan=kept, name=name).to_row() for name in ("model", other)], 0)
    rows = [PartProposal(plan=kept, name="model").to_row()] * 2
    assert PlanStart.from_row(agree_on_part(rows, 0)) == PlanStart(kept=1)
