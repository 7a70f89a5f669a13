"""When to save, what steps are called, which is the latest, and what goes."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import aiodcp
from aiodcp import (
    ArgumentError,
    BusyError,
    Checkpointer,
    CheckpointManager,
    InitialLoad,
    MemoryStorage,
    NotACheckpointError,
    Step,
    WriteError,
)
from aiodcp.manager import pacing
from aiodcp.manager.retention import Retention
from aiodcp.manager.step_names import StepNames, find_names
from aiodcp.testing import FaultyStorage

from ..support.ranks import rank_test


def manager_of(storage: MemoryStorage, **options: Any) -> CheckpointManager:
    return CheckpointManager("run", checkpointer=Checkpointer(storage=storage, no_dist=True), **options)


async def save(manager: CheckpointManager, *steps: int, **options: Any) -> None:
    for step in steps:
        await (await manager.save(step, {"w": torch.full((2,), float(step))}, **options)).uploaded


# --- names


@pytest.mark.parametrize(
    ("step_format", "name"),
    [("step-{step}", "step-12"), ("checkpoint-{step}", "checkpoint-12"), ("iter_{step:07d}", "iter_0000012")],
)
async def test_steps_are_called_as_the_format_says(step_format: str, name: str) -> None:
    storage = MemoryStorage()
    async with manager_of(storage, step_format=step_format, keep_last=2) as manager:
        await save(manager, 3, 7, 12)
        assert manager.path(12) == f"run/{name}"
    assert storage.files.keys() - {"run/.aiodcp"} == {manager.path(7), manager.path(12)}
    async with manager_of(storage, step_format=step_format) as manager:
        state = {"w": torch.zeros(2)}
        assert await manager.restore(state) == 12
        assert state["w"].tolist() == [12, 12]
        async for step in aiodcp.watch("run", storage=storage, step_format=step_format):
            assert step.path == manager.path(step)
            if step == 12:
                break


def test_formats_are_names_with_one_number() -> None:
    names = StepNames("iter_{step:07d}")
    assert names.step_of("iter_0000012") == 12
    assert names.step_of("iter_12345678") == 12345678
    assert names.step_of("iter_12") is names.step_of("iter_00000012") is names.step_of("other") is None
    assert StepNames().step_of("step-012") is None
    assert find_names(["checkpoint-3", "checkpoint-4", "step-1", "x"]).format == "checkpoint-{step}"
    assert find_names(["iter_0000003"]).format == "iter_{step:07d}"
    assert find_names([]).format == "step-{step}"
    others: list[Any] = [
        "step", "{step}/{step}", "a/{step}", "{other}", "{step!r}", "{step:>5}", ".{step}", "1{step}", "{", 3
    ]  # fmt: skip
    for bad in others:
        with pytest.raises(ArgumentError) as caught:
            CheckpointManager("run", step_format=bad)
        assert caught.value.argument == "step_format"


# --- when


def test_the_first_the_last_and_every_so_many_th() -> None:
    with manager_of(MemoryStorage(), save_interval=4, save_first=True, last_step=10) as manager:  # type: ignore[call-arg, unused-ignore]
        assert [step for step in range(11) if manager.should_save(step)] == [1, 4, 8, 10]


def test_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(pacing, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with manager_of(MemoryStorage(), save_every_s=60) as manager:
        assert not manager.should_save(1)
        now[0] += 59
        assert not manager.should_save(2)
        now[0] += 1
        assert manager.should_save(3)
        assert manager.should_save(4)  # it was not saved
        manager.save_sync(4, {"w": torch.ones(1)}).wait()
        assert not manager.should_save(5)
        now[0] += 60
        assert manager.should_save(6)
    assert not manager.should_save(7)


@rank_test(3)
async def test_by_the_clock_all_ranks_save_the_same_step(rank: int, size: int, tmp_path: Path) -> None:
    saved: list[int] = []
    async with CheckpointManager(tmp_path, save_every_s=0.2) as manager:
        deadline = time.monotonic() + 40
        step = 0
        while len(saved) < 3:
            step += 1
            assert time.monotonic() < deadline
            torch.distributed.barrier()  # as ranks that train in step
            if manager.should_save(step):
                saved.append(step)
                await (await manager.save(step, {"n": step})).uploaded
    everyones: list[Any] = [None] * size
    torch.distributed.all_gather_object(everyones, saved)
    assert everyones[0] == everyones[1] == everyones[2]
    assert manager.steps() == saved


def test_what_cannot_be_meant_is_refused() -> None:
    options: dict[str, Any]
    for options in (
        {"save_every_s": 0},
        {"save_every_s": float("inf")},
        {"save_every_s": True},
        {"last_step": -1},
        {"latest_by": "age"},
        {"keep_for_s": -1},
        {"keep_last": 1, "keep_every_s": 0},
        {"keep_last": 1, "keep_if": 3},
        {"keep_if": lambda step: True},
        {"keep_every_s": 3},
    ):
        with pytest.raises(ArgumentError) as caught:
            CheckpointManager("run", **options)
        assert caught.value.argument == list(options)[-1]


# --- what is kept


def steps_at(*saved_at: float) -> list[Step]:
    return [Step(step=number + 1, commit_number=number + 1, saved_at=at) for number, at in enumerate(saved_at)]


def test_what_is_recent_and_one_an_interval() -> None:
    steps = steps_at(0, 50, 100, 150, 200, 250)
    assert Retention(keep_for_s=100).to_remove(steps, now=260) == [1, 2, 3, 4]
    assert Retention(keep_for_s=1).to_remove(steps, now=999) == [1, 2, 3, 4, 5]  # never the last
    assert Retention(keep_last=1, keep_every_s=100).to_remove(steps, now=260) == [2, 4]
    assert Retention(keep_last=2, keep_for_s=120).to_remove(steps, now=260) == [1, 2, 3]
    assert Retention(keep_last=1, keep_if=lambda step: step.step % 2 == 0).to_remove(steps) == [1, 3, 5]
    assert Retention(keep_last=1).to_remove(steps, latest=2) == [1, 3, 4, 5]


def test_a_predicate_that_raises_keeps_the_step(caplog: pytest.LogCaptureFixture) -> None:
    assert Retention(keep_last=1, keep_if=lambda step: 1 / 0 > 1).to_remove(steps_at(1, 2)) == []
    assert Retention(keep_last=1, keep_if=lambda step: sys.exit(2)).to_remove(steps_at(1, 2)) == []
    assert "keep_if raised for step 1" in caplog.text


async def test_a_predicate_sees_the_metrics() -> None:
    async with manager_of(
        MemoryStorage(), keep_last=1, keep_if=lambda step: step.metrics.get("loss", 9) < 1
    ) as manager:
        for step, loss in ((1, 0.5), (2, 3.0), (3, 0.1), (4, 5.0)):
            await save(manager, step, metrics={"loss": loss})
        assert manager.steps() == [1, 3, 4]


# --- which is the latest


async def test_the_latest_by_number_after_going_back() -> None:
    storage = MemoryStorage()
    async with manager_of(storage) as manager:
        await save(manager, 1, 5, 3)
        assert manager.latest == 3
    async with manager_of(storage, latest_by="number", keep_last=1) as manager:
        assert manager.latest == 5
        assert await manager.restore({"w": torch.zeros(2)}) == 5
        await save(manager, 2)
        assert manager.steps() == [2, 5]  # the one just saved, and the latest


# --- what goes


async def test_delete_removes_a_step_whatever_is_to_be_kept() -> None:
    storage = FaultyStorage()
    async with manager_of(storage) as manager:
        await save(manager, 1, 2, 3)
        await manager.delete(2)
        await manager.delete(3)
        assert manager.steps() == [1]
        assert manager.latest == 1
        assert "run/step-2" not in storage.files or not storage.files["run/step-2"]
        for step in (2, 9):
            with pytest.raises(NotACheckpointError):
                await manager.delete(step)
        with pytest.raises(ArgumentError):
            await manager.delete(-1)
        async with aiodcp.lease(manager.path(1), storage=storage):
            with pytest.raises(WriteError, match="lease"):
                await manager.delete(1)
        held = asyncio.Event()
        storage.gate = lambda call: held.wait() if call == "write" else None
        saving = await manager.save(4, {"w": torch.ones(2)})
        with pytest.raises(BusyError):
            await manager.delete(4)
        saving.cancel()
        storage.gate = lambda call: None
        with pytest.raises(aiodcp.SaveCancelled):
            await saving.uploaded
        await manager.delete(1)
        assert manager.steps() == []


@rank_test(2)
async def test_ranks_delete_together(rank: int, size: int, tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path) as manager:
        await save(manager, 1, 2)
        await manager.delete(1)
        assert manager.steps() == [2]
        with pytest.raises(NotACheckpointError):
            await manager.delete(1)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-2"]


# --- what is there already, and what is not there yet


async def test_overwrite_false_replaces_nothing(tmp_path: Path) -> None:
    async with Checkpointer(no_dist=True) as checkpointer:
        await (await checkpointer.save({"n": 1}, tmp_path / "a", overwrite=False)).uploaded
        before = sorted(path.name for path in (tmp_path / "a").iterdir())
        ckpt = await checkpointer.save({"n": 2}, tmp_path / "a", overwrite=False)
        with pytest.raises(WriteError, match="overwrite=False"):
            await ckpt.uploaded
        assert sorted(path.name for path in (tmp_path / "a").iterdir()) == before
        state = {"n": 0}
        await checkpointer.load(state, tmp_path / "a")
        assert state == {"n": 1}
        await (await checkpointer.save({"n": 3}, tmp_path / "a")).uploaded
    async with CheckpointManager(tmp_path / "run") as manager:
        await save(manager, 1)
        with pytest.raises(WriteError, match="overwrite=False"):
            await save(manager, 1, overwrite=False)
        assert manager.steps() == [1]


@rank_test(2)
async def test_overwrite_false_on_ranks(rank: int, size: int, tmp_path: Path) -> None:
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save({"n": 1}, tmp_path, overwrite=False)).uploaded
        ckpt = await checkpointer.save({"n": 2}, tmp_path, overwrite=False)
        with pytest.raises(aiodcp.RankError, match="overwrite=False"):
            await ckpt.uploaded


async def test_a_run_begins_with_the_model_of_another(tmp_path: Path) -> None:
    base = nn.Linear(2, 3)
    async with Checkpointer(no_dist=True) as checkpointer:
        await (await checkpointer.save({"model": base, "step": 900}, tmp_path / "base")).uploaded
    model = nn.Linear(2, 3)
    state = {"model": model, "step": 0}
    async with CheckpointManager(tmp_path / "run") as manager:
        assert await manager.restore(state) is None
        assert not torch.equal(model.weight, base.weight)
        assert await manager.restore(state, initial=InitialLoad(checkpoint_id=tmp_path / "base")) is None
        assert torch.equal(model.weight, base.weight)
        assert state["step"] == 0
        await (await manager.save(1, {"model": nn.Linear(2, 3), "step": 1})).uploaded
        assert await manager.restore(state, initial=InitialLoad(checkpoint_id=tmp_path / "base")) == 1
        assert not torch.equal(model.weight, base.weight)
        assert await manager.restore(state, exclude="model") == 1
