"""A save given up at any point leaves nothing behind: no file, no descriptor, no thread; and the next one works."""

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from aiodcp import Checkpointer, LocalStorage, SaveCancelled, SaveError, storage
from aiodcp._save.staging import Staging
from aiodcp.testing import FaultyStorage, Gate

from ..support.engine import wait_for_engine
from ..support.states import assert_equal, blank, make_state

CALLS = ["create", "write", "sync"]


@pytest.mark.parametrize("call", CALLS)
async def test_giving_up_during_any_call_leaves_nothing(call: str, faulty: FaultyStorage) -> None:
    old, new = make_state(1), make_state(2)
    async with Checkpointer(storage=faulty) as checkpointer:
        await (await checkpointer.save(old, "ckpt")).uploaded
        files = dict(faulty.files["ckpt"])
        for place in ("ckpt", "fresh"):
            gate = Gate(call)
            faulty.gate = gate
            checkpoint = await checkpointer.save(new, place)
            await gate.wait_reached()
            checkpoint.cancel()
            with pytest.raises(SaveCancelled):
                await checkpoint.uploaded
            assert faulty.open_files == 0
            assert faulty.files["ckpt"] == files
            assert not faulty.files.get("fresh")
        faulty.gate = lambda name: None
        await (await checkpointer.save(new, "ckpt")).uploaded
        target = blank(new)
        await checkpointer.load(target, "ckpt")
        assert_equal(new, target)


async def test_giving_up_once_the_commit_has_begun_is_too_late(faulty: FaultyStorage) -> None:
    gate = Gate("put")
    faulty.gate = gate
    async with Checkpointer(storage=faulty) as checkpointer:
        checkpoint = await checkpointer.save(make_state(1), "ckpt")
        await gate.wait_reached()
        checkpoint.cancel()
        gate.open()
        await checkpoint.uploaded
        assert checkpoint.progress.phase == "done"
        target = blank(make_state(1))
        await checkpointer.load(target, "ckpt")
        assert_equal(make_state(1), target)


async def test_giving_up_at_the_last_moment_before_the_commit_is_in_time(faulty: FaultyStorage) -> None:
    async with Checkpointer(storage=faulty) as checkpointer:
        await (await checkpointer.save(make_state(1), "ckpt")).uploaded
        files = dict(faulty.files["ckpt"])
        gate = Gate("create")
        faulty.gate = gate
        checkpoint = await checkpointer.save(make_state(2), "ckpt")
        await gate.wait_reached()
        operation = checkpoint._state.operation
        assert operation is not None
        faulty.gate = lambda call: operation.cancel() if call == "sync" else None
        gate.open()
        with pytest.raises(SaveCancelled):
            await checkpoint.uploaded
        assert faulty.files["ckpt"] == files


async def test_giving_up_while_the_tensors_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"w{n}": torch.randn(1 << 20) for n in range(16)}  # 64 MiB: several segments
    reached, go_on = threading.Event(), threading.Event()
    copied: list[int] = []
    real = Staging.copy

    def slow(self: Staging, number: int, *args: Any) -> Any:
        reached.set()
        assert go_on.wait(30)
        copied.append(number)
        return real(self, number, *args)

    async with Checkpointer() as checkpointer:
        await checkpointer.prepare(state)
        with monkeypatch.context() as patch:
            patch.setattr(Staging, "copy", slow)
            checkpoint = await checkpointer.save(state, tmp_path / "ckpt")
            await asyncio.to_thread(reached.wait, 30)
            checkpoint.cancel()
            await asyncio.to_thread(wait_for_engine, checkpointer)
            go_on.set()
            for milestone in (checkpoint.staged, checkpoint.uploaded):
                with pytest.raises(SaveCancelled):
                    await milestone
        assert copied == [0]
        assert not (tmp_path / "ckpt").exists()
        await (await checkpointer.save(state, tmp_path / "ckpt")).uploaded


@pytest.mark.parametrize("after", range(12))
async def test_giving_up_at_any_moment_on_a_real_file_system(after: int, tmp_path: Path) -> None:
    state = {f"w{n}": torch.randn(1 << 16) for n in range(64)}  # 16 MiB
    threads = set(threading.enumerate())
    descriptors = os.listdir("/proc/self/fd")
    async with Checkpointer(storage=LocalStorage()) as checkpointer:
        await checkpointer.prepare(state)
        checkpoint = await checkpointer.save(state, tmp_path / "ckpt")
        async for _ in checkpoint.events():
            if after == 0:
                checkpoint.cancel()
                break
            after -= 1
        try:
            await checkpoint.uploaded
        except SaveCancelled:
            assert not (tmp_path / "ckpt").exists()
        else:
            assert len(list((tmp_path / "ckpt").iterdir())) == 2
        await (await checkpointer.save(state, tmp_path / "ckpt")).uploaded
        target = blank(state)
        await checkpointer.load(target, tmp_path / "ckpt")
        assert_equal(state, target)
    assert set(threading.enumerate()) == threads
    assert len(os.listdir("/proc/self/fd")) == len(descriptors)


async def test_cancelling_the_task_that_waits_does_not_cancel_the_save(faulty: FaultyStorage) -> None:
    gate = Gate("put")
    faulty.gate = gate
    async with Checkpointer(storage=faulty) as checkpointer:
        checkpoint = await checkpointer.save(make_state(), "ckpt")

        async def wait() -> None:
            await checkpoint.uploaded

        task = asyncio.create_task(wait())
        await gate.wait_reached()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.open()
        await checkpoint.uploaded


async def test_a_task_group_that_fails_leaves_the_last_checkpoint_whole(faulty: FaultyStorage) -> None:
    gate = Gate("put")
    faulty.gate = gate

    async def train() -> None:
        async with Checkpointer(storage=faulty) as checkpointer:
            await checkpointer.save(make_state(3), "ckpt")
            await asyncio.sleep(3600)

    async def evaluate() -> None:
        await gate.wait_reached()
        threading.Timer(0.05, gate.open).start()
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(train())
            group.create_task(evaluate())
    assert caught.group_contains(ZeroDivisionError)
    async with Checkpointer(storage=faulty) as checkpointer:
        target = blank(make_state(3))
        await checkpointer.load(target, "ckpt")
        assert_equal(make_state(3), target)


async def test_a_second_cancel_while_leaving_gives_the_save_up(faulty: FaultyStorage) -> None:
    gate = Gate("write")
    faulty.gate = gate

    async def train() -> None:
        async with Checkpointer(storage=faulty) as checkpointer:
            await checkpointer.save(make_state(), "ckpt")
            await gate.wait_reached()

    task = asyncio.create_task(train())
    await gate.wait_reached()
    for _ in range(20):  # it is draining now
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not faulty.files.get("ckpt")
    assert faulty.open_files == 0


@pytest.mark.parametrize("call", CALLS)
async def test_one_failing_write_stops_the_others(call: str, faulty: FaultyStorage) -> None:
    def fail(name: str) -> None:
        if name == call:
            raise OSError(30, "Read-only file system")

    faulty.gate = fail
    state = {f"w{n}": torch.randn(1 << 20) for n in range(16)}
    async with Checkpointer(storage=faulty) as checkpointer:
        checkpoint = await checkpointer.save(state, "ckpt")
        with pytest.raises(SaveError, match="Read-only"):
            await checkpoint.uploaded
    assert "put" not in faulty.calls
    assert faulty.open_files == 0
    assert storage is not None
