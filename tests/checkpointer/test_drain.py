"""Closing is bounded, and nobody waits for itself: what would is refused by name, at once."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch

from aiodcp import (
    Checkpointer,
    CheckpointManager,
    ClosedError,
    DeadlockError,
    JointCheckpoint,
    MemoryStorage,
    SaveError,
    WriteError,
    joint_checkpoint,
)
from aiodcp.checkpointer import caller_loop, drain, flows
from aiodcp.checkpointer.checkpointer import session_of
from aiodcp.storage import Writer
from aiodcp.testing import FaultyStorage, Gate

from ..support.ranks import rank_test
from ..support.states import make_state

STATE = {"w": torch.arange(10.0)}


class Stuck(MemoryStorage):
    """A storage whose calls of one kind wait in a thread for `answer`, whatever is cancelled: a dead file server."""

    def __init__(self, call: str) -> None:
        super().__init__()
        self.call = call
        self.asked, self.answer = threading.Event(), threading.Event()

    async def _wait(self, call: str) -> None:
        if call == self.call:
            self.asked.set()
            with anyio.CancelScope(shield=True):
                await asyncio.get_running_loop().run_in_executor(None, self.answer.wait, 60)

    async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
        await self._wait("put")
        await super().put(checkpoint_id, name, data)

    async def get(self, checkpoint_id: str, name: str) -> bytes:
        await self._wait("get")
        return await super().get(checkpoint_id, name)

    @asynccontextmanager
    async def create(self, checkpoint_id: str, name: str) -> AsyncIterator[Writer]:  # type: ignore[override]
        await self._wait("create")
        async with super().create(checkpoint_id, name) as writer:
            yield writer


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "CHECK_INTERVAL_S", 0.02)
    monkeypatch.setattr(drain, "CANCEL_TIMEOUT_S", 0.1)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("call", ["create", "put"])
async def test_leaving_gives_up_a_storage_that_never_answers_and_says_what_it_waited_for(
    call: str, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Stuck(call)
    checkpointer = Checkpointer(storage=storage, timeout=0.2)
    with pytest.raises(SaveError, match=r"no progress for 0 s: saving ckpt .*memory:ckpt"):
        async with checkpointer:
            ckpt = await checkpointer.save(STATE, "ckpt")
    assert ckpt.done()
    assert "closing cancels" in caplog.text
    storage.answer.set()
    async with Checkpointer(storage=MemoryStorage()) as other:
        await (await other.save(STATE, "ckpt"))


@pytest.mark.usefixtures("impatient")
async def test_leaving_gives_up_a_copy_that_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a device that hangs: the thread that stages waits for it, and cannot be interrupted."""
    answer = threading.Event()

    def hang(*arguments: object) -> list[torch.Event]:
        answer.wait(60)
        return []

    monkeypatch.setattr("aiodcp._save.staging.Staging.copy", hang)
    with pytest.raises(SaveError, match=r"no progress for 0 s: saving ckpt"):
        async with Checkpointer(storage=MemoryStorage(), timeout=0.2) as checkpointer:
            ckpt = await checkpointer.save(STATE, "ckpt")
    assert ckpt.staged.done()
    answer.set()


@pytest.mark.usefixtures("impatient")
async def test_a_load_that_is_stuck_is_let_go_when_another_task_closes() -> None:
    storage = Stuck("get")
    checkpointer = Checkpointer(storage=storage, timeout=0.2)
    async with checkpointer:
        await (await checkpointer.save(STATE, "ckpt"))
        load = asyncio.create_task(checkpointer.load({"w": torch.zeros(10)}, "ckpt"))
        await asyncio.to_thread(storage.asked.wait, 30)
        with pytest.raises(ClosedError, match=r"with work still in flight: .*memory:ckpt/\.metadata"):
            await checkpointer.__aexit__(None, None, None)
        with pytest.raises(ClosedError, match="with work still in flight"):
            await load
        await checkpointer.__aenter__()
        storage.answer.set()


async def test_progress_keeps_a_slow_save_from_being_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "CHECK_INTERVAL_S", 0.02)

    class Slow(MemoryStorage):
        async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
            for _ in range(5):
                await asyncio.sleep(0.1)
                session_of(checkpointer).flows.engine.activity.note_progress()  # as each piece that is written does
            await super().put(checkpoint_id, name, data)

    async with Checkpointer(storage=Slow(), timeout=0.3) as checkpointer:
        ckpt = await checkpointer.save(STATE, "ckpt")
    assert ckpt.exception() is None


