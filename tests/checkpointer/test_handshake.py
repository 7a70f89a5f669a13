"""The handshake of a save, on the caller's loop and on another one."""

from __future__ import annotations

import asyncio
import threading

import pytest

from aiodcp import SaveError
from aiodcp.checkpointer import caller_loop
from aiodcp.checkpointer.handshake import Handshake


async def test_a_turn_is_given_and_what_was_captured_is_handed_over() -> None:
    handshake: Handshake[str] = Handshake()
    assert handshake.state.name == "WAITING"
    assert repr(handshake) == "<Handshake waiting for its turn>"
    turn = asyncio.create_task(handshake.wait_for_turn())
    capture = asyncio.create_task(handshake.wait_for_capture())
    await asyncio.sleep(0)
    assert not turn.done()

    threading.Thread(target=handshake.give_turn).start()
    await turn
    assert handshake.state.name == "HAS_TURN"
    assert not capture.done()

    assert handshake.hand_over("the state")
    assert handshake.state.name == "CAPTURED"
    assert await capture == "the state"


@pytest.mark.parametrize("has_turn", [False, True])
async def test_a_failure_is_raised_on_both_sides_and_nothing_is_handed_over_after_it(has_turn: bool) -> None:
    handshake: Handshake[str] = Handshake()
    if has_turn:
        handshake.give_turn()
    handshake.fail(SaveError("closed"))
    assert handshake.state.name == "FAILED"
    assert not handshake.hand_over("too late")
    with pytest.raises(SaveError, match="closed"):
        await handshake.wait_for_capture()
    if not has_turn:
        with pytest.raises(SaveError, match="closed"):
            await handshake.wait_for_turn()


async def test_a_failure_after_the_capture_is_too_late() -> None:
    handshake: Handshake[int] = Handshake()
    handshake.give_turn()
    assert handshake.hand_over(3)
    handshake.fail(SaveError("too late"))
    assert handshake.state.name == "CAPTURED"
    assert await handshake.wait_for_capture() == 3


@pytest.mark.parametrize("is_closed", [False, True])
def test_a_capture_is_not_waited_for_when_its_event_loop_is_gone(
    is_closed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caller_loop, "CHECK_INTERVAL_S", 0.01)
    monkeypatch.setattr(caller_loop, "LOOP_GONE_S", 0.02)

    async def make() -> Handshake[str]:
        return Handshake()

    loop = asyncio.new_event_loop()
    handshake = loop.run_until_complete(make())
    if is_closed:
        loop.close()
    with pytest.raises(SaveError, match="closed" if is_closed else "stopped"):
        asyncio.run(handshake.wait_for_capture())
    loop.close()
