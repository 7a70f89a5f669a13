import asyncio
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import uvloop

from aiodcp import ClosedError, SaveError
from aiodcp._engine.milestone import Milestone, MilestoneSource
from aiodcp._telemetry.progress import ProgressLog

RUNNERS: dict[str, Callable[[Any], Any]] = {"asyncio": asyncio.run, "uvloop": uvloop.run}


@pytest.mark.parametrize("runner", RUNNERS)
def test_it_is_awaited_by_many_on_several_loops_and_without_one(runner: str) -> None:
    source = MilestoneSource("staged")
    milestone = Milestone(source)
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
    source.reach()
    milestone.wait(0)
    for thread in threads:
        thread.join()
    assert sorted(seen) == ["a", "b"]
    assert milestone.done()


async def test_cancelling_one_waiter_leaves_the_other() -> None:
    source = MilestoneSource("staged")
    milestone = Milestone(source)
    one, other = (asyncio.create_task(milestone) for _ in range(2))
    await asyncio.sleep(0)
    one.cancel()
    with pytest.raises(asyncio.CancelledError):
        await one
    assert not milestone.done()
    source.reach()
    await other


async def test_a_failure_is_raised_to_everyone_who_asks() -> None:
    source = MilestoneSource("uploaded")
    milestone = Milestone(source)
    source.fail(SaveError("why"))
    for _ in range(2):
        with pytest.raises(SaveError, match="why"):
            await milestone
        with pytest.raises(SaveError, match="why"):
            milestone.wait()
    assert "why" in repr(milestone)


async def test_a_failure_does_not_collect_the_frames_of_all_who_were_raised_it() -> None:
    source = MilestoneSource("m")
    try:
        raise ValueError("v")
    except ValueError as error:
        source.fail(error)
    depths = set()
    for _ in range(20):
        with pytest.raises(ValueError, match="v") as caught:
            await source.reached()
        depths.add(len(traceback.extract_tb(caught.value.__traceback__)))
    assert len(depths) == 1


def test_a_failure_is_unretrieved_until_somebody_has_seen_it() -> None:
    source = MilestoneSource("uploaded")
    milestone = Milestone(source)
    assert source.unretrieved() is None
    error = SaveError("why")
    source.fail(error)
    assert source.unretrieved() is error
    with pytest.raises(SaveError):
        milestone.wait()
    assert source.unretrieved() is None


async def test_a_failure_is_not_unretrieved_while_somebody_waits_for_it() -> None:
    source = MilestoneSource("uploaded")
    milestone = Milestone(source)
    waiter = asyncio.create_task(milestone)
    await asyncio.sleep(0)
    source.fail(SaveError("why"))
    assert source.unretrieved() is None
    with pytest.raises(SaveError):
        await waiter


def test_waiting_gives_up_after_its_timeout() -> None:
    source = MilestoneSource("staged")
    milestone = Milestone(source)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        milestone.wait(0.01)
    assert time.monotonic() - began < 10
    assert "pending" in repr(milestone)


def test_the_end_of_a_loop_with_a_waiter_harms_nobody() -> None:
    source = MilestoneSource("staged")
    milestone = Milestone(source)

    async def give_up() -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(milestone, 0.001)

    asyncio.run(give_up())
    source.reach()  # calls into the closed loop
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


async def test_whatever_takes_an_awaitable_or_a_coroutine_takes_a_handle() -> None:
    source = MilestoneSource("uploaded")
    milestone = Milestone(source)
    loop = asyncio.get_running_loop()
    futures: list[asyncio.Future[Any]]
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(milestone) for _ in range(2)]  # each drives it by itself
        futures = [
            asyncio.ensure_future(asyncio.shield(milestone)),
            asyncio.ensure_future(asyncio.wait_for(milestone, 30)),
            asyncio.gather(milestone, milestone),
            asyncio.wrap_future(asyncio.run_coroutine_threadsafe(milestone, loop)),
        ]
        await asyncio.sleep(0.01)
        assert not any(task.done() for task in (*tasks, *futures))
        source.reach()
    await asyncio.gather(*futures)
    await asyncio.create_task(milestone)
    assert not milestone._driven
    with pytest.raises(TypeError, match="use tasks explicitly"):
        await asyncio.wait({milestone})  # type: ignore[type-var]
    done, _ = await asyncio.wait({asyncio.create_task(milestone)})
    assert len(done) == 1


