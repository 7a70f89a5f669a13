"""The command line reads through a storage, whatever it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import aiodcp
from aiodcp import ArgumentError, Checkpointer, CheckpointManager, MemoryStorage, NotACheckpointError, Storage
from aiodcp._cli import gc, ls
from aiodcp._cli.show import show
from aiodcp.manager.retention import Retention


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Storage:
    """A storage in memory, with two steps and leftovers of a third, that the command line finds at any location."""
    storage = MemoryStorage()
    with CheckpointManager("run", checkpointer=Checkpointer(storage=storage, no_dist=True)) as manager:
        for step in (1, 2):
            state: dict[str, Any] = {"w": torch.full((4,), float(step)), "lr": 0.5 * step}
            manager.save_sync(step, state, metrics={"loss": 1.0 / step}).wait()
    storage.files["run/step-3"]["__0_0_" + "0" * 32 + ".distcp"] = b"left over"
    for module in (ls, gc):
        monkeypatch.setattr(module, "locate_root", lambda root: (storage, root))
    return storage


async def test_show_finds_values_and_prints_the_small_ones(storage: Storage) -> None:
    shown = await show("run/step-2", "lr", storage=storage)
    assert shown["value"] == "1.0"
    rows = {row["fqn"]: row for row in (await show("run/step-2", storage=storage))["values"]}
    assert rows["lr"]["value"] == "1.0"
    assert "value" not in rows["w"]


def test_ls(storage: Storage) -> None:
    rows = ls.list_rows("run")
    assert [(row["step"], row["complete"]) for row in rows] == [(1, True), (2, True), (3, False)]
    assert rows[1]["metrics"] == {"loss": 0.5}
    assert rows[0]["nbytes"] > 16


async def test_a_root_or_nothing_is_no_checkpoint(storage: Storage) -> None:
    with pytest.raises(ArgumentError, match="run/step-2"):
        await show("run", storage=storage)
    with pytest.raises(NotACheckpointError):
        await show("elsewhere", storage=storage)


def test_a_checkpoint_is_no_root(storage: Storage) -> None:
    with pytest.raises(ArgumentError, match="is a checkpoint"):
        ls.list_rows("run/step-1")


async def test_verify_finds_damage(storage: MemoryStorage) -> None:
    assert await aiodcp.verify("run/step-1", storage=storage) == []
    [name] = [name for name in storage.files["run/step-1"] if name != ".metadata"]
    data = bytearray(storage.files["run/step-1"][name])
    data[data.index(b"\0\0\x80\x3f" * 4)] ^= 1
    storage.files["run/step-1"][name] = bytes(data)
    [problem] = await aiodcp.verify("run/step-1", storage=storage)
    assert problem.fqn == "w"


async def test_diff_and_export(storage: Storage, tmp_path: Path) -> None:
    assert [each.fqn for each in await aiodcp.diff("run/step-1", "run/step-2", storage=storage)] == ["lr", "w"]
    await aiodcp.export("run/step-2", tmp_path / "out.pt", format="torch", storage=storage)
    assert torch.load(tmp_path / "out.pt")["lr"] == 1.0


def test_gc(storage: Storage) -> None:
    retention = Retention(keep_last=1)
    expected = {"removed": [1], "leftovers": [3]}
    dry = gc.collect("run", retention, dry_run=True)
    assert {1, 3} == dry.pop("why").keys()
    assert dry == expected
    assert gc.collect("run", retention, dry_run=False) == expected
    assert [row["step"] for row in ls.list_rows("run")] == [2]
