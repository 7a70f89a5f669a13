import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import uvloop

from aiodcp import SaveError
from aiodcp._milestone import Milestone, ProgressLog

RUNNERS: dict[str, Callable[[Any], Any]] = {"asyncio": asyncio.run, "uvloop": uvloop.run}


@pytest.mark.parametrize("runner", RUNNERS)
def test_it_is_awaited_by_many_on_several_loops_and_without_one(runner: str) -> None:
    milestone = Milestone("staged")
    started = threading.Barrier(3)
    seen: list[str] = []

    async def wait(name: str) -> None:
        await asyncio.gather(*(milestone for _ in range(2)), asyncio.to_thread(started.wait))
        await milestone
        seen.append(name)

    threads = [threading.Thread(target=lambda name=name: RUNNERS[runner](wait(name))) for name in "ab"]
    for thread in threads:
        thread.start()
    started.wait()
    milestone.reach()
    milestone.wait(0)
    for thread in threads:
        thread.join()
    assert sorted(seen) == ["a", "b"]
    assert milestone.done()


async def test_cancelling_one_waiter_leaves_the_other() -> None:
    milestone = Milestone("staged")
    one, other = (asyncio.create_task(milestone._wait()) for _ in range(2))
    await asyncio.sleep(0)
    one.cancel()
    with pytest.raises(asyncio.CancelledError):
        await one
    assert not milestone.done()
    milestone.reach()
    await other


async def test_a_failure_is_raised_to_everyone_who_asks() -> None:
    milestone = Milestone("uploaded")
    milestone.fail(SaveError("why"))
    for _ in range(2):
        with pytest.raises(SaveError, match="why"):
            await milestone
        with pytest.raises(SaveError, match="why"):
            milestone.wait()
    assert "why" in repr(milestone)


def test_a_failure_is_untold_until_somebody_has_seen_it() -> None:
    milestone = Milestone("uploaded")
    assert milestone.untold() is None
    error = SaveError("why")
    milestone.fail(error)
    assert milestone.untold() is error
    with pytest.raises(SaveError):
        milestone.wait()
    assert milestone.untold() is None


async def test_a_failure_is_not_untold_while_somebody_waits_for_it() -> None:
    milestone = Milestone("uploaded")
    waiter = asyncio.create_task(milestone._wait())
    await asyncio.sleep(0)
    milestone.fail(SaveError("why"))
    assert milestone.untold() is None
    with pytest.raises(SaveError):
        await waiter


def test_waiting_gives_up_after_its_timeout() -> None:
    milestone = Milestone("staged")
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        milestone.wait(0.01)
    assert time.monotonic() - began < 10
    assert "pending" in repr(milestone)


def test_the_end_of_a_loop_with_a_waiter_harms_nobody() -> None:
    milestone = Milestone("staged")

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(milestone, 0.001)

    asyncio.run(give_up())
    milestone.reach()  # calls into the closed loop
    milestone.wait()


async def test_progress_is_followed_from_the_beginning_by_whoever_comes_late() -> None:
    log = ProgressLog()
    log.report("stage", total=10)
    follower = asyncio.create_task(_collect(log))
    await asyncio.sleep(0)
    log.report(staged=10)

    def end() -> None:
        log.report("write", written=10)
        log.report("done")

    threading.Thread(target=end).start()
    entries = await follower
    assert [entry.phase for entry in entries] == ["plan", "stage", "stage", "write", "done"]
    assert await _collect(log) == entries
    last = log.latest
    assert (last.bytes_staged, last.bytes_written, last.bytes_total) == (10, 10, 10)
    assert entries == sorted(entries, key=lambda entry: entry.elapsed_s)


async def _collect(log: ProgressLog) -> list[Any]:
    return [entry async for entry in log.follow()]
