"""Several participants, one commit: each staged when it is ready, all of them or nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from aiodcp import (
    ArgumentError,
    BusyError,
    CaptureError,
    Checkpointer,
    CheckpointManager,
    ClosedError,
    LocalStorage,
    ParticipantError,
    PerRank,
    RankError,
    SaveCancelled,
    SaveError,
    TornSnapshotError,
    WriteError,
    joint_checkpoint,
)
from aiodcp._save.bounded_staging import MIN_NBYTES
from aiodcp._save.pipeline import WritePipeline
from aiodcp._save.saver import Saver
from aiodcp.checkpointer.checkpointer import session_of
from aiodcp.testing import FaultyStorage, Gate

from ..support.ranks import World
from ..support.slow_copy import SlowCopy
from ..support.states import assert_equal, blank, make_state


class Counter:
    """`Stateful`, and callable besides, as modules are."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self) -> None:
        raise AssertionError("a Stateful is not called")

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "history": torch.arange(5)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


async def _replay() -> dict[str, Any]:
    await asyncio.sleep(0)
    return {"rows": torch.arange(1000).view(10, 100), "written": 10}


def _expected(seed: int) -> dict[str, Any]:
    rows = torch.arange(1000).view(10, 100)
    return {
        "trainer": make_state(seed),
        "replay": {"rows": rows, "written": 10},
        "orchestrator": {"count": seed + 3, "history": torch.arange(5)},
        "position": {"epoch": seed, "offset": 77},
        "note": "a plain value",
    }


async def _save(checkpointer: Checkpointer, path: Path | str, seed: int) -> None:
    async with joint_checkpoint(checkpointer, path) as ckpt:
        ckpt.add("trainer", make_state(seed))
        ckpt.add("replay", _replay)
        ckpt.add("orchestrator", Counter(seed + 3))
        ckpt.add("position", lambda: {"epoch": seed, "offset": 77})
        ckpt.add("note", "a plain value")


@pytest.mark.parametrize("options", [{}, {"keep_buffers": False}, {"max_host_bytes": MIN_NBYTES}])
async def test_all_participants_come_back_under_their_names(options: dict[str, Any], tmp_path: Path) -> None:
    async with Checkpointer(**options) as checkpointer:
        for seed in (4, 5):
            await _save(checkpointer, tmp_path, seed)
            target = blank(_expected(seed))
            await checkpointer.load(target, tmp_path)
            assert_equal(_expected(seed), target)
        counter = Counter(0)
        await checkpointer.load({"orchestrator": counter}, tmp_path, strict=False)
        assert counter.count == 8
    theirs = {"replay": {"rows": torch.zeros(10, 100, dtype=torch.int64), "written": 0}}
    dcp.load(theirs, checkpoint_id=str(tmp_path))
    assert_equal({"replay": _expected(5)["replay"]}, theirs)


async def test_a_participant_is_staged_while_another_is_not_ready(faulty: FaultyStorage) -> None:
    ready = asyncio.Event()

    async def slow() -> dict[str, torch.Tensor]:
        await ready.wait()
        return {"w": torch.ones(10)}

    weights = torch.zeros(1000)
    async with Checkpointer(storage=faulty) as checkpointer:
        async with joint_checkpoint(checkpointer, "a") as ckpt:
            replay = ckpt.add("replay", slow)
            trainer = ckpt.add("trainer", {"w": weights})
            await trainer.staged
            weights.fill_(7)  # training goes on
            assert not replay.staged.done()
            assert ".metadata" not in faulty.files["a"]
            ready.set()
        assert trainer.uploaded.done()
        assert replay.uploaded.done()
        target = {"replay": {"w": torch.zeros(10)}, "trainer": {"w": torch.ones(1000)}}
        await checkpointer.load(target, "a")
    assert bool((target["trainer"]["w"] == 0).all())


