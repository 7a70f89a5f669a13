"""Long columns of numbers as runs of equal steps: where many ranks are alike, some hundreds stand for millions."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from .arrays import Array
from .sections import LARGEST_NBYTES, SectionReader, pack_column

SHORT = 1 << 17  # numbers: so many are made at once when one is asked for

MANY = 1 / 8  # likewise, where runs, or rows that are asked for, are such a part of the numbers

_LARGEST = float(1 << 62)


class Runs:
    """A column of numbers, each of which is the one before and a step. They are found by their rows; few are made.

    Attributes:
        steps: by run.
        lengths: by run, how many numbers it has.
    """

    def __init__(self, steps: Array, lengths: Array) -> None:
        """Begin: before the first number stands 0.

        Raises:
            ValueError: a run without numbers, or numbers that are too large.
        """
        if lengths.min(initial=1) < 1 or float((np.abs(steps.astype(float)) * lengths).sum()) > _LARGEST:
            raise ValueError("runs of numbers that are none")
        self.steps = steps
        self.lengths = lengths
        self._stops: Array = np.cumsum(lengths)
        self._last: Array = np.cumsum(steps * lengths)  # number of each run
        self._is_short: bool = len(self) <= SHORT or len(steps) > MANY * len(self)

    @classmethod
    def of(cls, numbers: Array) -> Runs:
        """Return the runs of numbers."""
        steps = np.diff(numbers, prepend=0)
        first = np.flatnonzero(np.diff(steps, prepend=steps[:1] + 1))
        return cls(steps[first], np.diff(first, append=len(numbers)))

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    @cached_property
    def numbers(self) -> Array:
        """All of them."""
        return np.cumsum(np.repeat(self.steps, self.lengths))

    def item(self, row: int) -> int:
        """Return the number in a row."""
        if self._is_short:
            return self.numbers.item(row)
        run = int(self._stops.searchsorted(row, side="right"))
        return self._last.item(run) - self.steps.item(run) * (self._stops.item(run) - 1 - row)

    def at(self, rows: Array) -> Array:
        """Return the numbers in some rows."""
        if self._is_short or len(rows) > MANY * len(self):
            return self.numbers[rows]
        runs = np.searchsorted(self._stops, rows, side="right")
        return self._last[runs] - self.steps[runs] * (self._stops[runs] - 1 - rows)

    def rows_of(self, number: int) -> Array:
        """Return the rows in which a number stands."""
        to_last = self._last - number
        back = np.where(self.steps == 0, 0, to_last // np.where(self.steps == 0, 1, self.steps))  # from the last row
        [runs] = np.nonzero((back * self.steps == to_last) & (back >= 0) & (back < self.lengths))
        counts = np.where(self.steps[runs] == 0, self.lengths[runs], 1)
        before = np.arange(counts.sum()) - np.repeat(np.cumsum(counts), counts)
        rows: Array = np.repeat(self._stops[runs] - back[runs], counts) + before
        return rows

    def with_numbers(self, rows: Array, numbers: Array) -> Runs:
        """Return the same column with numbers in some rows, where it has zeros."""
        first = np.unique(np.concatenate([self._stops - self.lengths, rows, rows + 1, rows + 2]))
        first = first[first < len(self)]
        steps = self.steps[np.searchsorted(self._stops, first, side="right")]
        np.add.at(steps, np.searchsorted(first, rows), numbers)
        has_next = rows + 1 < len(self)
        np.subtract.at(steps, np.searchsorted(first, rows[has_next] + 1), numbers[has_next])
        return Runs(steps, np.diff(first, append=len(self)))

    def are_below(self, stop: int) -> bool:
        """Whether all of them are at least 0, and less than `stop`."""
        first = self._last - self.steps * (self.lengths - 1)
        ends = np.concatenate([first, self._last])
        return bool(ends.min(initial=0) >= 0 and ends.max(initial=-1) < stop)


def pack_runs(runs: Runs) -> bytes:
    """Return sections for a long column."""
    count = np.array([len(runs.steps)], dtype=np.int64)
    return b"".join(map(pack_column, (count, runs.steps, runs.lengths)))


def read_runs(reader: SectionReader, count: int) -> Runs:
    """Return the next of what `pack_runs` has made, which has so many numbers.

    Raises:
        ValueError, struct.error, zlib.error: there is something else.
    """
    length = int(reader.column(1)[0])
    runs = Runs(reader.column(length), reader.column(length))
    if len(runs) != count or count > LARGEST_NBYTES // 8:
        raise ValueError("a column of another length")
    return runs
