"""Steps as they are committed, and leases of them."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path

import pytest
import torch

import aiodcp
import aiodcp.manager.watch as module
from aiodcp import (
    ArgumentError,
    Checkpointer,
    CheckpointManager,
    LocalStorage,
    MemoryStorage,
    NotACheckpointError,
    ReadError,
    WatchedStep,
    lease,
    lease_sync,
    watch,
    watch_sync,
)
from aiodcp.manager.steps import remove_step
from aiodcp.storage.leases import unless_leased
from aiodcp.testing import FaultyStorage
from tests.support.object_servers import FaultProxy, S3Server, always

QUICK = 0.2  # seconds between polls


def _manager(root: str, storage: aiodcp.Storage | None = None, **options: object) -> CheckpointManager:
    return CheckpointManager(root, checkpointer=Checkpointer(storage=storage, no_dist=True), **options)  # type: ignore[call-overload, no-any-return]


async def _save(manager: CheckpointManager, *steps: int) -> None:
    for step in steps:
        await (await manager.save(step, {"w": torch.full((3,), float(step))}, metrics={"loss": 1.0 / step})).uploaded


async def _take(steps: AsyncGenerator[WatchedStep, None], count: int) -> list[int]:
    async with asyncio.timeout(20):
        return [await anext(steps) for _ in range(count)]


async def test_each_step_comes_once_as_soon_as_it_is_committed_and_whole(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    async with aclosing(watch(root, poll_s=QUICK)) as steps:
        waiting = asyncio.ensure_future(anext(steps))  # there is no root yet
        async with _manager(root) as manager:
            await _save(manager, 1)
            first = await asyncio.wait_for(waiting, 20)
            assert first == 1
            assert first.path == f"{root}/step-1"
            assert first.metrics == {"loss": 1.0}
            assert first.saved_at == pytest.approx(time.time(), abs=20)
            await _save(manager, 2, 3)
            assert await _take(steps, 2) == [2, 3]
        async with _manager(root) as manager:  # the writer begins anew
            state = {"w": torch.zeros(3)}
            assert await manager.restore(state) == 3
            await _save(manager, 10, 4)
            assert await _take(steps, 2) == [10, 4]


async def test_a_save_that_is_not_committed_is_not_seen(faulty: FaultyStorage) -> None:
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()
    begun = asyncio.Event()

    async def hold() -> None:
        loop.call_soon_threadsafe(begun.set)
        await asyncio.to_thread(lambda: asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(30))

    manager_of_run = _manager("run", faulty, history=False)
    async with manager_of_run as manager, aclosing(watch("run", storage=faulty, poll_s=0.02)) as steps:
        await _save(manager, 1)
        assert await _take(steps, 1) == [1]
        puts = 0

        def decide(call: str):  # type: ignore[no-untyped-def]
            nonlocal puts
            puts += call == "put"
            return hold() if call == "put" and puts == 1 else None

        faulty.gate = decide
        ckpt = await manager.save(2, {"w": torch.ones(3)})
        await begun.wait()
        waiting = asyncio.ensure_future(anext(steps))
        done, _ = await asyncio.wait([waiting], timeout=0.3)
        assert not done
        gate.set()
        await ckpt.uploaded
        assert await asyncio.wait_for(waiting, 20) == 2


@pytest.mark.parametrize(
    ("after", "expected"), [(None, [1, 5, 3, 4]), (1, [5, 3, 4]), (5, [3, 4]), (2, [5, 3, 4]), (4, []), ("latest", [])]
)
async def test_it_goes_on_after_a_step_in_the_order_of_the_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: module.After, expected: list[int]
) -> None:
    root, looked = str(tmp_path), asyncio.Event()
    look = module.StepFollower.look

    async def look_and_tell(self: module.StepFollower, *, at_all: bool) -> list[WatchedStep]:
        found = await look(self, at_all=at_all)
        looked.set()
        return found

    monkeypatch.setattr(module.StepFollower, "look", look_and_tell)
    async with _manager(root) as manager:
        await _save(manager, 1, 2, 5)
        shutil.rmtree(tmp_path / "step-2")
        await _save(manager, 3, 4)
        async with aclosing(watch(root, after=after, poll_s=QUICK)) as steps:
            waiting = asyncio.ensure_future(_take(steps, len(expected) + 1))
            await looked.wait()
            await _save(manager, 6)
            assert await waiting == [*expected, 6]


async def test_a_step_that_is_committed_anew_comes_again(tmp_path: Path) -> None:
    root = str(tmp_path)
    async with _manager(root) as manager, aclosing(watch(root, poll_s=0.05)) as steps:
        await _save(manager, 1, 2)
        assert await _take(steps, 2) == [1, 2]
        await _save(manager, 1)
        assert await _take(steps, 1) == [1]


async def test_an_unreadable_step_is_passed_over_and_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = str(tmp_path)
    async with _manager(root) as manager:
        await _save(manager, 1, 2)
        content = (tmp_path / "step-1" / ".metadata").read_bytes()
        (tmp_path / "step-1" / ".metadata").write_bytes(content[:-30] + b"?" + content[-29:])
        async with aclosing(watch(root, poll_s=0.02)) as steps:
            assert await _take(steps, 1) == [2]
            await _save(manager, 3)
            assert await _take(steps, 1) == [3]
            (tmp_path / "step-1" / ".metadata").write_bytes(content)
            assert await _take(steps, 1) == [1]
    assert sum("is unreadable, and is passed over" in record.getMessage() for record in caplog.records) == 1


async def test_a_cancelled_watch_ends_at_once_and_leaves_no_task(tmp_path: Path) -> None:
    before = asyncio.all_tasks()

    async def follow() -> None:
        async for _ in watch(str(tmp_path)):
            raise AssertionError

    task = asyncio.ensure_future(follow())
    await asyncio.sleep(0.1)  # it waits for changes
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)
    assert asyncio.all_tasks() == before


async def test_without_the_extra_it_polls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "watchfiles", None)
    async with _manager(str(tmp_path)) as manager, aclosing(watch(str(tmp_path), poll_s=QUICK)) as steps:
        waiting = asyncio.ensure_future(anext(steps))
        await _save(manager, 1)
        assert await asyncio.wait_for(waiting, 20) == 1


async def test_many_watchers_cost_a_store_a_listing_each_time_and_a_read_for_each_step(proxy: FaultProxy) -> None:
    url, storage = proxy.server.url(), proxy.server.storage()
    async with _manager(url, proxy.upstream.storage()) as manager:
        await _save(manager, *range(1, 21))
        async with aclosing(watch(url, storage=storage, poll_s=0.5)) as steps:
            assert await _take(steps, 20) == list(range(1, 21))
            assert proxy.verbs().count("LIST") == 1
            assert proxy.verbs().count("GET") == 20
            await _save(manager, 21)
            proxy.requests.clear()
            assert await _take(steps, 1) == [21]
            assert proxy.verbs().count("GET") <= proxy.verbs().count("LIST") <= 6


async def test_a_store_that_fails_for_the_moment_is_asked_again_and_one_that_refuses_is_an_error(
    proxy: FaultProxy, caplog: pytest.LogCaptureFixture
) -> None:
    url, storage = proxy.server.url(), proxy.server.storage()
    async with _manager(url, proxy.upstream.storage()) as manager:
        await _save(manager, 1)
    async with aclosing(watch(url, storage=storage, poll_s=0.1)) as steps:
        proxy.fault = always("slow_down", verb="LIST")
        waiting = asyncio.ensure_future(anext(steps))
        while "trying again" not in caplog.text:
            await asyncio.sleep(0.02)
        proxy.fault = lambda request: None
        assert await asyncio.wait_for(waiting, 20) == 1
        proxy.fault = always("forbid", verb="LIST")
        with pytest.raises(ReadError, match="AccessDenied"):
            await asyncio.wait_for(anext(steps), 20)


async def test_a_manager_watches_until_it_is_left(tmp_path: Path) -> None:
    async with _manager(str(tmp_path)) as manager:
        steps = manager.watch(after="latest", poll_s=QUICK)
        waiting = asyncio.ensure_future(_collect(steps))
        await asyncio.sleep(0.1)  # it has looked
        await _save(manager, 1, 2)
        while len(_seen) < 2:
            await asyncio.sleep(0.05)
    assert await asyncio.wait_for(waiting, 20) == [1, 2]
    with pytest.raises(aiodcp.ClosedError):
        manager.watch()


_seen: list[int] = []


async def _collect(steps: AsyncGenerator[WatchedStep, None]) -> list[int]:
    _seen.clear()
    async for step in steps:
        _seen.append(step)
    return list(_seen)


def test_without_an_event_loop(tmp_path: Path) -> None:
    root = str(tmp_path)
    with _manager(root) as manager:
        for step in (1, 2):
            manager.save_sync(step, {"w": torch.ones(3)}).uploaded.wait()
        steps = watch_sync(root, poll_s=QUICK)
        assert [next(steps), next(steps)] == [1, 2]
        steps.close()  # type: ignore[attr-defined]
        own = manager.watch_sync(after=1)
        step = next(own)
        assert step == 2
        own.close()  # type: ignore[attr-defined]
        with lease_sync(step) as path:
            state = {"w": torch.zeros(3)}
            manager.checkpointer.load_sync(state, path)
            assert list((tmp_path / "step-2" / ".aiodcp").iterdir())
        assert not (tmp_path / "step-2" / ".aiodcp").exists()


@pytest.mark.parametrize(("argument", "value"), [("after", "newest"), ("after", 1.5), ("poll_s", 0), ("poll_s", "1")])
async def test_arguments_are_checked(argument: str, value: object) -> None:
    with pytest.raises(ArgumentError, match=argument):
        await anext(watch("run", storage=MemoryStorage(), **{argument: value}))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="lease_s"):
        async with lease("run", lease_s=-1):
            pass


# --- leases


@pytest.mark.parametrize("where", ["directory", "store"])
async def test_a_leased_step_is_kept_and_removed_after_a_later_commit(tmp_path: Path, s3: S3Server, where: str) -> None:
    root = str(tmp_path) if where == "directory" else s3.url()
    mine = None if where == "directory" else s3.storage()
    other = None if where == "directory" else s3.storage()
    async with _manager(root, mine, keep_last=1) as manager:
        await _save(manager, 1)
        async with lease(f"{root}/step-1", storage=other) as path:
            await _save(manager, 2, 3)
            await asyncio.sleep(0.2)  # what follows a commit has been done
            state = {"w": torch.zeros(3)}
            await manager.checkpointer.load(state, path)
            assert state["w"].tolist() == [1.0] * 3
        await _save(manager, 4)
    assert await _steps(root, mine) == [4]
    if where == "directory":
        assert {each.name for each in tmp_path.iterdir() if each.is_dir()} == {"step-4", ".aiodcp"}
        assert [each.name for each in (tmp_path / "step-4").iterdir() if each.is_dir()] == []


async def _steps(root: str, storage: aiodcp.Storage | None) -> list[int]:
    async with _manager(root, storage) as manager:
        return manager.steps()


async def test_gc_keeps_a_leased_step_and_says_so(tmp_path: Path) -> None:
    root = str(tmp_path)
    async with _manager(root) as manager:
        await _save(manager, 1, 2)
    async with lease(tmp_path / "step-1"):
        command = [sys.executable, "-m", "aiodcp", "gc", root, "--keep-last", "1"]
        ended = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
        assert "step 1 is leased" in ended.stderr
        assert (tmp_path / "step-1" / ".metadata").exists()
    ended = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=True)
    assert ended.stdout == "removed step 1\n"


async def test_what_is_not_there_cannot_be_leased(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpointError, match="step-1"):
        async with lease(tmp_path / "step-1"):
            pass
    assert list(tmp_path.iterdir()) == []


async def test_a_step_that_is_being_removed_cannot_be_leased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with _manager(str(tmp_path)) as manager:
        await _save(manager, 1)
    path = str(tmp_path / "step-1")

    async def take() -> None:
        async with lease(path):
            raise AssertionError

    async with unless_leased(LocalStorage(), path) as is_free:
        assert is_free
        taking = asyncio.ensure_future(take())
        while not any("shared" in each.name for each in (tmp_path / "step-1" / ".aiodcp").iterdir()):
            await asyncio.sleep(0.01)
        await remove_step(LocalStorage(), path, set())
    with pytest.raises(NotACheckpointError):
        await asyncio.wait_for(taking, 20)