async def test_plans_and_memory_are_kept_by_name_and_let_go_with_it(faulty: FaultyStorage) -> None:
    async with Checkpointer(storage=faulty) as checkpointer:
        names = [f"p{n}" for n in range(6)]  # more than there are plans kept of one state
        made = []
        saver: Saver = session_of(checkpointer).saves._saver
        for _ in range(3):
            async with joint_checkpoint(checkpointer, "a") as ckpt:
                for name in names:
                    ckpt.add(name, {"w": torch.ones(100)})
            made.append(saver._plans._made)
        assert made == [6, 6, 6]
        assert set(saver._pipelines) == {None, *names}
        async with joint_checkpoint(checkpointer, "a") as ckpt:
            ckpt.add("p1", {"w": torch.ones(100)})
        assert saver._plans._made == 6
        assert set(saver._pipelines) == {None, "p1"}
    assert len(faulty.files["a"]) == 2


async def test_functions_are_called_at_one_instant_when_the_body_is_done() -> None:
    log: list[str] = []
    clock = 0

    async def tick() -> None:
        nonlocal clock
        while True:
            clock += 1
            await asyncio.sleep(0)

    def participant(name: str) -> Any:
        def state() -> dict[str, int]:
            log.append(name)
            return {"clock": clock}

        return state

    async with Checkpointer(storage=FaultyStorage()) as checkpointer:
        ticking = asyncio.ensure_future(tick())
        async with joint_checkpoint(checkpointer, "a") as ckpt:
            for name in ("a", "b", "c"):
                ckpt.add(name, participant(name))
                await asyncio.sleep(0.001)
            assert log == []
            body_done = clock
        ticking.cancel()
        assert log == ["a", "b", "c"]
        target = {name: {"clock": 0} for name in log}
        await checkpointer.load(target, "a")
    assert {each["clock"] for each in target.values()} == {body_done}


async def _fail_body(ckpt: Any) -> None:
    raise RuntimeError("a body that fails")


async def _fail_async(ckpt: Any) -> None:
    async def fails() -> None:
        await asyncio.sleep(0)
        raise RuntimeError("no replay")

    ckpt.add("replay", fails)
    await asyncio.sleep(30)  # ended by the participant's failure


async def _fail_sync(ckpt: Any) -> None:
    def fails() -> None:
        raise RuntimeError("no replay")

    ckpt.add("replay", fails)


async def _fail_cancelled(ckpt: Any) -> None:
    async def cancelled() -> None:
        raise asyncio.CancelledError

    ckpt.add("replay", cancelled)
    await asyncio.sleep(30)


async def _fail_capture(ckpt: Any) -> None:
    ckpt.add("replay", {"lock": threading.Lock()})


async def _fail_capture_later(ckpt: Any) -> None:
    async def unpicklable() -> dict[str, Any]:
        return {"lock": threading.Lock()}

    ckpt.add("replay", unpicklable)


async def _fail_by_name(ckpt: Any) -> None:
    ckpt.add("trainer", {})


async def _cancel_part(ckpt: Any) -> None:
    ckpt.participants["trainer"].cancel()
    await asyncio.sleep(30)


async def _cancel_all(ckpt: Any) -> None:
    ckpt.cancel()
    await asyncio.sleep(30)


async def _same_name(ckpt: Any) -> None:
    ckpt.add("trainer.model", {"bias": 1})


FAILURES: list[tuple[Any, type[Exception], str]] = [
    (_fail_body, RuntimeError, "a body that fails"),
    (_fail_async, ParticipantError, "participant 'replay' raised RuntimeError"),
    (_fail_sync, ParticipantError, "participant 'replay' raised RuntimeError"),
    (_fail_cancelled, ParticipantError, "participant 'replay' was cancelled"),
    (_fail_capture, CaptureError, r"replay\.lock: .*cannot be pickled"),
    (_fail_capture_later, CaptureError, r"replay\.lock: .*cannot be pickled"),
    (_fail_by_name, ArgumentError, "'trainer' already exists"),
    (_cancel_part, SaveCancelled, "cancelled"),
    (_cancel_all, SaveCancelled, "cancelled"),
    (_same_name, CaptureError, r"trainer\.model\.bias: two participants have a value of this name"),
]


