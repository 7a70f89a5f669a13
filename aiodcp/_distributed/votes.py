"""The coordinator's decision on a phase, from what all ranks report of it: rows in, a row out.

rank       working -> done | failed                       one row of integers: `Row`
decision   go on -> all done | stop -> failed             one row of integers, the same for all
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Self

from ..errors import CheckpointError

Row = list[int]

Agree = Callable[[list[Row]], Row]

STOP_GRACE_S = 1.0  # for which a failure waits for those who are still stopping, to name all who failed

PROPOSAL_LENGTH = 8
"""Integers that a rank can propose, and that the coordinator can answer."""


class OperationKind(IntEnum):
    PREPARE = 1
    SAVE = 2
    LOAD = 3
    OPEN = 4
    ASK = 5


class RankState(IntEnum):
    WORKING = 0
    DONE = 1
    FAILED = 2
    STOPPED = 3


class Decision(IntEnum):
    GO_ON = 0
    ALL_DONE = 1
    STOP = 2
    FAILED = 3
    OUT_OF_STEP = 4
    BEHIND = 5


class PhaseVote:
    """The coordinator's decision on one phase, heartbeat after heartbeat."""

    def __init__(self, timeout_s: float, agree: Agree | None) -> None:
        self._agree = agree
        self._deadline = time.monotonic() + timeout_s
        self._stopped_at: float | None = None
        self.missing: list[int] = []
        self.error: Exception | None = None

    def decide(self, table: list[Row]) -> Row:
        """Return the decision on one heartbeat, and what is agreed, from all ranks' rows."""
        now = time.monotonic()
        latest = max(row[0] for row in table)
        if any(row[0] < latest for row in table):
            return [Decision.BEHIND, *padded([latest])]
        if any(row[:4] != table[0][:4] for row in table):
            self.error = CheckpointError(_out_of_step(table))
            return padded([Decision.OUT_OF_STEP], 1 + PROPOSAL_LENGTH)
        states = [row[4] for row in table]
        working = [rank for rank, state in enumerate(states) if state == RankState.WORKING]
        if not working and all(state == RankState.DONE for state in states):
            try:
                agreed = self._agree([row[5:] for row in table]) if self._agree else ()
                return [Decision.ALL_DONE, *padded(agreed)]
            except Exception as error:
                self.error = error
                return padded([Decision.FAILED], 1 + PROPOSAL_LENGTH)
        late = bool(working) and now > self._deadline
        if late and not self.missing:
            self.missing = working
        if late or any(state in (RankState.FAILED, RankState.STOPPED) for state in states):
            if self._stopped_at is None:
                self._stopped_at = now
            over = not working or now > self._stopped_at + STOP_GRACE_S
            return padded([Decision.FAILED if over else Decision.STOP], 1 + PROPOSAL_LENGTH)
        return padded([Decision.GO_ON], 1 + PROPOSAL_LENGTH)


def _out_of_step(table: list[Row]) -> str:
    doing = [f"rank {rank} is at step {row[2]} of {OperationKind(row[1]).name}" for rank, row in enumerate(table)]
    return "the ranks are out of step: " + ", ".join(doing[:8]) + (", ..." if len(doing) > 8 else "")


def is_final(decision: int, last: bool) -> bool:
    return decision in (Decision.FAILED, Decision.OUT_OF_STEP) or (last and decision == Decision.ALL_DONE)


def padded(values: Sequence[int], length: int = PROPOSAL_LENGTH) -> Row:
    assert len(values) <= length
    return [*map(int, values), *[0] * (length - len(values))]


class Proposal:
    """What a rank proposes, or all agree on, as a row: for dataclasses of ints and bools, with slots."""

    __slots__: tuple[str, ...] = ()

    def to_row(self) -> Row:
        """Return the fields, in their order."""
        return [int(getattr(self, name)) for name in self.__slots__]

    @classmethod
    def from_row(cls, row: Row) -> Self:
        """Return what `to_row` was given."""
        return cls(**dict(zip(cls.__slots__, row, strict=False)))

    @classmethod
    def columns(cls, table: list[Row]) -> dict[str, tuple[int, ...]]:
        """Return what all ranks propose, by field: in a fifth of the time that so many objects take."""
        return dict(zip(cls.__slots__, zip(*table, strict=True), strict=False))


def any_rank(table: list[Row]) -> Row:
    """Agree on yes if any rank proposes it, by the first number of its row."""
    return [int(any(row[0] for row in table))]
