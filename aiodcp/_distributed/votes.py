"""The coordinator's verdict on a phase, from what all ranks tell of it. No talk, no threads: rows in, a row out.

rank       working -> done | failed                       one row of integers: `Row`
verdict    go on -> all done | stop -> failed             one row of integers, the same for all
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from enum import IntEnum

from ..errors import CheckpointError

Row = list[int]

Agree = Callable[[list[Row]], Sequence[int]]

STOP_GRACE_S = 1.0  # for which a failure waits for those who are still stopping, to name all who failed

FACTS = 8


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
    """The coordinator's verdict on one phase, beat after beat."""

    def __init__(self, timeout_s: float, decide: Agree | None) -> None:
        self._decide = decide
        self._deadline = time.monotonic() + timeout_s
        self._stopped_at: float | None = None
        self.missing: list[int] = []
        self.error: Exception | None = None

    def judge(self, table: list[Row]) -> Row:
        """Return the verdict on one beat, and the answer, from all ranks' rows."""
        now = time.monotonic()
        latest = max(row[0] for row in table)
        if any(row[0] < latest for row in table):
            return [Decision.BEHIND, *padded([latest])]
        if any(row[:4] != table[0][:4] for row in table):
            self.error = CheckpointError(_out_of_step(table))
            return padded([Decision.OUT_OF_STEP], 1 + FACTS)
        states = [row[4] for row in table]
        working = [rank for rank, state in enumerate(states) if state == RankState.WORKING]
        if not working and all(state == RankState.DONE for state in states):
            try:
                answer = self._decide([row[5:] for row in table]) if self._decide else ()
                return [Decision.ALL_DONE, *padded(answer)]
            except Exception as error:
                self.error = error
                return padded([Decision.FAILED], 1 + FACTS)
        late = bool(working) and now > self._deadline
        if late and not self.missing:
            self.missing = working
        if late or any(state in (RankState.FAILED, RankState.STOPPED) for state in states):
            if self._stopped_at is None:
                self._stopped_at = now
            over = not working or now > self._stopped_at + STOP_GRACE_S
            return padded([Decision.FAILED if over else Decision.STOP], 1 + FACTS)
        return padded([Decision.GO_ON], 1 + FACTS)


def _out_of_step(table: list[Row]) -> str:
    doing = [
        f"rank {rank} is in step {row[2]} of a {OperationKind(row[1]).name.lower()}" for rank, row in enumerate(table)
    ]
    return "the ranks do not do the same: " + ", ".join(doing[:8]) + (", ..." if len(doing) > 8 else "")


def is_final(verdict: int, last: bool) -> bool:
    return verdict in (Decision.FAILED, Decision.OUT_OF_STEP) or (last and verdict == Decision.ALL_DONE)


def padded(values: Sequence[int], length: int = FACTS) -> Row:
    assert len(values) <= length
    return [*map(int, values), *[0] * (length - len(values))]