@pytest.mark.parametrize(("fail", "kind", "text"), FAILURES, ids=[each[0].__name__ for each in FAILURES])
async def test_a_participant_that_fails_leaves_nothing_and_one_error(
    fail: Any, kind: type[Exception], text: str, faulty: FaultyStorage
) -> None:
    state = {"model": {"weight": torch.ones(100), "bias": torch.zeros(3)}}
    async with Checkpointer(storage=faulty) as checkpointer:
        await _save(checkpointer, "a", 1)
        before = dict(faulty.files["a"])
        for place in ("a", "fresh"):
            with pytest.raises(kind, match=text):
                async with joint_checkpoint(checkpointer, place) as ckpt:
                    part = ckpt.add("trainer", state)
                    await part.staged
                    await fail(ckpt)
            assert part.uploaded.exception() is not None
            assert faulty.open_files == 0
        assert faulty.files["a"] == before
        assert not faulty.files.get("fresh")
        await _save(checkpointer, "a", 2)
        await (await checkpointer.save(state, "b")).uploaded


@pytest.mark.parametrize("call", ["create", "write", "sync", "put"])
async def test_a_storage_that_fails_ends_the_participants_too(call: str, faulty: FaultyStorage) -> None:
    ended: list[str] = []

    async def slow() -> None:
        try:
            await asyncio.sleep(0.001 if call == "put" else 30)
        finally:
            ended.append("slow")

    def refuse(name: str) -> None:
        if name == call:
            raise OSError(28, "No space left on device")

    faulty.gate = refuse
    async with Checkpointer(storage=faulty) as checkpointer:
        with pytest.raises(WriteError, match="No space left"):
            async with joint_checkpoint(checkpointer, "a") as ckpt:
                ckpt.add("slow", slow)
                ckpt.add("trainer", make_state())
                if call != "put":
                    await asyncio.sleep(30)
        assert ended == ["slow"]
        assert not faulty.files.get("a")


async def test_cancelling_the_task_gives_the_checkpoint_up_unless_it_commits(faulty: FaultyStorage) -> None:
    async with Checkpointer(storage=faulty) as checkpointer:

        async def save(place: str) -> None:
            async with joint_checkpoint(checkpointer, place) as ckpt:
                ckpt.add("a", make_state())

        for call, there in (("create", False), ("sync", False), ("put", True)):
            gate = Gate(call)
            faulty.gate = gate
            task = asyncio.ensure_future(save(call))
            await gate.wait_reached()
            task.cancel()
            if there:
                gate.open()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (".metadata" in faulty.files.get(call, {})) is there
            assert bool(faulty.files.get(call)) is there


