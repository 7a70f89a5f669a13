"""From any thread to followers on any event loops."""

from __future__ import annotations

import asyncio
import threading

import pytest

from aiodcp import ClosedError
from aiodcp._engine.broadcast import Broadcast, Signal


async def test_a_signal_set_in_a_thread_wakes_every_waiter_on_its_loop() -> None:
    signal = Signal()
    waiters = [asyncio.create_task(signal.wait()) for _ in range(3)]
    waiters[0].cancel()
    await asyncio.sleep(0)
    assert not signal.is_set()
    threading.Thread(target=signal.set).start()
    await asyncio.gather(*waiters[1:])
    assert signal.is_set()
    assert waiters[0].cancelled()


def test_a_signal_whose_loop_is_closed_says_so() -> None:
    async def make() -> Signal:
        return Signal()

    signal = asyncio.run(make())
    assert not signal.has_running_loop()
    assert not signal.set()


async def test_followers_see_what_is_published_in_a_thread_until_the_end() -> None:
    events: Broadcast[int] = Broadcast()
    events.publish(0)  # before anyone follows
    followers = [asyncio.create_task(_collect(events)) for _ in range(2)]
    await asyncio.sleep(0)

    def publish() -> None:
        for number in range(1, 100):
            events.publish(number)
        events.close()

    threading.Thread(target=publish).start()
    assert await asyncio.gather(*followers) == [list(range(1, 100))] * 2
    assert await _collect(events) == []  # after the end


async def test_with_replay_followers_begin_with_all_that_was_published() -> None:
    events: Broadcast[int] = Broadcast(replay=True)
    for number in range(3):
        events.publish(number)
    early = asyncio.create_task(_collect(events))
    await asyncio.sleep(0)
    events.publish(3)
    events.close()
    assert await early == await _collect(events) == [0, 1, 2, 3]


async def test_a_follower_that_leaves_is_forgotten() -> None:
    events: Broadcast[int] = Broadcast()
    follower = events.follow()
    events.publish(1)
    assert await anext(follower) == 1
    assert len(events._followers) == 1
    await follower.aclose()  # type: ignore[attr-defined]
    assert not events._followers


async def test_a_forked_child_learns_that_it_is_not_notified(monkeypatch: pytest.MonkeyPatch) -> None:
    events: Broadcast[int] = Broadcast()
    monkeypatch.setattr("os.getpid", lambda: -1)
    with pytest.raises(ClosedError, match="forked"):
        events.follow()


async def _collect(events: Broadcast[int]) -> list[int]:
    return [number async for number in events.follow()]
