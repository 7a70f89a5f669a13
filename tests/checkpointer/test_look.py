"""A large state is taken in the caller's thread, and its tensors are looked at in one of the engine's."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

from aiodcp import CaptureError, Checkpointer, MemoryStorage, RankError, TornSnapshotError, joint_checkpoint
from aiodcp._engine.device_copies import DeviceCopies
from aiodcp._state.capture import SMALL, Capture, Instant

from ..support.ranks import rank_test
from ..support.states import assert_equal, blank

WAITS_AT_MOST_S = 30.0


class Look:
    """Stops before the tensors are looked at, until it is told to go on."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.threads: list[str] = []
        real = Instant.look

        def look(instant: Instant, *arguments: Any) -> Capture:
            self.threads.append(threading.current_thread().name)
            self.begun.set()
            assert self.go_on.wait(WAITS_AT_MOST_S)
            return real(instant, *arguments)

        patch.setattr(Instant, "look", look)

    async def until_begun(self) -> None:
        assert await asyncio.to_thread(self.begun.wait, WAITS_AT_MOST_S)


@pytest.fixture
def look(monkeypatch: pytest.MonkeyPatch) -> Iterator[Look]:
    made = Look(monkeypatch)
    yield made
    made.go_on.set()


def large() -> dict[str, Any]:
    return {"model": {f"w{n}": torch.full((3,), float(n)) for n in range(SMALL)}, "step": 1, "log": [1]}


async def test_the_callers_loop_runs_on_and_what_is_no_tensor_is_of_the_instant(look: Look) -> None:
    state, storage = large(), MemoryStorage()
    async with Checkpointer(storage=storage) as checkpointer:
        saving = asyncio.create_task(checkpointer.save(state, "a"))
        await look.until_begun()
        state["log"].append(2)
        state["step"] = 2
        state["model"]["more"] = torch.ones(1)
        del state["model"]["w0"]
        look.go_on.set()
        await (await saving).uploaded
        loaded = blank(large())
        await checkpointer.load(loaded, "a")
    assert_equal(loaded, large())
    assert look.threads[0].startswith("aiodcp-compute")


async def test_a_small_state_is_looked_at_at_once(look: Look) -> None:
    look.go_on.set()
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        await (await checkpointer.save({"w": torch.ones(3)}, "a")).uploaded
    assert look.threads == ["MainThread"]


async def test_a_change_before_the_tensors_are_looked_at_is_seen(look: Look) -> None:
    """By the versions of some of them; and by the step of an optimizer, whatever it changes."""
    state = large()
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        saving = asyncio.create_task(checkpointer.save(state, "a"))
        await look.until_begun()
        torch._foreach_add_(list(state["model"].values()), 1.0)
        look.go_on.set()
        with pytest.raises(TornSnapshotError, match=r"model\.w0"):
            await (await saving).uploaded


async def test_a_step_before_the_tensors_are_looked_at_is_seen(look: Look) -> None:
    state, weight = large(), torch.nn.Parameter(torch.ones(3))
    state["model"]["weight"] = weight
    weight.grad = torch.ones(3)
    optimizer = torch.optim.SGD([weight], lr=1.0, fused=True)
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        saving = asyncio.create_task(checkpointer.save(state, "a"))
        await look.until_begun()
        optimizer.step()  # which does not count up the weight's version
        look.go_on.set()
        with pytest.raises(TornSnapshotError, match=r"model\.weight"):
            await (await saving).uploaded


async def test_a_guarded_optimizer_waits_for_a_state_that_is_not_looked_at_yet(look: Look) -> None:
    """Its thread is that of the caller's loop: nothing of the save may need it."""
    state, weight = large(), torch.nn.Parameter(torch.ones(3))
    state["model"]["weight"] = weight
    weight.grad = torch.ones(3)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        with checkpointer.guard(optimizer):
            saving = asyncio.create_task(checkpointer.save(state, "a"))
            await look.until_begun()
            threading.Timer(0.05, look.go_on.set).start()
            optimizer.step()
            await (await saving).uploaded
        loaded = blank(state)
        await checkpointer.load(loaded, "a")
    assert loaded["model"]["weight"].tolist() == [1.0] * 3


