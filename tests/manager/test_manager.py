"""A manager's steps: saved, listed, kept, removed, restored; with failures reported, and in several ranks alike."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from aiodcp import (
    ArgumentError,
    BusyError,
    Checkpointer,
    CheckpointManager,
    ClosedError,
    CorruptError,
    LocalStorage,
    MemoryStorage,
    MismatchError,
    NotACheckpointError,
    RankError,
    SaveError,
    UnsafeError,
    WriteError,
)
from aiodcp.manager.events import (
    Event,
    FellBack,
    LeftoverRemoved,
    RemovalFailed,
    Restored,
    SaveBegan,
    SaveFailed,
    SaveFinished,
    SaveSkipped,
    StepRemoved,
)
from aiodcp.storage import file_lock
from aiodcp.testing import FaultyStorage, Gate

from ..support.commit_gate import CommitGated
from ..support.ranks import World
from ..support.states import assert_equal, blank, make_state


def _on(storage: FaultyStorage, root: str = "root", **options: Any) -> CheckpointManager:
    return CheckpointManager(root, checkpointer=Checkpointer(storage=storage), history=False, **options)


def _there(storage: FaultyStorage) -> set[str]:
    return {place.removeprefix("root/") for place, files in storage.files.items() if files}


async def _save(manager: CheckpointManager, step: int, **options: Any) -> None:
    checkpoint = await manager.save(step, make_state(step), **options)
    assert checkpoint is not None
    await checkpoint


async def test_a_run_goes_on_where_it_was(tmp_path: Path) -> None:
    for first, last in ((1, 4), (5, 7)):
        state = blank(make_state())
        async with CheckpointManager(tmp_path, keep_last=2, save_interval=2) as manager:
            assert await manager.restore(state) == (first - 1 or None)
            if first > 1:
                assert_equal(make_state(first - 1), state)
            for step in range(first, last + 1):
                if manager.should_save(step):
                    await manager.save(step, make_state(step))
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-4", "step-6"]


@pytest.mark.parametrize(("interval", "due"), [(None, []), (1, [1, 2, 3, 4, 5, 6]), (3, [3, 6])])
def test_steps_are_due_by_their_interval(interval: int | None, due: list[int]) -> None:
    manager = CheckpointManager("root", save_interval=interval)
    assert [step for step in range(7) if manager.should_save(step)] == due


async def test_steps_latest_best_and_metrics_survive_the_process(faulty: FaultyStorage) -> None:
    async with _on(faulty, keep_best=("loss", "min")) as manager:
        assert (manager.steps(), manager.latest, manager.best) == ([], None, None)
        for step, loss in ((1, 0.5), (2, 0.25), (3, 0.75)):
            await _save(manager, step, metrics={"loss": torch.tensor(loss)})
    async with _on(faulty, keep_best=("loss", "min")) as manager:
        assert (manager.steps(), manager.latest, manager.best) == ([1, 2, 3], 3, 2)
        assert manager.metrics(3) == {"loss": 0.75}
        state = blank(make_state())
        assert await manager.restore(state, "best") == 2
        assert_equal(make_state(2), state)
        assert await manager.restore(state, 1) == 1
        assert_equal(make_state(1), state)
        with pytest.raises(NotACheckpointError, match="step-7"):
            await manager.restore(state, 7)


async def test_what_is_not_kept_is_removed_after_the_commit_and_not_before() -> None:
    faulty = CommitGated()
    async with _on(faulty, keep_last=1, keep_every=10, keep_best=("loss", "min")) as manager:
        for step, loss in ((10, 3.0), (11, 1.0), (12, 2.0)):
            await _save(manager, step, metrics={"loss": loss})
        gate = Gate("commit")
        faulty.gate = gate
        ckpt = await manager.save(13, make_state(13), metrics={"loss": 2.0})
        await gate.wait_reached()
        assert manager.steps() == [10, 11, 12]
        assert _there(faulty) == {"step-10", "step-11", "step-12", "step-13"}  # the last one's data
        gate.open()
        assert ckpt is not None
        await ckpt
        assert manager.steps() == [10, 11, 13]
    assert _there(faulty) == {"step-10", "step-11", "step-13"}


async def test_a_save_that_fails_removes_nothing(faulty: FaultyStorage) -> None:
    async with _on(faulty, keep_last=1) as manager:
        await _save(manager, 1)
        faulty.fail_once = OSError(28, "No space left on device")
        ckpt = await manager.save(2, make_state(2))
        assert ckpt is not None
        with pytest.raises(WriteError):
            await ckpt
        assert manager.steps() == [1]
        assert manager.stats.failed == 1
    assert _there(faulty) == {"step-1"}


async def test_a_step_that_cannot_be_removed_is_reported_and_tried_again(faulty: FaultyStorage) -> None:
    reported: list[Event] = []
    refuse = True

    def gate(call: str) -> None:
        if call == "remove" and refuse:
            raise OSError(30, "Read-only file system")

    faulty.gate = gate
    async with _on(faulty, keep_last=1, on_event=reported.append) as manager:
        for step in (1, 2):
            await _save(manager, step)
        while not any(isinstance(each, RemovalFailed) for each in reported):
            await asyncio.sleep(0.001)
        while manager.steps() != [1, 2]:
            await asyncio.sleep(0.001)
        refuse = False
        await _save(manager, 3)
    assert _there(faulty) == {"step-3"}
    assert [each.step for each in reported if isinstance(each, StepRemoved)] == [1, 2]


async def test_a_step_is_replaced_when_it_is_saved_again(faulty: FaultyStorage) -> None:
    async with _on(faulty) as manager:
        await _save(manager, 1, metrics={"loss": 1.0})
        ckpt = await manager.save(1, make_state(5), metrics={"loss": 2.0})
        assert ckpt is not None
        await ckpt
        assert manager.metrics(1) == {"loss": 2.0}
        state = blank(make_state())
        assert await manager.restore(state) == 1
        assert_equal(make_state(5), state)


async def test_a_step_that_is_being_removed_is_waited_for_when_it_is_saved_again(faulty: FaultyStorage) -> None:
    async with _on(faulty, keep_last=1) as manager:
        await _save(manager, 1)
        gate = Gate("remove")
        faulty.gate = gate
        await _save(manager, 2)
        await gate.wait_reached()
        again = asyncio.ensure_future(manager.save(1, make_state(1)))
        await asyncio.sleep(0.01)
        assert not again.done()
        gate.open()
        ckpt = await again
        assert ckpt is not None
        await ckpt
    assert _there(faulty) == {"step-1"}  # the one that was committed last


async def test_damage_is_an_error_or_a_reason_to_fall_back(tmp_path: Path) -> None:
    reported: list[Event] = []
    async with CheckpointManager(tmp_path, on_event=reported.append) as manager:
        for step in (1, 2, 3):
            await _save(manager, step)
        for step in (2, 3):
            [file] = (tmp_path / f"step-{step}").glob("*.distcp")
            data = bytearray(file.read_bytes())
            at = data.index(bytes(make_state(step)["model"]["weight"].numpy().tobytes()[:64]))
            data[at] ^= 1
            file.write_bytes(data)
        state = blank(make_state())
        with pytest.raises(CorruptError):
            await manager.restore(state)
        assert await manager.restore(state, fall_back=True) == 1
        assert_equal(make_state(1), state)
        assert [each.step for each in reported if isinstance(each, FellBack)] == [3, 2]
        assert await manager.restore(blank(make_state()), 1, fall_back=True) == 1
        [file] = (tmp_path / "step-1").glob("*.distcp")
        os.truncate(file, 100)
        with pytest.raises(CorruptError):
            await manager.restore(state, fall_back=True)


@pytest.mark.parametrize("on_busy", ["skip", "raise"])
async def test_a_save_that_comes_too_soon_is_counted(on_busy: Any, faulty: FaultyStorage) -> None:
    reported: list[Event] = []
    gate = Gate("put")
    faulty.gate = gate
    async with _on(faulty, on_busy=on_busy, on_event=reported.append) as manager:
        assert await manager.save(1, make_state(1)) is not None
        await gate.wait_reached()
        if on_busy == "skip":
            assert await manager.save(2, make_state(2)) is None
        else:
            with pytest.raises(BusyError):
                await manager.save(2, make_state(2))
        waiting = asyncio.ensure_future(manager.save(3, make_state(3), on_busy="wait"))
        await asyncio.sleep(0.01)
        gate.open()
        ckpt = await waiting
        assert ckpt is not None
        await ckpt
        assert manager.stats.skipped == 1
        assert manager.stats.saved == 2
        assert manager.stats.waited_s >= 0.01
        assert [each.step for each in reported if isinstance(each, SaveSkipped)] == [2]
        assert manager.stats.age_s is not None


async def test_failures_are_raised_or_reported_and_the_run_goes_on(
    faulty: FaultyStorage, caplog: pytest.LogCaptureFixture
) -> None:
    reported: list[Event] = []
    with caplog.at_level(logging.INFO, "aiodcp"):
        async with _on(faulty, on_error="warn", on_event=reported.append) as manager:
            faulty.fail_once = OSError(30, "Read-only file system")
            await manager.save(1, make_state(1))
            await _save(manager, 2)
            faulty.fail_once = OSError(30, "Read-only file system")
            ckpt = await manager.save(3, make_state(3))
    assert ckpt is not None
    with pytest.raises(WriteError):  # whoever asks gets it
        await ckpt
    assert [each.step for each in reported if isinstance(each, SaveFailed)] == [1, 3]
    assert manager.stats.failed == 2
    lines = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(lines) == 2
    assert "step 1, rank 0: save failed: WriteError" in lines[0].getMessage()
    assert lines[0].__dict__["step"] == 1

    with pytest.raises(WriteError):
        async with _on(faulty) as manager:
            faulty.fail_once = OSError(30, "Read-only file system")
            await manager.save(4, make_state(4))


async def test_a_mistake_of_the_callers_is_raised_whatever_is_said_of_errors(faulty: FaultyStorage) -> None:
    async with _on(faulty, on_error="warn") as manager:
        for step in (-1, 1.5, True):
            with pytest.raises(ArgumentError, match="step"):
                await manager.save(step, make_state())  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="metrics"):
            await manager.save(1, make_state(), metrics={"loss": "low"})  # type: ignore[dict-item]
        with pytest.raises(ArgumentError, match="metrics"):
            await manager.save(1, make_state(), metrics={"loss": 10**400})
        with pytest.raises(ArgumentError, match="keep_best"):
            await manager.restore({}, "best")
        with pytest.raises(ArgumentError, match="step"):
            await manager.restore({}, "newest")  # type: ignore[arg-type]
    assert _there(faulty) == set()


@pytest.mark.parametrize(
    ("argument", "given"),
    [
        ("root", {"root": ""}),
        ("checkpointer", {"checkpointer": "here"}),
        ("keep_last", {"keep_last": 0}),
        ("save_interval", {"save_interval": 0}),
        ("on_busy", {"on_busy": "drop"}),
        ("on_error", {"on_error": "ignore"}),
        ("on_event", {"on_event": 3}),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused_by_name(argument: str, given: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError, match=f"^{argument}: "):
        CheckpointManager(**({"root": "r"} | given))


async def test_events_come_in_order_and_can_be_followed(faulty: FaultyStorage) -> None:
    seen: list[Event] = []

    async def follow(manager: CheckpointManager) -> None:
        async for event in manager.events():
            seen.append(event)

    def raising(event: Event) -> None:
        raise RuntimeError("a callback that fails harms nothing")

    async with asyncio.TaskGroup() as group:
        async with _on(faulty, keep_last=1, on_event=raising) as manager:
            group.create_task(follow(manager))
            await asyncio.sleep(0)
            for step in (1, 2):
                await _save(manager, step)
            await manager.restore(blank(make_state()))
    kinds = [(type(each), each.step) for each in seen if not isinstance(each, StepRemoved)]
    assert kinds == [(SaveBegan, 1), (SaveFinished, 1), (SaveBegan, 2), (SaveFinished, 2), (Restored, 2)]
    [removed] = [each for each in seen if isinstance(each, StepRemoved)]
    assert removed.checkpoint_id == "root/step-1"
    finished = seen[1]
    assert isinstance(finished, SaveFinished)
    assert 0 < finished.staged_s <= finished.seconds
    assert finished.held_s > 0
    assert finished.nbytes > 0
    assert {"capture", "plan", "stage", "write", "commit"} <= finished.phases.keys()


async def test_leftovers_are_not_listed_and_removed_by_the_next_manager_that_saves(tmp_path: Path) -> None:
    reported: list[Event] = []
    (tmp_path / "step-9").mkdir()
    (tmp_path / "step-9" / f"__0_0_{32 * '0'}.distcp").write_bytes(b"half")
    async with CheckpointManager(tmp_path, on_event=reported.append) as manager:
        assert manager.steps() == []
        assert await manager.restore(blank(make_state())) is None
    assert (tmp_path / "step-9").exists()
    async with CheckpointManager(tmp_path, on_event=reported.append) as manager:
        await _save(manager, 1)
    assert (tmp_path / "step-9").exists()  # no manager has saved here before: it may be alive, and has no lock to hold
    async with CheckpointManager(tmp_path, on_event=reported.append) as manager:
        assert manager.steps() == [1]
    assert (tmp_path / "step-9").exists()  # who only reads removes nothing: it may be anybody's that is being written
    async with CheckpointManager(tmp_path, on_event=reported.append) as manager:
        await _save(manager, 1)
    assert not (tmp_path / "step-9").exists()
    assert [each.step for each in reported if isinstance(each, LeftoverRemoved)] == [9]


_SAVING = """
import asyncio, sys
import torch
from aiodcp import CheckpointManager, Checkpointer, LocalStorage

