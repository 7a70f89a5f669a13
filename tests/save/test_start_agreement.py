"""What ranks propose and agree on before a save, as rows of integers and back."""

from __future__ import annotations

import pytest

from aiodcp import ArgumentError
from aiodcp._distributed.votes import PROPOSAL_LENGTH
from aiodcp._save.sharing import POLICIES
from aiodcp._save.start_agreement import (
    KEPT_PLANS,
    PartProposal,
    PlanProposal,
    SaveProposal,
    SaveStart,
    agree_on_part,
    agree_on_plan,
    agree_on_save,
)


def proposal(rank: int = 0, **changes: object) -> SaveProposal:
    facts: dict[str, object] = {
        "plans": [3, 1],
        "id_digest": -(1 << 63),
        "save_id": f"{rank:032x}",
        "has_planner": False,
        "on_disagreement": "warn",
    }
    return SaveProposal(**(facts | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("has_planner", [False, True])
def test_a_proposal_comes_back_from_its_row(policy: str, has_planner: bool) -> None:
    mine = proposal(plans=[7, 5, 2, 1], save_id="f" * 32, has_planner=has_planner, on_disagreement=policy)
    row = mine.to_row()
    assert len(row) <= PROPOSAL_LENGTH
    assert all(-(1 << 63) <= number < 1 << 63 for number in row)
    assert SaveProposal.from_row(row) == mine


def test_the_start_is_the_newest_common_plan_and_the_coordinators_id() -> None:
    table = [proposal(rank, plans=plans).to_row() for rank, plans in enumerate([[3, 2, 1], [2, 1], [4, 2]])]
    start = SaveStart.from_row(agree_on_save(table))
    assert start == SaveStart(plan=2, save_id="0" * 32)
    assert SaveStart.from_row(start.to_row()) == start


def test_ranks_without_a_common_plan_plan_anew() -> None:
    rows = [PlanProposal(plans=plans).to_row() for plans in ([1, 2], [], [2])]
    assert all(len(row) == KEPT_PLANS for row in rows)
    assert agree_on_plan(rows) == [0]


@pytest.mark.parametrize(
    ("change", "argument"),
    [({"id_digest": 7}, "checkpoint_id"), ({"has_planner": True}, "planner"), ({"on_disagreement": "raise"}, "raise")],
)
def test_what_the_callers_want_differently_is_named(change: dict[str, object], argument: str) -> None:
    with pytest.raises(ArgumentError, match=argument):
        agree_on_save([proposal().to_row(), proposal(1, **change).to_row()])


def test_ranks_that_add_different_states_or_none_are_refused() -> None:
    for other in ("optim", None):
        with pytest.raises(ArgumentError, match="participant"):
            agree_on_part([PartProposal(plans=[1], name=name).to_row() for name in ("model", other)])
    assert agree_on_part([PartProposal(plans=[1], name="model").to_row()] * 2) == [1]