async def test_a_change_before_a_participant_is_staged_tears_the_whole(
    faulty: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = SlowCopy(monkeypatch)
    weights = torch.zeros(100)
    async with Checkpointer(storage=faulty) as checkpointer:
        with pytest.raises(TornSnapshotError, match=r"trainer\.w"):
            async with joint_checkpoint(checkpointer, "a") as ckpt:
                ckpt.add("trainer", {"w": weights})
                assert await asyncio.to_thread(slow.reached.wait, 30)
                weights.add_(1)
                slow.let_go.set()
                await asyncio.Event().wait()  # until the save has failed
        assert not faulty.files.get("a")


async def test_a_guarded_optimizer_waits_for_the_participants_that_are_captured(faulty: FaultyStorage) -> None:
    weight = torch.nn.Parameter(torch.zeros(1000))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    never = asyncio.Event()

    async def slow() -> int:
        await never.wait()
        return 1

    async with Checkpointer(storage=faulty) as checkpointer:
        checkpointer.guard(optimizer)
        async with joint_checkpoint(checkpointer, "a") as ckpt:
            ckpt.add("slow", slow)
            trainer = ckpt.add("trainer", {"w": weight})
            weight.grad = torch.ones(1000)
            await asyncio.to_thread(optimizer.step)
            assert trainer.staged.done()
            never.set()
        target = {"slow": 0, "trainer": {"w": torch.ones(1000)}}
        await checkpointer.load(target, "a")
    assert isinstance(target["trainer"], dict)
    assert bool((target["trainer"]["w"] == 0).all())


async def test_it_has_its_turn_among_saves(faulty: FaultyStorage) -> None:
    gate = Gate("put")
    faulty.gate = gate
    log: list[str] = []
    async with Checkpointer(storage=faulty) as checkpointer:

        async def save() -> None:
            async with joint_checkpoint(checkpointer, "joint") as ckpt:
                log.append("begun")
                ckpt.add("a", make_state())
                assert await checkpointer.save(make_state(), "other", on_busy="skip") is None
                with pytest.raises(BusyError, match="joint"):
                    await checkpointer.save(make_state(), "other", on_busy="raise")

        first = await checkpointer.save(make_state(), "first")
        task = asyncio.ensure_future(save())
        await gate.wait_reached()
        assert log == []
        gate.open()
        await first
        await task
        assert log == ["begun"]


async def test_nobody_can_be_added_when_the_block_is_left_and_a_checkpoint_of_nobody_is_none(
    faulty: FaultyStorage,
) -> None:
    async with Checkpointer(storage=faulty) as checkpointer:
        async with joint_checkpoint(checkpointer, "a") as ckpt:
            ckpt.add("a", make_state())
            for name in ("", 3):
                with pytest.raises(ArgumentError, match="name"):
                    ckpt.add(name, {})  # type: ignore[arg-type]
        with pytest.raises(ClosedError):
            ckpt.add("b", {})
        with pytest.raises(CaptureError, match="no participant"):
            async with joint_checkpoint(checkpointer, "b"):
                pass
        assert not faulty.files.get("b")
    with pytest.raises(ClosedError):
        async with joint_checkpoint(checkpointer, "a"):
            pass


async def test_leaving_the_checkpointer_waits_for_a_joint_checkpoint(faulty: FaultyStorage) -> None:
    async with Checkpointer(storage=faulty) as checkpointer:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def save() -> None:
            async with joint_checkpoint(checkpointer, "a") as ckpt:
                ckpt.add("a", make_state())
                begun.set()
                await go_on.wait()

        task = asyncio.ensure_future(save())
        await begun.wait()
        asyncio.get_running_loop().call_later(0.02, go_on.set)
    await task
    assert ".metadata" in faulty.files["a"]


async def test_a_manager_keeps_steps_of_several_participants(tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path, keep_last=2, keep_best=("loss", "min")) as manager:
        for step in range(1, 5):
            async with manager.checkpoint(step, metrics={"loss": float(step)}) as ckpt:
                ckpt.add("trainer", make_state(step))
                ckpt.add("replay", _replay)
            assert manager.latest == step
        with pytest.raises(ParticipantError):
            async with manager.checkpoint(5) as ckpt:
                ckpt.add("trainer", make_state(5))
                await _fail_async(ckpt)
        assert manager.steps() == [1, 3, 4]
        assert manager.stats.saved == 4
        assert manager.stats.failed == 1
        target = {"trainer": blank(make_state()), "replay": blank(await _replay())}
        assert await manager.restore(target) == 4
        assert_equal({"trainer": make_state(4), "replay": await _replay()}, target)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-1", "step-3", "step-4"]


def _ranks_save_together(rank: int, size: int, folder: Path) -> list[str]:
    async def main() -> list[str]:
        reported: list[str] = []
        async with Checkpointer() as checkpointer:
            for number in range(3):
                async with joint_checkpoint(checkpointer, folder / str(number)) as ckpt:
                    ckpt.add("trainer", {"w": torch.full((1000,), float(number)), "step": number})
                    ckpt.add("replay", _replay)
            target: dict[str, Any] = {
                "trainer": {"w": torch.zeros(1000), "step": -1},
                "replay": {"rows": torch.zeros(10, 100, dtype=torch.int64), "written": 0},
            }
            await checkpointer.load(target, folder / "2")
            assert bool((target["trainer"]["w"] == 2).all())
            assert target["trainer"]["step"] == 2
            assert_equal(await _replay(), target["replay"])
            assert session_of(checkpointer).saves._saver._plans._made == 2

            async def fails() -> dict[str, Any]:
                if rank == 1:
                    raise RuntimeError("no replay here")
                return await _replay()

            def other_names(ckpt: Any) -> None:
                ckpt.add("mine" if rank else "yours", {"w": torch.ones(3)})

            def body_fails(ckpt: Any) -> None:
                if rank == 1:
                    raise KeyError("here")

            def replay_fails(ckpt: Any) -> None:
                ckpt.add("replay", fails)

            for spoil in (replay_fails, other_names, body_fails):
                try:
                    async with joint_checkpoint(checkpointer, folder / "spoilt") as ckpt:
                        ckpt.add("trainer", {"w": torch.ones(1000)})
                        spoil(ckpt)
                except (RankError, ParticipantError, KeyError) as error:
                    reported.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
                async with joint_checkpoint(checkpointer, folder / "after") as ckpt:
                    ckpt.add("trainer", {"w": torch.ones(1000)})
        return reported

    return asyncio.run(main())


def test_ranks_save_several_participants_and_fail_together(world: World, tmp_path: Path) -> None:
    zero, one = world.run(2, _ranks_save_together, tmp_path)
    assert not (tmp_path / "spoilt").exists()
    assert "no replay here" in zero[0]
    assert "RankError" in zero[0]
    assert "ParticipantError" in one[0]
    assert "all ranks must add the same" in zero[1]
    assert "all ranks must add the same" in one[1]
    assert zero[2].startswith("RankError")
    assert one[2].startswith("KeyError")


async def test_a_participant_that_cannot_be_captured_fails_the_whole_also_if_the_body_goes_on(
    faulty: FaultyStorage,
) -> None:
    async with Checkpointer(storage=faulty) as checkpointer:
        with pytest.raises(CaptureError, match=r"replay\.lock"):
            async with joint_checkpoint(checkpointer, "a") as ckpt:
                ckpt.add("trainer", make_state())
                with contextlib.suppress(CaptureError):
                    ckpt.add("replay", {"lock": threading.Lock()})
                await asyncio.sleep(30)
        assert not faulty.files.get("a")


async def test_with_bounded_memory_participants_go_through_it_as_they_are_ready(faulty: FaultyStorage) -> None:
    weight = torch.nn.Parameter(torch.zeros(1 << 19))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    ready = asyncio.Event()

    async def slow() -> int:
        await ready.wait()
        return 1

    async with Checkpointer(storage=faulty, max_host_bytes=MIN_NBYTES) as checkpointer:
        checkpointer.guard(optimizer)
        async with joint_checkpoint(checkpointer, "a") as ckpt:
            ckpt.add("slow", slow)
            trainer = ckpt.add("trainer", {"w": weight})
            weight.grad = torch.ones(1 << 19)
            await asyncio.wait_for(asyncio.to_thread(optimizer.step), 30)
            assert trainer.staged.done()
            ready.set()


async def test_uploaded_cannot_be_awaited_inside_the_block(faulty: FaultyStorage) -> None:
    async with Checkpointer(storage=faulty) as checkpointer:
        with pytest.raises(ClosedError, match="the joint checkpoint's block"):
            async with joint_checkpoint(checkpointer, "a") as ckpt:
                await ckpt.add("trainer", make_state()).uploaded
        assert not faulty.files.get("a")


async def test_a_failed_participant_leaves_no_noise_in_the_event_loop(faulty: FaultyStorage) -> None:
    noise: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: noise.append(context))
    async with CheckpointManager("root", checkpointer=Checkpointer(storage=faulty)) as manager:
        for fail in (_fail_async, _fail_sync):
            with pytest.raises(ParticipantError):
                async with manager.checkpoint(1) as ckpt:
                    ckpt.add("trainer", make_state())
                    await fail(ckpt)
    gc.collect()
    await asyncio.sleep(0)
    assert noise == []


