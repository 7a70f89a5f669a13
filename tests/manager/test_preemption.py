"""Asked to stop: all ranks at one step, a last save within the time that is left, or given up cleanly."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aiodcp import (
    ArgumentError,
    Checkpointer,
    CheckpointManager,
    Event,
    LocalStorage,
    Preempted,
    SaveCancelled,
    SaveFailed,
)
from aiodcp.testing import FaultyStorage, Gate

from ..support.ranks import World
from ..support.states import make_state


async def test_a_signal_ends_the_run_with_a_last_save(tmp_path: Path) -> None:
    reported: list[Event] = []
    before = signal.getsignal(signal.SIGTERM)
    async with CheckpointManager(
        tmp_path, save_interval=100, signals=[signal.SIGTERM], on_event=reported.append
    ) as manager:
        for step in range(1, 1000):
            if step == 7:
                os.kill(os.getpid(), signal.SIGTERM)
                await manager.preempted
            if manager.should_save(step):
                await manager.save(step, make_state(step))
            if manager.preempted.done():
                break
    assert signal.getsignal(signal.SIGTERM) == before
    [event] = [each for each in reported if isinstance(each, Preempted)]
    assert (event.step, event.reason) == (7, "signal SIGTERM")
    assert 29 < event.left_s <= 30
    async with CheckpointManager(tmp_path) as manager:
        assert manager.steps() == [7]
        assert not manager.preempted.done()


async def test_a_second_signal_does_what_it_did_before(tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        async with CheckpointManager(tmp_path, signals=[signal.SIGUSR1]) as manager:
            os.kill(os.getpid(), signal.SIGUSR1)
            await manager.preempted
            assert seen == []
            os.kill(os.getpid(), signal.SIGUSR1)
            assert seen == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR1) is not before
    finally:
        signal.signal(signal.SIGUSR1, before)


async def test_a_forked_child_is_not_kept_alive(tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path, signals=[signal.SIGTERM]) as manager:
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert not manager.preempted.done()


async def test_a_deadline_is_heard_its_grace_before(tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path, deadline=time.time() + 100.2, grace_s=100.0) as manager:
        assert not manager.should_save(1)
        await asyncio.wait_for(manager.preempted, 10)
        assert manager.should_save(1)


async def test_anybody_may_ask_from_any_thread(tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path) as manager:
        waiting = asyncio.ensure_future(manager.preempted)
        await asyncio.to_thread(manager.preempt, "the cloud takes the machine back")
        await waiting
        assert manager.should_save(3)


async def test_a_save_that_is_not_done_in_time_is_given_up_and_leaves_nothing(faulty: FaultyStorage) -> None:
    reported: list[Event] = []
    manager = CheckpointManager(
        "root", checkpointer=Checkpointer(storage=faulty), grace_s=0.3, on_event=reported.append, on_error="warn"
    )
    async with manager:
        ckpt = await manager.save(1, make_state(1))
        assert ckpt is not None
        await ckpt
        faulty.gate = Gate("write")
        ckpt = await manager.save(2, make_state(2))
        manager.preempt()
        await manager.preempted
        with pytest.raises(SaveCancelled):  # the last save waits for the one before, for as long as is left
            await manager.save(3, make_state(3))
    assert ckpt is not None
    assert ckpt.uploaded.exception() is not None
    assert {place for place, files in faulty.files.items() if files} - {"root/.aiodcp"} == {"root/step-1"}
    assert [each.step for each in reported if isinstance(each, SaveFailed)] == [2]


async def test_closing_is_bounded(faulty: FaultyStorage) -> None:
    manager = CheckpointManager("root", checkpointer=Checkpointer(storage=faulty))
    faulty.gate = Gate("sync")
    async with manager:
        ckpt = await manager.save(2, make_state(2))
        began = time.perf_counter()
        with pytest.raises(SaveCancelled, match="step-2"):
            await manager.aclose(timeout=0.05)
        assert time.perf_counter() - began < 5
        assert ckpt is not None
        assert ckpt.uploaded.exception() is not None
        assert not faulty.files.get("root/step-2")
        await manager.aclose(timeout=0.05)
    assert faulty.open_files == 0
    async with manager:  # it can be entered anew
        faulty.gate = lambda call: None
        ckpt = await manager.save(3, make_state(3))
        await manager.aclose()
        assert ckpt is not None
        assert ckpt.uploaded.done()
        assert ckpt.uploaded.exception() is None


async def test_no_thread_stays_behind(tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path, signals=[signal.SIGTERM], deadline=time.time() + 1000):
        assert "aiodcp-preempt" in {thread.name for thread in threading.enumerate()}
    assert "aiodcp-preempt" not in {thread.name for thread in threading.enumerate()}


def test_signals_are_heard_in_the_main_thread_only(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    def run() -> None:
        async def main() -> None:
            async with CheckpointManager(tmp_path, signals=[signal.SIGTERM]):
                pass

        try:
            asyncio.run(main())
        except ArgumentError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert "signals: cannot install signal handlers here" in str(errors[0])
    assert not [each.name for each in threading.enumerate() if each.name.startswith("aiodcp")]


@pytest.mark.parametrize(
    ("argument", "given"),
    [
        ("signals", {"signals": ["SIGTERM"]}),
        ("signals", {"signals": [15]}),
        ("grace_s", {"grace_s": 0}),
        ("grace_s", {"grace_s": "long"}),
        ("deadline", {"deadline": "tomorrow"}),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(argument: str, given: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"^{argument}: "):
        CheckpointManager("root", **given)


def _stop_together(rank: int, size: int, root: Path, in_step: bool) -> tuple[int, list[int]]:
    async def main() -> tuple[int, list[int]]:
        async with CheckpointManager(root, signals=[signal.SIGUSR1], save_interval=10**6) as manager:
            state = {"w": torch.zeros(100)}
            for step in range(1, 10**6):
                if in_step:
                    dist.all_reduce(torch.zeros(1))  # ranks cannot be further apart than one step
                else:
                    time.sleep(0.002 * (rank + 1))
                state["w"].fill_(step)
                if step == 20 and rank == size - 1:
                    os.kill(os.getpid(), signal.SIGUSR1)
                if manager.should_save(step):
                    await manager.save(step, state)
                    break
            assert manager.preempted.done()
        return step, manager.steps()

    return asyncio.run(main())


@pytest.mark.parametrize("in_step", [True, False])
def test_all_ranks_stop_at_the_same_step(in_step: bool, world: World, tmp_path: Path) -> None:
    results = world.run(3, _stop_together, tmp_path, in_step)
    [step] = {step for step, _ in results}
    assert step > 20
    assert [steps for _, steps in results] == [[step]] * 3

    async def check() -> None:
        async with CheckpointManager(tmp_path) as manager:
            state = {"w": torch.zeros(100)}
            assert await manager.restore(state) == step
            assert bool((state["w"] == step).all())

    asyncio.run(check())


def _wait_for_it(rank: int, size: int, root: Path) -> bool:
    async def main() -> bool:
        async with CheckpointManager(root) as manager:
            if rank == 0:
                manager.preempt()
            await asyncio.wait_for(manager.preempted, 20)
            return manager.should_save(5)

    return asyncio.run(main())


def test_ranks_that_ask_about_no_step_hear_of_it_all_the_same(world: World, tmp_path: Path) -> None:
    assert world.run(2, _wait_for_it, tmp_path) == [True, True]


async def test_managers_may_be_left_in_any_order(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    managers = [
        CheckpointManager(tmp_path / str(n), signals=[signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM]) for n in range(3)
    ]
    for manager in managers:
        await manager.__aenter__()
    for manager in managers:
        await manager.__aexit__(None, None, None)
    assert signal.getsignal(signal.SIGUSR1) == before


async def test_a_signal_that_cannot_be_heard_leaves_no_handler_behind(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ArgumentError, match="signals"):
        async with CheckpointManager(tmp_path, signals=[signal.SIGTERM, signal.SIGKILL]):
            pass
    assert signal.getsignal(signal.SIGTERM) == before
    assert not [each.name for each in threading.enumerate() if each.name.startswith("aiodcp")]


def test_ctrl_c_is_handed_back_after_a_plain_loop(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with CheckpointManager(tmp_path, signals=[signal.SIGINT]) as manager:
        manager.save_sync(1, make_state(1))
    assert signal.getsignal(signal.SIGINT) is before


async def test_less_is_left_when_the_deadline_comes_before_the_grace_is_over(tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path, deadline=time.time() + 5, grace_s=30) as manager:
        await asyncio.wait_for(manager.preempted, 10)
        left_s = manager._stopping.left_s
        assert left_s is not None
        assert left_s <= 5


async def test_preemption_that_is_heard_while_a_save_is_waited_for_bounds_the_wait(faulty: FaultyStorage) -> None:
    manager = CheckpointManager("root", checkpointer=Checkpointer(storage=faulty), grace_s=0.2, on_error="warn")
    async with manager:
        faulty.gate = Gate("write")
        await manager.save(1, make_state(1))
        loop = asyncio.get_running_loop()
        loop.call_later(0.05, manager.preempt)
        with pytest.raises(SaveCancelled):
            await manager.save(2, make_state(2))
        with pytest.raises(SaveCancelled):
            async with manager.checkpoint(3) as ckpt:
                ckpt.add("a", make_state(3))
    assert not any(files for place, files in faulty.files.items() if place != "root/.aiodcp")


async def test_leaving_does_not_wait_for_all_removals(tmp_path: Path) -> None:
    class Slow(LocalStorage):
        removed = 0

        async def remove(self, checkpoint_id: str, name: str, *, durable: bool = False) -> None:
            await super().remove(checkpoint_id, name, durable=durable)
            await asyncio.sleep(0.3 if durable else 0)
            self.removed += durable

    storage = Slow()
    async with CheckpointManager(tmp_path) as manager:
        for step in range(20):
            await manager.save(step, make_state(step))
    async with CheckpointManager(tmp_path, keep_last=1, checkpointer=Checkpointer(storage=storage)) as manager:
        ckpt = await manager.save(20, make_state(20))
        assert ckpt is not None
        await ckpt
        await manager.aclose(timeout=0.1)
    assert storage.removed < 20
    async with CheckpointManager(tmp_path, keep_last=1) as manager:
        await manager.save(21, make_state(21))
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-21"]
