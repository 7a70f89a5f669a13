"""The coordinator's decision on a phase, and rows of integers with names."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from aiodcp._distributed import votes
from aiodcp._distributed.votes import (
    PROPOSAL_LENGTH,
    Decision,
    OperationKind,
    PhaseVote,
    Proposal,
    RankState,
    any_rank,
    padded,
)


def heartbeat(state: RankState, *, call: int = 1, step: int = 2, proposal: tuple[int, ...] = ()) -> list[int]:
    return [call, OperationKind.SAVE, step, 7, state, *padded(proposal)]


def decide(vote: PhaseVote, *rows: list[int]) -> tuple[Decision, list[int]]:
    decision, *agreed = vote.decide(list(rows))
    return Decision(decision), agreed


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    times = [100.0]
    monkeypatch.setattr("aiodcp._distributed.votes.time.monotonic", lambda: times[0])
    return times


def test_a_phase_goes_on_until_all_are_done_and_then_has_what_is_agreed() -> None:
    vote = PhaseVote(60.0, lambda table: [sum(row[0] for row in table)])
    working, done = heartbeat(RankState.WORKING), heartbeat(RankState.DONE, proposal=(3,))
    assert decide(vote, working, done)[0] is Decision.GO_ON
    decision, agreed = decide(vote, done, done)
    assert decision is Decision.ALL_DONE
    assert agreed == padded([6])
    assert len(agreed) == PROPOSAL_LENGTH


def test_a_proposal_that_is_refused_fails_the_phase_with_the_reason() -> None:
    def refuse(table: list[list[int]]) -> list[int]:
        raise ValueError("no")

    vote = PhaseVote(60.0, refuse)
    assert decide(vote, heartbeat(RankState.DONE))[0] is Decision.FAILED
    assert str(vote.error) == "no"


def test_after_a_failure_those_who_still_work_are_asked_to_stop_and_waited_for_a_moment(now: list[float]) -> None:
    vote = PhaseVote(60.0, None)
    failed, working = heartbeat(RankState.FAILED), heartbeat(RankState.WORKING)
    assert decide(vote, failed, working)[0] is Decision.STOP
    now[0] += votes.STOP_GRACE_S + 0.1
    assert decide(vote, failed, working)[0] is Decision.FAILED
    assert decide(PhaseVote(60.0, None), failed, heartbeat(RankState.STOPPED))[0] is Decision.FAILED


def test_at_the_deadline_those_who_are_not_done_are_missing(now: list[float]) -> None:
    vote = PhaseVote(60.0, None)
    now[0] += 60.1
    assert decide(vote, heartbeat(RankState.DONE), heartbeat(RankState.WORKING))[0] is Decision.STOP
    assert vote.missing == [1]


def test_ranks_at_other_calls_or_steps_are_found() -> None:
    vote = PhaseVote(60.0, None)
    working = heartbeat(RankState.WORKING)
    decision, agreed = decide(vote, working, heartbeat(RankState.WORKING, call=3))
    assert (decision, agreed[0]) == (Decision.BEHIND, 3)
    assert decide(vote, working, heartbeat(RankState.WORKING, step=4))[0] is Decision.OUT_OF_STEP
    assert str(vote.error) == "the ranks are out of step: rank 0 is at step 2 of SAVE, rank 1 is at step 4 of SAVE"


@dataclass(frozen=True, slots=True, kw_only=True)
class Example(Proposal):
    is_done: bool
    count: int


def test_a_proposal_of_ints_is_its_fields_in_their_order() -> None:
    assert Example(is_done=True, count=-4).to_row() == [1, -4]
    assert Example.from_row([1, -4, 0, 0]) == Example(is_done=True, count=-4)
    columns = Example.columns([[1, -4, 0], [0, 2, 0]])
    assert columns == {"is_done": (1, 0), "count": (-4, 2)}
    assert any_rank([[0], [1], [0]]) == [1]
    assert any_rank([[0], [0]]) == [0]