async def test_a_group_that_the_body_raises_keeps_all_its_errors(faulty: FaultyStorage) -> None:
    async with Checkpointer(storage=faulty) as checkpointer:
        with pytest.raises(ExceptionGroup) as caught:
            async with joint_checkpoint(checkpointer, "a") as ckpt:
                ckpt.add("trainer", make_state())
                raise ExceptionGroup("two", [KeyError("first"), ValueError("second")])
    assert [type(each) for each in caught.value.exceptions] == [KeyError, ValueError]


async def test_a_joint_checkpoint_that_is_cancelled_too_late_counts(faulty: FaultyStorage) -> None:
    gate = Gate("put")
    checkpointer = Checkpointer(storage=faulty)
    async with CheckpointManager("root", checkpointer=checkpointer, keep_last=1, history=False) as manager:
        async with manager.checkpoint(1) as ckpt:
            ckpt.add("a", make_state())

        async def save() -> None:
            async with manager.checkpoint(2) as ckpt:
                ckpt.add("a", make_state())

        faulty.gate = gate
        task = asyncio.ensure_future(save())
        await gate.wait_reached()
        task.cancel()
        gate.open()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert manager.steps() == [2]
        assert manager.stats.saved == 2
    assert {place for place, files in faulty.files.items() if files} == {"root/step-2"}


