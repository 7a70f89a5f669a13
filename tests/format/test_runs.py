"""Long columns of numbers, kept as runs of equal steps."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest

from aiodcp._format import runs as module
from aiodcp._format.arrays import Array
from aiodcp._format.runs import Runs, pack_runs, read_runs
from aiodcp._format.sections import SectionReader


def columns() -> list[Array]:
    chance = random.Random(0)
    found: list[list[int]] = [[], [0], [7], [5, 5, 5], [*range(9)] * 4, [3, 1] * 8, [0, 0, 6, 12, 18, 18, 2]]
    for _ in range(40):
        numbers = [0]
        for _ in range(chance.randint(1, 6)):
            step = chance.choice([0, 0, 1, -1, 3, -4])
            numbers += [numbers[-1] + step * n for n in range(chance.randint(1, 5))]
        found.append([number - min(numbers) for number in numbers])
    return [np.array(numbers, dtype=np.int64) for numbers in found]


@pytest.mark.parametrize("short", [-1, 1 << 17], ids=["by runs", "made at once"])
def test_numbers_are_found_by_their_rows(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHORT", short)
    monkeypatch.setattr(module, "MANY", 2.0 if short < 0 else 0.0)
    for numbers in columns():
        runs, rows = Runs.of(numbers), np.arange(len(numbers))
        assert len(runs) == len(numbers)
        assert runs.at(rows).tolist() == [runs.item(row) for row in rows.tolist()] == numbers.tolist()
        assert ("numbers" in vars(runs)) == (short > 0)
        assert runs.numbers.tolist() == numbers.tolist()
        for number in range(-1, 30):
            assert runs.rows_of(number).tolist() == np.flatnonzero(numbers == number).tolist()
        highest = int(numbers.max(initial=-1))
        assert runs.are_below(highest + 1)
        assert not len(numbers) or not runs.are_below(highest)
        assert not len(numbers) or not Runs.of(numbers - 1 - numbers.min()).are_below(highest + 1)


def test_numbers_are_put_where_zeros_stand() -> None:
    for numbers in columns():
        zeros = np.flatnonzero(numbers == 0)[::-1]
        changed = numbers.copy()
        changed[zeros] = 100 + np.arange(len(zeros))
        assert Runs.of(numbers).with_numbers(zeros, changed[zeros]).numbers.tolist() == changed.tolist()


def test_what_is_packed_is_read() -> None:
    for one, other in pairwise(columns()):
        reader = SectionReader(pack_runs(Runs.of(one)) + pack_runs(Runs.of(other)))
        assert read_runs(reader, len(one)).numbers.tolist() == one.tolist()
        assert read_runs(reader, len(other)).numbers.tolist() == other.tolist()
    with pytest.raises(ValueError, match="another length"):
        read_runs(SectionReader(pack_runs(Runs.of(np.arange(3)))), 4)


def test_ranks_that_are_alike_take_no_room() -> None:
    files, starts = np.tile(np.arange(4096), 400), np.repeat(np.arange(400) * 512, 4096)
    assert len(pack_runs(Runs.of(files)) + pack_runs(Runs.of(starts))) < 2000


@pytest.mark.parametrize(("steps", "lengths"), [([1, 1], [3, 0]), ([1], [-1]), ([1 << 62], [4]), ([-(1 << 63)], [2])])
def test_what_is_no_column_is_refused(steps: list[int], lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="none"):
        Runs(np.array(steps, dtype=np.int64), np.array(lengths, dtype=np.int64))