async def test_what_cannot_be_saved_is_raised_by_save_and_the_next_save_works(look: Look) -> None:
    look.go_on.set()
    state = large()
    state["model"]["nothing"] = torch.empty(3, device="meta")
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        with pytest.raises(CaptureError, match=r"model\.nothing: .*meta"):
            await checkpointer.save(state, "a")
        del state["model"]["nothing"]
        await (await checkpointer.save(state, "a")).uploaded


async def test_cancelled_meanwhile_nothing_is_saved(look: Look) -> None:
    storage = MemoryStorage()
    async with Checkpointer(storage=storage) as checkpointer:
        saving = asyncio.create_task(checkpointer.save(large(), "a"))
        await look.until_begun()
        saving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await saving
        look.go_on.set()
        await (await checkpointer.save(large(), "b")).uploaded
    assert [*storage.files] == ["b"]


async def test_left_meanwhile_the_save_is_finished(look: Look) -> None:
    storage = MemoryStorage()
    async with Checkpointer(storage=storage) as checkpointer:
        saving = asyncio.create_task(checkpointer.save(large(), "a"))
        await look.until_begun()
        threading.Timer(0.05, look.go_on.set).start()
    await (await saving).uploaded
    assert ".metadata" in storage.files["a"]


@rank_test(2)
async def test_what_one_rank_cannot_save_all_hear_of(rank: int, size: int, tmp_path: Path) -> None:
    state = large()
    mesh = init_device_mesh("cpu", (size,))
    if rank == 1:
        state["model"]["grad"] = DTensor.from_local(torch.ones(3), mesh, [Partial()], run_check=False)
    async with Checkpointer() as checkpointer:
        if rank == 1:
            with pytest.raises(CaptureError, match=r"model\.grad: has Partial placements"):
                await checkpointer.save(state, tmp_path / "a")
        else:
            with pytest.raises(RankError, match=r"rank 1.*Partial placements"):
                await (await checkpointer.save(state, tmp_path / "a")).uploaded
        state["model"].pop("grad", None)
        await (await checkpointer.save(state, tmp_path / "b")).uploaded


def test_within_a_running_loop_nothing_heavy_is_imported() -> None:
    program = """
import asyncio, sys, torch
from aiodcp import Checkpointer, MemoryStorage

async def main():
    state = {"model": torch.nn.Linear(2, 2), "sets": {1, 2}}
    before = set(sys.modules)
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        await checkpointer.prepare(state)
        await (await checkpointer.save(state, "a")).uploaded
        await checkpointer.load(state, "a")
    print(*sorted(set(sys.modules) - before))

asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= {"torch.utils._device"}, done.stdout


async def test_tensors_that_are_pickled_elsewhere_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse ones, on a device: what the caller's stream has still to compute is in them."""
    called: list[str] = []
    monkeypatch.setattr(DeviceCopies, "enter_thread", lambda copies: called.append("enter"))
    monkeypatch.setattr(DeviceCopies, "wait_for_marks", lambda copies: called.append("wait"))
    state = large()
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        await (await checkpointer.save(state, "a")).uploaded
        state["model"]["sparse"] = torch.eye(3).to_sparse()
        before, called[:] = [*called], []
        await (await checkpointer.save(state, "b")).uploaded
        assert called[:2] == ["enter", "wait"]
        assert "wait" not in before
        called.clear()
        await (await checkpointer.save({"sparse": torch.eye(3).to_sparse()}, "c")).uploaded
    assert "wait" not in called


async def test_participants_are_looked_at_in_the_callers_thread_whose_device_stays(
    look: Look, monkeypatch: pytest.MonkeyPatch
) -> None:
    look.go_on.set()
    entered: list[str] = []
    monkeypatch.setattr(DeviceCopies, "enter_thread", lambda copies: entered.append(threading.current_thread().name))
    state, storage = large(), MemoryStorage()
    state["model"]["sparse"] = torch.eye(3).to_sparse()
    async with (
        Checkpointer(storage=storage) as checkpointer,
        joint_checkpoint(checkpointer, "a") as checkpoint,
    ):
        checkpoint.add("all", state)
        assert look.threads == ["MainThread"]
    assert "MainThread" not in entered
    assert ".metadata" in storage.files["a"]