async def test_a_save_whose_event_loop_is_gone_lets_the_next_one_have_its_turn(
    faulty: FaultyStorage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flows, "CHECK_INTERVAL_S", 0.02)
    gate = Gate("put")
    faulty.gate = gate
    tasks: list[Any] = []
    async with Checkpointer(storage=faulty) as checkpointer:
        first = await checkpointer.save(STATE, "a")

        def worker() -> None:
            loop = asyncio.new_event_loop()
            tasks.append(loop.create_task(checkpointer.save(STATE, "b")))
            loop.call_later(0.05, loop.stop)
            loop.run_forever()
            loop.close()

        await asyncio.to_thread(worker)
        gate.open()
        await first
        await (await checkpointer.save(STATE, "c"))
        assert not faulty.files.get("b")
    tasks[0]._log_destroy_pending = False
    tasks.clear()


async def test_a_joint_checkpoint_whose_event_loop_is_gone_lets_the_next_save_have_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flows, "CHECK_INTERVAL_S", 0.02)
    monkeypatch.setattr(caller_loop, "CHECK_INTERVAL_S", 0.02)
    monkeypatch.setattr(caller_loop, "LOOP_GONE_S", 0.05)
    monkeypatch.setattr("aiodcp.checkpointer.joint.CHECK_INTERVAL_S", 0.02)
    loop = asyncio.new_event_loop()
    kept: list[asyncio.Task[None]] = []
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:

        async def hold() -> None:
            async with joint_checkpoint(checkpointer, "a") as joint:
                joint.add("w", STATE)
                await asyncio.sleep(3600)

        def worker() -> None:
            kept.append(loop.create_task(hold()))
            loop.call_later(0.1, loop.stop)
            loop.run_forever()

        await asyncio.to_thread(worker)
        await (await checkpointer.save(STATE, "b"))

        def go_on() -> None:
            with pytest.raises(SaveError, match="is stopped"):
                loop.run_until_complete(kept[0])
            loop.close()

        await asyncio.to_thread(go_on)


async def test_a_failure_while_a_task_group_is_aborted_is_collected_and_logged(
    faulty: FaultyStorage, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate("put")

    def fail_put(call: str) -> Any:
        return refuse() if call == "put" else None

    async def refuse() -> None:
        await gate._hold()
        raise OSError(28, "No space left on device")

    faulty.gate = fail_put

    async def save() -> None:
        async with Checkpointer(storage=faulty) as checkpointer:
            await checkpointer.save(STATE, "a")
            try:
                await asyncio.sleep(3600)
            finally:
                gate.open()

    async def fail() -> None:
        await gate.wait_reached()
        raise ValueError("mine")

    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.TaskGroup() as group:
            group.create_task(save())
            group.create_task(fail())
    assert {type(error) for error in caught.value.exceptions} == {ValueError, WriteError}
    assert "failed while the block was exiting with CancelledError" in caplog.text


@pytest.mark.parametrize("where", ["body", "child"])
async def test_what_would_wait_for_its_own_block_is_refused(where: str, tmp_path: Path) -> None:
    async def check(manager: CheckpointManager, joint: JointCheckpoint) -> None:
        part, later = joint.add("now", STATE), joint.add("later", lambda: STATE)
        checkpointer = manager.checkpointer

        async def nested() -> None:
            async with manager.checkpoint(9):
                pass

        waits: dict[str, Callable[[], Awaitable[Any]]] = {
            "save": lambda: manager.save(2, STATE),
            "nested": nested,
            "prepare": lambda: checkpointer.prepare(STATE),
            "leave": manager.aclose,
            "uploaded": lambda: asyncio.gather(part.uploaded, later.uploaded),
            "wait_for": lambda: asyncio.wait_for(part, 30),
            "staged": lambda: later.staged._source.reached(),
        }
        for name, wait in waits.items():
            with pytest.raises(DeadlockError):
                await wait()
                pytest.fail(name)
        for block in (part.uploaded.wait, part.result, later.staged.wait):
            with pytest.raises(DeadlockError):
                block()
        with pytest.raises(SaveError, match="later"):
            later.fence()
        await part.staged  # is nobody's to wait for
        assert await manager.save(3, STATE, on_busy="skip") is None

    async with CheckpointManager(tmp_path) as manager:
        await (await manager.save(1, STATE))
        async with manager.checkpoint(4) as joint:
            await (check(manager, joint) if where == "body" else asyncio.create_task(check(manager, joint)))
        outlived = asyncio.create_task(asyncio.sleep(0))
        await outlived
        await (await manager.save(5, STATE))
    assert manager.steps() == [1, 4, 5]


async def test_a_task_of_the_block_that_outlives_it_may_save(tmp_path: Path) -> None:
    left = asyncio.Event()

    async def save_later(checkpointer: Checkpointer) -> None:
        await left.wait()
        await (await checkpointer.save(STATE, tmp_path / "b"))

    async with Checkpointer() as checkpointer:
        async with joint_checkpoint(checkpointer, tmp_path / "a") as joint:
            joint.add("now", STATE)
            task = asyncio.create_task(save_later(checkpointer))
        left.set()
        await task


async def test_blocking_on_what_this_loop_must_do_is_refused() -> None:
    async def state() -> dict[str, Any]:
        return STATE

    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        async with joint_checkpoint(checkpointer, "a") as joint:
            part = joint.add("later", state)
            with pytest.raises(DeadlockError, match="by this thread's event loop"):
                part.staged.wait()
            await part.staged
            part.staged.wait()


@rank_test(2)
async def test_ranks_that_would_wait_for_their_own_block_are_refused(rank: int, size: int, folder: Path) -> None:
    async with CheckpointManager(folder) as manager:
        await (await manager.save(1, {"w": torch.ones(3)}))
        async with manager.checkpoint(2) as joint:
            later, after = joint.add("later", lambda: STATE), joint.add("after", STATE)
            with pytest.raises(DeadlockError, match="cannot load on several ranks"):
                await manager.checkpointer.load({"w": torch.zeros(3)}, manager.path(1))
            with pytest.raises(DeadlockError, match="list steps"):
                await manager.refresh()
            for part in (later, after):  # ranks keep to the order
                with pytest.raises(DeadlockError, match="'later'"):
                    await part.staged
        assert manager.steps() == [1, 2]


async def test_a_task_that_awaits_preemption_is_let_go_when_the_manager_is_left(tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path, signals=[signal.SIGTERM]) as manager:
        waiting = asyncio.create_task(manager.preempted)
        await asyncio.sleep(0)
    with pytest.raises(ClosedError, match="before the run was preempted"):
        await waiting
    assert not manager.preempted.done()


def test_ctrl_c_while_entering_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpointer = Checkpointer()
    with monkeypatch.context() as patch:
        session = session_of(checkpointer)
        make_ready = session._make_ready

        def interrupted() -> None:
            signal.raise_signal(signal.SIGINT)
            make_ready()

        patch.setattr(session, "_make_ready", interrupted)
        with pytest.raises(KeyboardInterrupt):
            checkpointer.__enter__()
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("aiodcp")]
    with checkpointer:
        checkpointer.save_sync(STATE, tmp_path / "a").wait()


