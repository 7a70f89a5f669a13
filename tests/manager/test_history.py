"""What a manager's coordinator keeps of a run."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aiodcp import Checkpointer, CheckpointManager, MemoryStorage, Retry, WriteError
from aiodcp._telemetry.timeline import Span, Timeline
from aiodcp.manager import history
from aiodcp.manager.events import SaveFinished, SaveSkipped
from aiodcp.manager.history import KEPT_EVENTS, KEPT_SPANS, History, read_history

from ..support.ranks import rank_test

PLACE = "root/.aiodcp"
STATE: dict[str, Any] = {"w": torch.zeros(1000)}


def manager_of(storage: Any, **options: Any) -> CheckpointManager:
    return CheckpointManager("root", checkpointer=Checkpointer(storage=storage, retry=Retry(attempts=1)), **options)


async def test_it_says_what_was_saved_and_when_each_phase_was_and_what_failed() -> None:
    class FullAtStep3(MemoryStorage):
        async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
            if checkpoint_id == "root/step-3":
                raise OSError(28, "No space left on device")
            await super().put(checkpoint_id, name, data)

    storage = FullAtStep3()
    async with manager_of(storage, keep_last=1, on_error="warn") as manager:
        for step in (1, 2):
            with manager.checkpointer.step(step):
                await (await manager.save(step, STATE)).uploaded
        with pytest.raises(WriteError):
            await (await manager.save(3, STATE)).uploaded
    events = await read_history(storage, "root")
    assert [(each["event"], each["step"]) for each in events if each["event"] != "Opened"] == [
        ("SaveFinished", 1),
        ("SaveFinished", 2),
        ("StepRemoved", 1),
        ("SaveFailed", 3),
    ]
    first = next(each for each in events if each["event"] == "SaveFinished")
    names = {name for name, _, _ in first["spans"]}
    assert {"step 1", "wait", "capture", "plan", "stage", "checksum", "write", "commit"} <= names
    took = first["at"] - first["began"]
    assert all(0 <= start <= stop <= took for name, start, stop in first["spans"] if not name.startswith("step"))
    assert first["nbytes"] >= 4000
    assert "No space left" in next(each["text"] for each in events if each["event"] == "SaveFailed")


async def test_who_saves_nothing_or_wants_none_writes_none() -> None:
    storage = MemoryStorage()
    async with manager_of(storage, history=False) as manager:
        await manager.save(1, STATE)
    async with manager_of(storage) as manager:
        await manager.restore({"w": torch.ones(1000)})
    assert not storage.files.get(PLACE)
    async with manager_of(storage) as manager:
        await manager.restore({"w": torch.ones(1000)})
        await manager.save(2, STATE)
    assert [each["event"] for each in await read_history(storage, "root")] == ["Opened", "Restored", "SaveFinished"]


async def test_each_time_that_a_manager_is_entered_has_a_file_and_the_last_ones_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(history, "KEPT_FILES", 3)
    storage = MemoryStorage()
    manager = manager_of(storage)
    for step in range(6):
        async with manager:
            await manager.save(step, STATE)
    events = await read_history(storage, "root")
    assert [(each["run"], each["step"]) for each in events if each["event"] == "SaveFinished"] == [
        (0, 3), (1, 4), (2, 5),
    ]  # fmt: skip


async def test_a_history_that_cannot_be_written_costs_no_save(caplog: pytest.LogCaptureFixture) -> None:
    class NoHistory(MemoryStorage):
        async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
            if name.startswith("history-"):
                raise PermissionError(13, "Permission denied")
            await super().put(checkpoint_id, name, data)

    async with manager_of(NoHistory()) as manager:
        await (await manager.save(1, STATE)).uploaded
    assert "the history of saves cannot be kept" in caplog.text
    assert "Permission denied" in caplog.text


async def test_lines_that_are_no_events_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    storage = MemoryStorage()
    lines = ["{", "7", "null", '{"event": "X"}', '{"event": "SaveSkipped", "at": 1.5, "step": 3}', "\x00"]
    await storage.put(PLACE, "history-1.jsonl", "\n".join(lines).encode())
    await storage.put(PLACE, "else.json", b"{}")
    assert await read_history(storage, "root") == [{"event": "SaveSkipped", "at": 1.5, "step": 3, "run": 0}]
    assert caplog.text.count("a line is no event") == 5


async def test_it_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = MemoryStorage()
    kept = History(storage, lambda: "root", lambda began, ended: [])
    kept.begin()
    for step in range(KEPT_EVENTS + 10):
        kept.note(SaveSkipped(step=step, rank=0, checkpoint_id="x"))
    timeline = Timeline()
    timeline._spans += [Span(name="stage", began_s=float(n), ended_s=n + (0.9 if n % 10 else 0.1)) for n in range(1000)]
    kept.note(SaveFinished(step=1, rank=0, checkpoint_id="x", nbytes=1, held_s=0, staged_s=0, seconds=0), 0, [timeline])
    await kept.write()
    await kept.write()
    [data] = storage.files[PLACE].values()
    lines = [json.loads(line) for line in data.splitlines()]
    assert len(lines) == KEPT_EVENTS + 1
    spans = lines[-1]["spans"]
    assert len(spans) == KEPT_SPANS
    assert (spans[0][1], spans[-1][2]) == (0.0, 999.9)
    assert all(before[2] < after[1] for before, after in pairwise(spans))


@rank_test(2)
async def test_the_coordinator_alone_keeps_it(rank: int, size: int, tmp_path: Path) -> None:
    async with CheckpointManager(tmp_path / "run") as manager:
        await (await manager.save(1, STATE)).uploaded
    dist.barrier()  # the coordinator writes it as it leaves
    assert len(list((tmp_path / "run" / ".aiodcp").iterdir())) == 1
