"""The command line reads through a storage, whatever it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from aiodcp import ArgumentError, Checkpointer, CheckpointManager, MemoryStorage, NotACheckpointError, Storage
from aiodcp._cli import diff, export, gc, ls, show, verify
from aiodcp._cli import reading as reading_module
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
    for module in (show, verify, reading_module):
        monkeypatch.setattr(module, "locate", lambda location: (storage, location))
    for module in (ls, gc):
        monkeypatch.setattr(module, "locate_root", lambda root: (storage, root))
    return storage


def nothing(nbytes: int) -> None:
    return


def test_ls_and_show(storage: Storage) -> None:
    rows = ls.list_rows("run")
    assert [(row["step"], row["complete"]) for row in rows] == [(1, True), (2, True), (3, False)]
    assert rows[1]["metrics"] == {"loss": 0.5}
    assert rows[0]["nbytes"] > 16
    shown = show.show("run/step-2", "lr")
    assert shown["value"] == "1.0"


def test_a_root_or_nothing_is_no_checkpoint(storage: Storage) -> None:
    with pytest.raises(ArgumentError, match="run/step-2"):
        show.show("run")
    with pytest.raises(NotACheckpointError):
        show.show("elsewhere")
    with pytest.raises(ArgumentError, match="is a checkpoint"):
        ls.list_rows("run/step-1")


def test_verify_finds_damage(storage: MemoryStorage) -> None:
    assert verify.verify("run/step-1", nothing, nothing) == []
    [name] = [name for name in storage.files["run/step-1"] if name != ".metadata"]
    data = bytearray(storage.files["run/step-1"][name])
    data[data.index(b"\0\0\x80\x3f" * 4)] ^= 1
    storage.files["run/step-1"][name] = bytes(data)
    [problem] = verify.verify("run/step-1", nothing, nothing)
    assert problem.fqn == "w"


def test_diff_and_export(storage: Storage, tmp_path: Any) -> None:
    assert [each.fqn for each in diff.diff("run/step-1", "run/step-2", nothing, nothing)] == ["lr", "w"]
    export.export_torch("run/step-2", str(tmp_path / "out.pt"))
    assert torch.load(tmp_path / "out.pt")["lr"] == 1.0


def test_gc(storage: Storage) -> None:
    retention = Retention(keep_last=1)
    expected = {"removed": [1], "leftovers": [3]}
    dry = gc.collect("run", retention, dry_run=True)
    assert {1, 3} == dry.pop("why").keys()
    assert dry == expected
    assert gc.collect("run", retention, dry_run=False) == expected
    assert [row["step"] for row in ls.list_rows("run")] == [2]