class Stuck(LocalStorage):
    async def put(self, checkpoint_id, name, data):
        print("writing", flush=True)
        await asyncio.sleep(60)

async def main():
    async with CheckpointManager(sys.argv[1], checkpointer=Checkpointer(storage=Stuck())) as manager:
        await manager.save(5, {"w": torch.ones(1000)})

asyncio.run(main())
"""


async def test_what_a_live_save_of_another_process_is_writing_stays(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", _SAVING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert await asyncio.to_thread(other.stdout.readline) == "writing\n"
    async with CheckpointManager(tmp_path) as manager:
        await _save(manager, 1)
    assert list((tmp_path / "step-5").glob("*.distcp"))
    other.kill()
    other.communicate()
    async with CheckpointManager(tmp_path) as manager:
        await _save(manager, 2)
        assert manager.steps() == [1, 2]
    assert not (tmp_path / "step-5").exists()


async def test_a_manager_of_this_process_leaves_another_ones_save_alone(tmp_path: Path) -> None:
    class Held(LocalStorage):
        gate = Gate("put")

        async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
            await self.gate._hold()
            await super().put(checkpoint_id, name, data)

    async with CheckpointManager(tmp_path, checkpointer=Checkpointer(storage=Held())) as manager:
        ckpt = await manager.save(1, make_state(1))
        await Held.gate.wait_reached()
        async with CheckpointManager(tmp_path) as other:
            assert other.steps() == []
        Held.gate.open()
        assert ckpt is not None
        await ckpt
        async with CheckpointManager(tmp_path) as other:
            assert other.steps() == [1]


async def test_others_steps_are_found_by_looking_again(tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path) as trainer, CheckpointManager(tmp_path) as evaluator:
        await _save(trainer, 1)
        assert evaluator.steps() == []
        assert await evaluator.refresh() == [1]
        await _save(trainer, 2)
        assert await evaluator.restore(blank(make_state())) == 2


def _ranks_keep_alike(rank: int, size: int, root: Path) -> tuple[list[int], int | None, int | None, list[str]]:
    reported: list[Event] = []

    async def main() -> tuple[list[int], int | None, int | None]:
        async with CheckpointManager(root, keep_last=2, keep_best=("loss", "min"), on_event=reported.append) as manager:
            state = {"w": torch.full((100,), -1.0)}
            assert await manager.restore(state) is None
            for step in range(1, 6):
                state["w"].fill_(step)
                ckpt = await manager.save(step, state, metrics={"loss": float(step == 4)})
                assert ckpt is not None
                await ckpt
            assert await manager.restore(state, "best") == 5
            assert await manager.restore(state, 4) == 4
            assert bool((state["w"] == 4).all())
            with pytest.raises(NotACheckpointError):
                await manager.restore(state, 77)
            return manager.steps(), manager.latest, manager.best

    steps, latest, best = asyncio.run(main())
    return steps, latest, best, [type(each).__name__ for each in reported]


def test_ranks_know_the_same_steps_and_one_of_them_removes(world: World, tmp_path: Path) -> None:
    results = world.run(3, _ranks_keep_alike, tmp_path)
    assert {(tuple(steps), latest, best) for steps, latest, best, _ in results} == {((4, 5), 5, 5)}
    assert [reported.count("StepRemoved") for *_, reported in results] == [3, 0, 0]
    assert [reported.count("SaveFinished") for *_, reported in results] == [5, 5, 5]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-4", "step-5"]


def _ranks_fall_back(rank: int, size: int, root: Path) -> tuple[int | None, float]:
    async def main() -> tuple[int | None, float]:
        async with CheckpointManager(root) as manager:
            state = {"w": torch.full((100_000,), -1.0)}
            return await manager.restore(state, fall_back=True), float(state["w"][-1])

    return asyncio.run(main())


def test_damage_that_one_rank_finds_takes_all_back(world: World, tmp_path: Path) -> None:
    async def save() -> None:
        async with CheckpointManager(tmp_path) as manager:
            for step in (1, 2):
                ckpt = await manager.save(step, {"w": torch.full((100_000,), float(step))})
                assert ckpt is not None
                await ckpt

    asyncio.run(save())
    [file] = (tmp_path / "step-2").glob("*.distcp")
    data = bytearray(file.read_bytes())
    data[200_000] ^= 1
    file.write_bytes(data)
    assert world.run(2, _ranks_fall_back, tmp_path) == [(1, 1.0), (1, 1.0)]


def _one_rank_is_wrong(rank: int, size: int, root: Path) -> list[str]:
    class Closed(LocalStorage):
        def lock(self, root: str, *, exclusive: bool, create: bool = True) -> Any:
            if not exclusive:
                raise OSError(13, "Permission denied")
            return super().lock(root, exclusive=exclusive, create=create)

    async def main() -> list[str]:
        reported: list[str] = []
        state = {"w": torch.ones(100)}
        async with CheckpointManager(root) as manager:
            metrics: Any = {"loss": "low"} if rank == 1 else {"loss": 1.0}
            for joint in (False, True):
                try:
                    if joint:
                        async with manager.checkpoint(1, metrics=metrics) as ckpt:
                            ckpt.add("a", state)
                    else:
                        await (await manager.save(1, state, metrics=metrics))
                except (RankError, ArgumentError, SaveError) as error:
                    reported.append(f"{type(error).__name__}: {error}")
            ckpt_after = await manager.save(2, state)
            assert ckpt_after is not None
            await ckpt_after
        async with CheckpointManager(root, checkpointer=Checkpointer(storage=Closed())) as manager:
            try:
                await (await manager.save(3, state))
            except (RankError, WriteError) as error:
                reported.append(f"{type(error).__name__}: {error}")
        return reported

    return asyncio.run(main())


def test_what_is_wrong_on_one_rank_is_reported_on_all_at_once(world: World, tmp_path: Path) -> None:
    zero, one = world.run(2, _one_rank_is_wrong, tmp_path)
    assert all("metrics" in each for each in zero[:2] + one[:2])
    assert "Permission denied" in zero[-1]
    assert "Permission denied" in one[-1]


async def test_a_root_that_may_only_be_read_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with CheckpointManager(tmp_path) as manager:
        await _save(manager, 1)

    async def refuse(path: str, make: bool) -> int:
        raise OSError(30, "Read-only file system", path)

    monkeypatch.setattr(file_lock.locks, "open", refuse)
    async with CheckpointManager(tmp_path) as manager:
        assert manager.steps() == [1]
        assert await manager.restore(blank(make_state())) == 1
        with pytest.raises(WriteError, match="Read-only"):
            await manager.save(2, make_state())
    async with CheckpointManager(tmp_path / "nothing") as manager:
        assert manager.steps() == []
    assert not (tmp_path / "nothing").exists()


async def test_the_newest_is_the_one_that_was_committed_last(faulty: FaultyStorage) -> None:
    async with _on(faulty, keep_last=2) as manager:
        for step in (80, 90, 100):
            await _save(manager, step)
        assert await manager.restore(blank(make_state()), 90) == 90  # going back
        await _save(manager, 95)
        assert (manager.steps(), manager.latest) == ([95, 100], 95)
        await _save(manager, 96)
    async with _on(faulty, keep_last=2) as manager:
        assert (manager.steps(), manager.latest) == ([95, 96], 96)
    assert _there(faulty) == {"step-95", "step-96"}


async def test_a_damaged_step_takes_no_good_ones_place(tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path, keep_last=2) as manager:
        for step in (50, 100):
            await _save(manager, step)
        [file] = (tmp_path / "step-100").glob("*.distcp")
        os.truncate(file, 100)
        assert await manager.restore(blank(make_state()), fall_back=True) == 50
        await _save(manager, 60)
        assert (manager.steps(), manager.latest) == ([50, 60, 100], 60)
        await _save(manager, 100)
        assert manager.steps() == [60, 100]
        assert await manager.restore(blank(make_state())) == 100


async def test_a_step_that_is_being_restored_is_not_removed(faulty: FaultyStorage) -> None:
    async with _on(faulty, keep_last=1) as manager:
        await _save(manager, 1)
        gate, seen = Gate("get"), 0

        def second(call: str) -> Any:  # the first is the look at what there is
            nonlocal seen
            seen += call == "get"
            return gate(call) if call == "get" and seen == 2 else None

        faulty.gate = second
        state = blank(make_state())
        restoring = asyncio.ensure_future(manager.restore(state))
        await gate.wait_reached()
        await _save(manager, 2)
        assert manager.steps() == [1, 2]
        gate.open()
        assert await restoring == 1
        assert_equal(make_state(1), state)
        await _save(manager, 3)
        assert manager.steps() == [3]


async def test_what_is_committed_while_a_look_is_under_way_is_not_forgotten(faulty: FaultyStorage) -> None:
    async with _on(faulty, keep_last=1) as manager:
        await _save(manager, 1)
        since = manager._catalog.change_count()
        seen = await manager._catalog.list_complete()
        await _save(manager, 2)
        manager._catalog.update(seen, since)
        assert manager.steps() == [2]


async def test_a_manager_that_has_not_looked_says_so(faulty: FaultyStorage) -> None:
    manager = _on(faulty)
    preempted = manager.preempted
    assert "not entered yet" in repr(manager)
    with pytest.raises(ClosedError):
        manager.steps()
    async with manager:
        await _save(manager, 1)
        with pytest.raises(NotACheckpointError):
            manager.metrics(7)
        manager.preempt()
        await asyncio.wait_for(preempted, 10)
    assert manager.steps() == [1]
    assert [event async for event in manager.events()] == []


async def test_events_count_from_the_call_on(faulty: FaultyStorage) -> None:
    async with _on(faulty) as manager:
        events = manager.events()
        await _save(manager, 1)
    assert [type(event) for event in [each async for each in events]] == [SaveBegan, SaveFinished]


async def test_a_callback_that_wants_to_exit_harms_nothing(faulty: FaultyStorage) -> None:
    def leave(event: Event) -> None:
        raise SystemExit(3)

    async with _on(faulty, on_event=leave) as manager:
        await _save(manager, 1)
        await _save(manager, 2)


async def test_one_root_has_one_lock_by_whatever_name(tmp_path: Path) -> None:
    root, link = tmp_path / "root", tmp_path / "link"
    root.mkdir()
    link.symlink_to(root)
    storage = LocalStorage()
    async with storage.lock(str(root), exclusive=False):
        async with storage.lock(str(link), exclusive=True) as alone:
            assert not alone
        async with storage.lock(str(link), exclusive=False):
            pass
        code = (
            "import asyncio, sys\nfrom aiodcp import LocalStorage\n"
            "async def main():\n"
            "    async with LocalStorage().lock(sys.argv[1], exclusive=True) as alone:\n"
            "        print(alone)\n"
            "asyncio.run(main())"
        )
        done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, check=True)
        assert done.stdout == "False\n"


def test_a_forked_child_leaves_its_parents_manager_alone(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, keep_last=1) as manager:
        for step in (1, 2):
            manager.save_sync(step, make_state(step))
        child = os.fork()
        if child == 0:
            try:
                with pytest.raises(ClosedError, match="forked"):
                    manager.save_sync(4, make_state(4))
                manager.__exit__(None, None, None)
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        manager.save_sync(3, make_state(3))
    assert manager.steps() == [3]


def _ranks_fall_back_during_a_removal(rank: int, size: int, root: Path) -> tuple[list[int], str]:
    class Slow(LocalStorage):
        async def remove(self, checkpoint_id: str, name: str, *, durable: bool = False) -> None:
            await asyncio.sleep(0.2 if durable else 0)
            await super().remove(checkpoint_id, name, durable=durable)

    async def main() -> tuple[list[int], str]:
        state = {"w": torch.ones(1000)}
        async with CheckpointManager(root, keep_last=1, checkpointer=Checkpointer(storage=Slow())) as manager:
            for step in (1, 2):
                ckpt = await manager.save(step, state)
                assert ckpt is not None
                await ckpt
            if rank == 0:
                for file in (root / "step-2").glob("*.distcp"):
                    os.truncate(file, 10)
            try:
                await manager.restore(state, fall_back=True)
                reported = "restored"
            except RankError as error:
                reported = error.failures[0].kind
            return manager.steps(), reported

    return asyncio.run(main())


def test_ranks_know_the_same_while_a_step_is_removed(world: World, tmp_path: Path) -> None:
    assert world.run(2, _ranks_fall_back_during_a_removal, tmp_path) == [([2], "CorruptError")] * 2


# --- what lies beside, and what others wrote


async def test_a_step_is_restored_right_after_it_was_saved(tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path) as manager:
        for step in (1, 2, 3):
            await manager.save(step, {"w": torch.full((1_000_000,), float(step))})
            target = {"w": torch.zeros(1_000_000)}
            assert await manager.restore(target) == step
            assert target["w"][0] == step


async def test_a_restore_returns_the_step_and_what_was_left_out(tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path) as manager:
        assert await manager.restore({"w": torch.zeros(1)}) is None
        await (await manager.save(0, {"w": torch.ones(1), "d": {"a": 1, "b": 2}}))
        step = await manager.restore({"w": torch.zeros(1), "d": {"a": 0}, "new": 1}, strict=False)
        assert step == 0
        assert isinstance(step, int)
        assert step is not None
        assert (step.report.missing, step.report.unexpected) == (["new"], ["d.b"])
        assert pickle.loads(pickle.dumps(step)).report == step.report
        assert repr(step) == "0"
        again = await manager.restore({"w": torch.zeros(1), "d": None})
        assert again is not None
        assert not again.report


def test_the_managers_checkpointer_can_be_called_in_its_with_block(tmp_path: Path) -> None:
    state = {"w": torch.ones(3)}
    with CheckpointManager(tmp_path / "run") as manager:
        manager.checkpointer.prepare_sync(state)
        manager.checkpointer.save_sync(state, tmp_path / "extra", custom_metadata={"a": 1}).uploaded.wait()
        target = {"w": torch.zeros(3)}
        manager.checkpointer.load_sync(target, tmp_path / "extra")
        assert target["w"].all()
        assert manager.checkpointer.read_custom_metadata_sync(tmp_path / "extra") == {"a": 1}
    with pytest.raises(ClosedError):
        manager.checkpointer.load_sync(target, tmp_path / "extra")


async def test_a_misfit_or_a_policy_is_no_reason_to_fall_back(tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path) as manager:
        for step in (1, 2):
            await (await manager.save(step, {"w": torch.ones(2), "v": np.float64(step)}))
        with pytest.warns(UserWarning, match="is not plain data"):
            await (await manager.save(3, {"w": torch.ones(2), "v": _Custom()}))
        for target, error in (
            ({"w": torch.ones(3), "v": 0}, MismatchError),
            ({"w": torch.ones(2), "v": 0}, UnsafeError),
        ):
            with pytest.raises(error):
                await manager.restore(target, fall_back=True)
        assert await manager.restore({"w": torch.ones(2), "v": 0}, 2, fall_back=True) == 2


class _Custom:
    pass


async def test_steps_of_others_are_ordered_by_when_they_were_committed(tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path) as manager:
        await (await manager.save(10, {"w": torch.ones(1)}))
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save({"w": torch.full((1,), 2.0)}, tmp_path / "step-7"))
    async with CheckpointManager(tmp_path) as manager:
        assert manager.latest == 7
        await (await manager.save(8, {"w": torch.ones(1)}))
        assert manager.latest == 8
    os.utime(tmp_path / "step-7" / ".metadata", (2e9, 2e9))  # as a copy does: step 8 knew of it all the same
    async with CheckpointManager(tmp_path) as manager:
        assert manager.latest == 8


async def test_files_beside_a_step_are_that_steps(tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path, keep_last=1) as manager:
        for step in (1, 2):
            await (await manager.save(step, {"w": torch.ones(1)}))
            (tmp_path / f"step-{step}" / "tokenizer").mkdir()
            (tmp_path / f"step-{step}" / "tokenizer" / "t.json").write_text("{}")
        await (await manager.save(2, {"w": torch.ones(1)}))
    assert {each.name for each in tmp_path.glob("step-*")} == {"step-2"}
    assert (tmp_path / "step-2" / "tokenizer" / "t.json").exists()


async def test_small_facts_are_committed_with_a_step(tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path) as manager:
        await (await manager.save(1, {"w": torch.ones(1)}, metrics={"loss": 1.0}, custom_metadata={"commit": "abc"}))
        async with manager.checkpoint(2, custom_metadata={"commit": "def"}) as ckpt:
            ckpt.add("w", torch.ones(1))
        for step, commit in ((1, "abc"), (2, "def")):
            facts = await manager.checkpointer.read_custom_metadata(manager.path(step))
            assert facts["commit"] == commit
            assert facts["step"] == step
        for wrong in ({"step": 3}, {"x": torch.ones(1)}):
            with pytest.raises(ArgumentError, match="custom_metadata"):
                await manager.save(3, {"w": torch.ones(1)}, custom_metadata=wrong)


async def test_a_url_is_no_directory_and_a_tilde_is_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for storage, problem in ((LocalStorage(), r"root: 's3://bucket/run' is a URL.*storage="), (None, "of no scheme")):
        root = "s3://bucket/run" if storage else "hdfs://bucket/run"
        with pytest.raises(ArgumentError, match=problem):
            CheckpointManager(root, checkpointer=Checkpointer(storage=storage))
        async with Checkpointer(storage=storage) as checkpointer:
            for call in (checkpointer.save, checkpointer.load):
                with pytest.raises(ArgumentError, match=problem.rpartition("*")[2]):
                    await call({"w": torch.ones(1)}, root)
    async with CheckpointManager("~/run") as manager:
        await (await manager.save(1, {"w": torch.ones(1)}))
    assert (tmp_path / "home" / "run" / "step-1" / ".metadata").exists()
    assert [each.name for each in tmp_path.iterdir()] == ["home"]
    assert MemoryStorage().resolve("s3://any") == "s3://any"


async def test_a_manager_that_may_skip_says_so_in_its_type(faulty: FaultyStorage) -> None:
    async with _on(faulty) as manager:
        ckpt = await manager.save(1, {"w": torch.ones(1)})
        await ckpt.uploaded  # the type checker knows that it is there
        maybe = await manager.save(2, {"w": torch.ones(1)}, on_busy="skip")
        assert maybe is not None
    skipping = CheckpointManager("other", checkpointer=Checkpointer(storage=faulty), on_busy="skip")
    async with skipping:
        perhaps = await skipping.save(1, {"w": torch.ones(1)})
        assert perhaps is not None
        await perhaps.uploaded


def _ranks_do_not_fit(rank: int, size: int, root: Path) -> tuple[str, list[Event]]:
    reported: list[Event] = []
    with CheckpointManager(root, on_event=reported.append) as manager:
        for step in (1, 2):
            manager.save_sync(step, {"w": torch.ones(2)}).uploaded.wait()
        try:
            manager.restore_sync({"w": torch.ones(2 + rank)}, fall_back=True)
        except RankError as error:
            kind = error.failures[0].kind
    return kind, [each for each in reported if isinstance(each, FellBack)]


def test_what_does_not_fit_on_one_rank_takes_nobody_back(world: World, tmp_path: Path) -> None:
    assert world.run(2, _ranks_do_not_fit, tmp_path) == [("MismatchError", [])] * 2