def _ranks_after_an_earlier_failure(rank: int, size: int, folder: Path) -> list[str]:
    class Bad(LocalStorage):
        bad = True

        async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
            if self.bad:
                raise PermissionError("no")
            await super().put(checkpoint_id, name, data)

    async def main() -> list[str]:
        reported: list[str] = []
        storage = Bad()
        async with Checkpointer(storage=storage) as checkpointer:
            ckpt = await checkpointer.save({"w": torch.ones(3)}, folder / "first")
            if rank == 0:
                with contextlib.suppress(RankError):
                    await ckpt
            else:
                await ckpt._state.uploaded.settled()
            storage.bad = False
            for number in range(3):
                try:
                    async with joint_checkpoint(checkpointer, folder / "latest") as joint:
                        joint.add("a", {"w": PerRank(torch.full((3,), float(number)))})
                    reported.append("committed")
                except RankError as error:
                    reported.append(f"failed: {error.failures[0].kind}")
            target = {"a": {"w": PerRank(torch.zeros(3))}}
            await checkpointer.load(target, folder / "latest")
            reported.append(str(target["a"]["w"].value.tolist()))
        return reported

    return asyncio.run(main())


def test_a_rank_with_an_earlier_failure_fails_the_joint_checkpoint_of_all(world: World, tmp_path: Path) -> None:
    zero, one = world.run(2, _ranks_after_an_earlier_failure, tmp_path)
    assert zero[0] == "failed: EarlierFailureError"
    assert one[0] == "failed: WriteError"  # the failure itself, of which it had not heard
    assert zero[1:] == one[1:] == ["committed", "committed", "[2.0, 2.0, 2.0]"]


def _ranks_guard_in_order(rank: int, size: int, folder: Path) -> str:
    async def main() -> str:
        weight = torch.nn.Parameter(torch.zeros(1000))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        ready = asyncio.Event()

        async def slow() -> int:
            await ready.wait()
            return 1

        async with Checkpointer() as checkpointer:
            checkpointer.guard(optimizer)
            async with joint_checkpoint(checkpointer, folder) as ckpt:
                ckpt.add("slow", slow)
                ckpt.add("trainer", {"w": weight})
                weight.grad = torch.ones(1000)
                try:
                    optimizer.step()  # on the event loop that "slow" needs
                except SaveError as error:
                    reported = str(error)
                ready.set()
        return reported

    return asyncio.run(main())


def test_a_step_that_would_wait_for_ever_is_an_error(world: World, tmp_path: Path) -> None:
    for reported in world.run(2, _ranks_guard_in_order, tmp_path):
        assert "waits for participant 'slow'" in reported


async def test_participants_larger_than_the_budget_share_its_memory_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {name: {"w": torch.randn(1 << 20)} for name in ("a", "b", "c")}
    running: list[int] = []
    most: list[int] = []
    run = WritePipeline.run

    async def counted(*args: Any, **options: Any) -> tuple[int, int]:
        running.append(1)
        most.append(len(running))
        result = await run(*args, **options)
        running.pop()
        return result

    monkeypatch.setattr(WritePipeline, "run", counted)
    async with Checkpointer(max_host_bytes=MIN_NBYTES) as checkpointer:
        for _ in range(2):
            async with joint_checkpoint(checkpointer, tmp_path) as ckpt:
                for name, each in state.items():
                    ckpt.add(name, each)
            target = blank(state)
            await checkpointer.load(target, tmp_path)
            assert_equal(state, target)
    assert most == [1] * 6
