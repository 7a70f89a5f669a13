"""The same calls without an event loop, by the same code."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
import torch

from aiodcp import (
    Checkpointer,
    CheckpointManager,
    ClosedError,
    MismatchError,
    SaveError,
    TornSnapshotError,
    WriteError,
)
from aiodcp.testing import FaultyStorage, Gate

from ..support.ranks import World
from ..support.slow_copy import SlowCopy
from ..support.states import assert_equal, blank, make_state


def test_a_checkpointer_saves_and_loads(tmp_path: Path) -> None:
    with Checkpointer() as checkpointer:
        checkpointer.prepare_sync(make_state(0))
        for seed in range(3):
            state = make_state(seed)
            ckpt = checkpointer.save_sync(state, tmp_path / str(seed), custom_metadata={"seed": seed})
            ckpt.staged.wait()
            state["model"]["weight"].zero_()
            ckpt.uploaded.wait(60)
            assert checkpointer.read_custom_metadata_sync(tmp_path / str(seed)) == {"seed": seed}
        target = blank(make_state())
        checkpointer.load_sync(target, tmp_path / "1")
        assert_equal(make_state(1), target)
        with pytest.raises(MismatchError):
            checkpointer.load_sync({"other": 1}, tmp_path / "1")
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("aiodcp")]


def test_a_manager_keeps_steps(tmp_path: Path) -> None:
    for first in (1, 4):
        with CheckpointManager(tmp_path, keep_last=1, save_interval=1) as manager:
            state = blank(make_state())
            assert manager.restore_sync(state) == (first - 1 or None)
            for step in range(first, first + 3):
                assert manager.should_save(step)
                manager.save_sync(step, make_state(step))
        assert manager.steps() == [first + 2]
        assert manager.stats.saved == 3
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-6"]


def test_leaving_drains_and_tells(faulty: FaultyStorage) -> None:
    gate = Gate("put")
    faulty.gate = gate
    threading.Timer(0.05, gate.open).start()
    with Checkpointer(storage=faulty) as checkpointer:
        checkpointer.save_sync(make_state(1), "a")
    assert ".metadata" in faulty.files["a"]
    with pytest.raises(WriteError), Checkpointer(storage=faulty) as checkpointer:
        faulty.fail_once = OSError(28, "No space left on device")
        checkpointer.save_sync(make_state(1), "a")
    with pytest.raises(KeyError) as caught, Checkpointer(storage=faulty) as checkpointer:
        faulty.fail_once = OSError(28, "No space left on device")
        checkpointer.save_sync(make_state(1), "a")
        raise KeyError("here")
    assert "No space left" in caught.value.__notes__[0]


def test_a_manager_can_be_closed_early_and_in_time(faulty: FaultyStorage) -> None:
    faulty.gate = Gate("sync")
    with CheckpointManager("root", checkpointer=Checkpointer(storage=faulty)) as manager:
        manager.save_sync(1, make_state(1))
        with pytest.raises(SaveError, match="cancelled"):
            manager.close(0.05)
    assert not faulty.files.get("root/step-1")


def test_a_guarded_optimizer_waits_here_too(faulty: FaultyStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    slow = SlowCopy(monkeypatch)
    with Checkpointer(storage=faulty) as checkpointer:
        ckpt = checkpointer.save_sync({"w": weight}, "a")
        weight.grad = torch.ones(1000)
        optimizer.step()
        slow.let_go.set()
        with pytest.raises(TornSnapshotError):
            ckpt.uploaded.wait()
        slow.let_go.clear()
        checkpointer.guard(optimizer)
        ckpt = checkpointer.save_sync({"w": weight}, "a")
        threading.Timer(0.02, slow.let_go.set).start()
        optimizer.step()
        ckpt.uploaded.wait()
        target = {"w": torch.zeros(1000)}
        checkpointer.load_sync(target, "a")
        assert bool((target["w"] == -1).all())


async def test_inside_an_event_loop_it_is_refused(tmp_path: Path) -> None:
    checkpointer = Checkpointer()
    with pytest.raises(ClosedError, match="async with"), checkpointer:
        pass
    async with checkpointer:
        with pytest.raises(ClosedError, match=r"await save\(\)"):
            checkpointer.save_sync(make_state(), tmp_path)
    assert checkpointer._runner is None


def test_outside_a_block_it_is_refused(tmp_path: Path) -> None:
    checkpointer = Checkpointer()
    with pytest.raises(ClosedError, match="`with` block"):
        checkpointer.save_sync(make_state(), tmp_path)
    with checkpointer, pytest.raises(ClosedError, match="open already"), checkpointer:
        pass
    with pytest.raises(ClosedError):
        checkpointer.load_sync({}, tmp_path)


def test_a_manager_that_cannot_be_entered_leaves_nothing_open(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")

    class Broken(FaultyStorage):
        async def list_children(self, root: str) -> list[str]:
            raise OSError(13, "Permission denied")

    manager = CheckpointManager("root", checkpointer=Checkpointer(storage=Broken()))
    with pytest.raises(Exception, match="Permission denied"), manager:
        pass
    assert manager._runner is None
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("aiodcp")]


def test_the_doc_says_where_to_look() -> None:
    assert "Like `await save()`" in (Checkpointer.save_sync.__doc__ or "")
    assert vars(CheckpointManager)["restore_sync"].__name__ == "restore_sync"


def _ranks(rank: int, size: int, root: Path) -> list[int]:
    with CheckpointManager(root, keep_last=2) as manager:
        state = {"w": torch.zeros(100)}
        for step in range(1, 4):
            state["w"].fill_(step)
            ckpt = manager.save_sync(step, state)
            assert ckpt is not None
            ckpt.staged.wait(30)
        assert manager.restore_sync(state, 2) == 2
        assert bool((state["w"] == 2).all())
    return manager.steps()


def test_ranks_in_plain_loops(world: World, tmp_path: Path) -> None:
    assert world.run(2, _ranks, tmp_path) == [[2, 3]] * 2


def test_another_event_loop_may_run_beside(tmp_path: Path) -> None:
    with Checkpointer() as checkpointer:
        ckpt = checkpointer.save_sync(make_state(1), tmp_path)

        async def wait() -> None:
            await ckpt.uploaded

        thread = threading.Thread(target=lambda: asyncio.run(wait()))
        thread.start()
        thread.join(30)
        assert ckpt.uploaded.done()