async def test_the_engine_of_a_checkpointer_that_is_forgotten_ends() -> None:
    checkpointer: Any = await Checkpointer(storage=MemoryStorage()).__aenter__()
    threads = {thread for thread in threading.enumerate() if thread.name == "aiodcp-engine"}
    assert threads
    del checkpointer
    until = time.monotonic() + 30
    while any(thread.is_alive() for thread in threads):
        assert time.monotonic() < until
        gc.collect()
        await asyncio.sleep(0.01)


async def test_a_failed_save_that_nobody_asks_about_is_logged_when_it_is_forgotten(
    faulty: FaultyStorage, caplog: pytest.LogCaptureFixture
) -> None:
    faulty.fail_once = OSError(28, "No space left on device")
    checkpointer: Any = await Checkpointer(storage=faulty).__aenter__()
    checkpointer.guard()  # hooks are the process's, and keep nobody alive
    ckpt = await checkpointer.save(make_state(), "a")
    await ckpt._state.uploaded.settled()
    while session_of(checkpointer).flows._under_way():
        await asyncio.sleep(0.001)
    del checkpointer, ckpt
    until = time.monotonic() + 30
    while (
        "the save failed, and its error was never retrieved" not in caplog.text
    ):  # threads let go of their last work soon
        assert time.monotonic() < until
        gc.collect()
        await asyncio.sleep(0.01)


async def test_whoever_leaves_after_another_task_has_gets_an_error() -> None:
    checkpointer = await Checkpointer(storage=MemoryStorage()).__aenter__()
    ckpt = await checkpointer.save(STATE, "a")
    first, second = checkpointer.__aexit__(None, None, None), checkpointer.__aexit__(None, None, None)
    assert [type(each) for each in await asyncio.gather(first, second, return_exceptions=True)] == [
        type(None),
        ClosedError,
    ]
    assert ckpt.uploaded.done()
    with pytest.raises(ClosedError, match="is not open"):
        await checkpointer.__aexit__(None, None, None)