async def test_a_task_that_runs_a_handle_is_cancelled_and_fails_as_any_other() -> None:
    source = MilestoneSource("uploaded")
    milestone = Milestone(source)
    cancelled, failing = asyncio.create_task(milestone), asyncio.create_task(milestone)
    await asyncio.sleep(0)
    cancelled.cancel()
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert not milestone.done()
    source.fail(SaveError("why"))
    with pytest.raises(SaveError, match="why"):
        await failing
    milestone.close()  # of a task that does not run it
    with pytest.raises(RuntimeError, match="pass it to a task"):
        await asyncio.to_thread(milestone.send, None)


def test_it_reads_as_a_future_of_concurrent_futures() -> None:
    reached, failed, pending = (MilestoneSource("uploaded") for _ in range(3))
    calls: list[tuple[str, object, bool]] = []
    called = threading.Barrier(2)

    def remember(milestone: Milestone) -> None:
        calls.append((threading.current_thread().name, milestone.exception(), milestone.done()))
        called.wait(30)

    for source in (reached, failed):
        Milestone(source).add_done_callback(remember)
    reached.reach()
    called.wait(30)
    error = SaveError("why")
    failed.fail(error)
    called.wait(30)
    assert calls == [("aiodcp-callbacks", None, True), ("aiodcp-callbacks", error, True)]
    assert failed.unretrieved() is None
    Milestone(reached).result()
    with pytest.raises(SaveError, match="why"):
        Milestone(failed).result()
    for wait in (Milestone(pending).result, Milestone(pending).exception):
        with pytest.raises(TimeoutError):
            wait(0.001)


def test_users_hold_the_read_side_only() -> None:
    public = {name for name in dir(Milestone) if not name.startswith("_")}
    coroutine = {"send", "throw", "close"}
    assert public - coroutine == {"wait", "result", "exception", "done", "add_done_callback"}


def test_a_waiter_on_a_loop_that_is_gone_has_seen_nothing() -> None:
    source = MilestoneSource("uploaded")
    loop = asyncio.new_event_loop()
    task = loop.create_task(Milestone(source))
    loop.run_until_complete(asyncio.sleep(0))
    source.fail(error := SaveError("why"))
    assert source.unretrieved() is error  # the loop stands still
    loop.close()
    assert source.unretrieved() is error
    task._log_destroy_pending = False  # type: ignore[attr-defined]


def test_an_abandoned_milestone_lets_go_whoever_waits_and_is_not_done() -> None:
    source = MilestoneSource("preempted")
    milestone = Milestone(source)

    async def wait() -> None:
        await milestone

    async def main() -> None:
        waiting = [asyncio.create_task(wait()), asyncio.create_task(asyncio.to_thread(milestone.wait))]
        while not (source._on_loops and source._in_threads):
            await asyncio.sleep(0.001)
        source.abandon(ClosedError("left"))
        for each in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(each, ClosedError)

    asyncio.run(main())
    assert not milestone.done()
    with pytest.raises(ClosedError, match="left"):
        milestone.wait()


async def test_waiting_whatever_cancels_neither_ends_early_nor_burns_the_loop() -> None:
    source = MilestoneSource("ended")
    turns = 0

    async def wait() -> None:
        nonlocal turns
        turns += 1
        await source.settled_uncancellable()

    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            await anyio.sleep(0.01)
            scope.cancel()  # anyio cancels at each turn of the loop
            loop = asyncio.get_running_loop()
            loop.call_later(0.05, source.reach)
            awaited = source._until_woken
            source._until_woken = lambda: _count(awaited)  # type: ignore[method-assign]
    assert source.done()
    assert len(_counted) <= 1


_counted: list[int] = []


async def _count(awaited: Callable[[], Any]) -> None:
    _counted.append(1)
    await awaited()
