"""Saves go on while the caller's thread computes in Python and lets go of the GIL for moments only."""

import asyncio
import sys
import threading
import time
from typing import Any
from weakref import ref

import pytest
import torch

from aiodcp import Checkpointer, MemoryStorage
from aiodcp._engine import gil_fairness
from aiodcp._engine.gil_fairness import LongList, short_switch_interval


def step(rounds: int) -> int:
    total = 0
    for number in range(rounds):
        total += number & 3
    return total


@pytest.mark.parametrize(
    ("rounds", "means"),  # steps shorter than the interval need the pauses
    [(60_000, "both"), (60_000, "interval"), (60_000, "pauses"), (10_000, "both"), (10_000, "pauses"), (1_000, "both")],
)
async def test_a_busy_loop_does_not_starve_a_save(rounds: int, means: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if means == "interval":
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
    elif means == "pauses":
        monkeypatch.setattr(gil_fairness, "SWITCH_INTERVAL_S", sys.getswitchinterval())
    state = {f"w{n}": torch.randn(1 << 16) for n in range(64)}
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        await checkpointer.prepare(state)
        checkpoint = await checkpointer.save(state, "ckpt")
        until = time.monotonic() + 30
        while not checkpoint.uploaded.done() and time.monotonic() < until:
            step(rounds)
            await asyncio.sleep(0)
        assert checkpoint.uploaded.done()


def test_the_switch_interval_is_short_while_flows_run_and_then_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    before = sys.getswitchinterval()
    with short_switch_interval():
        assert sys.getswitchinterval() == pytest.approx(gil_fairness.SWITCH_INTERVAL_S, rel=0.05)
        with short_switch_interval():
            pass
        assert sys.getswitchinterval() == pytest.approx(gil_fairness.SWITCH_INTERVAL_S, rel=0.05)
    assert sys.getswitchinterval() == before


def test_a_shorter_interval_of_the_callers_is_kept() -> None:
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0001)
    try:
        with short_switch_interval():
            assert sys.getswitchinterval() == pytest.approx(0.0001, rel=0.05)
    finally:
        sys.setswitchinterval(before)


async def test_the_pauses_end_with_what_they_are_for() -> None:
    loop = asyncio.get_running_loop()
    calls: list[int] = []
    done = threading.Event()

    class Awaited:
        def done(self) -> bool:
            calls.append(1)
            return done.is_set()

    awaited = Awaited()
    gil_fairness.yield_to_engine(loop, awaited)
    while len(calls) < 3:
        await asyncio.sleep(0.001)
    done.set()
    while len(calls) < 4:
        await asyncio.sleep(0.001)
    await asyncio.sleep(5 * gil_fairness.PAUSE_PERIOD_S)
    assert len(calls) <= 5


async def test_many_who_wait_on_one_loop_have_one_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    class Awaited:
        over = False

        def done(self) -> bool:
            return self.over

    loop = asyncio.get_running_loop()
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    waiting = [Awaited() for _ in range(300)]
    for each in waiting:
        gil_fairness.yield_to_engine(loop, each)
    until = loop.time() + 10 * gil_fairness.PAUSE_PERIOD_S
    while loop.time() < until:
        await asyncio.sleep(gil_fairness.PAUSE_PERIOD_S)
    assert 1 <= len(pauses) <= 11
    Awaited.over = True


def test_a_long_list_is_freed_in_pieces() -> None:
    class Item:
        pass

    made = [Item() for _ in range(2500)]
    gone = [ref(item) for item in made]
    lengths: list[int] = []

    class Watched(LongList[Item]):
        __slots__ = ()

        def __delitem__(self, where: Any) -> None:
            lengths.append(len(self))
            super().__delitem__(where)

    held = Watched(made)
    made.clear()
    assert all(each() is not None for each in gone)
    del held
    assert all(each() is None for each in gone)
    assert lengths == [2500, 1500, 500]
