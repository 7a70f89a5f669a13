"""Which steps are kept."""

from __future__ import annotations

import random
from math import nan
from typing import Any

import pytest

from aiodcp import ArgumentError
from aiodcp.manager.retention import Best, Retention
from aiodcp.manager.steps import Step


def _steps(*numbers: int, **loss: float) -> list[Step]:
    return [Step(step=n, metrics={"loss": loss[f"s{n}"]} if f"s{n}" in loss else {}) for n in numbers]


@pytest.mark.parametrize(
    ("retention", "steps", "doomed"),
    [
        (Retention(), _steps(1, 2, 3), []),
        (Retention(keep_last=2), _steps(1, 2, 3, 4), [1, 2]),
        (Retention(keep_last=9), _steps(1, 2, 3, 4), []),
        (Retention(keep_last=1), _steps(), []),
        (Retention(keep_last=1, keep_every=100), _steps(50, 100, 150, 200, 250), [50, 150]),
        (Retention(keep_last=1, keep_best=("loss", "min")), _steps(1, 2, 3, s1=0.5, s2=0.1, s3=0.2), [1]),
        (Retention(keep_last=1, keep_best=("loss", "max")), _steps(1, 2, 3, s1=0.5, s2=0.1, s3=0.2), [2]),
        (Retention(keep_last=1, keep_best=("loss", "min", 2)), _steps(1, 2, 3, 4, s1=0.5, s2=0.1, s3=0.2), [1]),
        (Retention(keep_last=1, keep_best=("loss", "min")), _steps(1, 2, 3, s1=nan, s2=0.1), [1]),
        (Retention(keep_last=1, keep_best=("loss", "min")), _steps(1, 2, 3, s1=0.1, s2=0.1), [1]),
        (Retention(keep_last=None, keep_best=("loss", "min")), _steps(1, 2, s1=0.1), []),
    ],
)
def test_what_is_not_kept(retention: Retention, steps: list[Step], doomed: list[int]) -> None:
    assert retention.to_remove(steps) == doomed


def test_the_newest_and_the_best_are_never_removed_in_whatever_order_steps_come() -> None:
    chance = random.Random(0)
    for _ in range(300):
        best: Best = ("loss", chance.choice(["min", "max"]), chance.randint(1, 3))
        retention = Retention(
            keep_last=chance.randint(1, 3),
            keep_every=chance.choice([None, 2, 5]),
            keep_best=chance.choice([None, best]),
        )
        steps = [
            Step(step=n, metrics={"loss": chance.choice([nan, chance.random()])} if chance.random() < 0.8 else {})
            for n in chance.sample(range(30), chance.randint(1, 12))
        ]
        doomed = retention.to_remove(steps)
        kept = {each.step for each in steps} - set(doomed)
        assert max(each.step for each in steps) in kept
        assert set(retention.best(steps)[:1]) <= kept
        assert doomed == sorted(doomed)
        again = [each for each in steps if each.step in kept]
        assert retention.to_remove(again) == []


@pytest.mark.parametrize(
    ("argument", "given"),
    [
        ("keep_last", {"keep_last": 0}),
        ("keep_last", {"keep_last": True}),
        ("keep_every", {"keep_last": 1, "keep_every": -1}),
        ("keep_every", {"keep_every": 10}),
        ("keep_best", {"keep_best": ("loss", "least")}),
        ("keep_best", {"keep_best": "loss"}),
        ("keep_best", {"keep_best": ("loss", "min", 0)}),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(argument: str, given: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"^{argument}: "):
        Retention(**given)
