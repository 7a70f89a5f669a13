"""The steps below a root: found when complete, removed in an order that leaves no half that looks whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from aiodcp import ArgumentError, Checkpointer, LocalStorage, NotACheckpointError, ReadError
from aiodcp._note import decode_note, encode_note, note_nbytes
from aiodcp._steps import list_steps, read_note, remove_leftovers, remove_step

from .conftest import FaultyStorage, assert_equal, blank, make_state


async def _save(root: Path | str, step: int, storage: object = None, **note: object) -> None:
    async with Checkpointer(storage=storage) as checkpointer:  # type: ignore[arg-type]
        ckpt = await checkpointer.save(make_state(step), f"{root}/step-{step}", custom_metadata=note or None)
        await ckpt


@pytest.mark.parametrize("note", [{}, {"metrics": {"loss": 0.5}}, {"long": "ü" * 100_000}])
async def test_a_note_comes_back_and_nobody_else_sees_it(note: dict[str, object], tmp_path: Path) -> None:
    state = make_state(3)
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, tmp_path / "a", custom_metadata=note)).uploaded
        assert await checkpointer.read_custom_metadata(tmp_path / "a") == note
        target = blank(state)
        await checkpointer.load(target, tmp_path / "a")
        assert_equal(state, target)
    weights = {"model": {"weight": torch.zeros(40, 30)}}
    dcp.load(weights, checkpoint_id=str(tmp_path / "a"))
    assert torch.equal(weights["model"]["weight"], state["model"]["weight"])


async def test_there_is_no_note_where_none_was_made(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(3)}, checkpoint_id=str(tmp_path / "theirs"))
    await _save(tmp_path, 1)
    async with Checkpointer() as checkpointer:
        assert await checkpointer.read_custom_metadata(tmp_path / "theirs") == {}
        assert await checkpointer.read_custom_metadata(tmp_path / "step-1") == {}
        with pytest.raises(NotACheckpointError):
            await checkpointer.read_custom_metadata(tmp_path / "nothing")


async def test_a_note_that_json_cannot_say_is_refused_before_anything_happens(tmp_path: Path) -> None:
    async with Checkpointer() as checkpointer:
        with pytest.raises(ArgumentError, match="custom_metadata"):
            await checkpointer.save(make_state(), tmp_path / "a", custom_metadata={"t": torch.ones(1)})
    assert not (tmp_path / "a").exists()


def test_a_damaged_note_is_none() -> None:
    good = b"pickle." + encode_note({"a": 1})
    assert decode_note(good) == {"a": 1}
    assert decode_note(good[-note_nbytes(good) :]) == {"a": 1}
    for damaged in (good[:-1], good[9:][-20:], good.replace(b'"a"', b'"a '), b"", b"\0aiodcp1"):
        assert decode_note(damaged) == {}
    assert decode_note(b"." + encode_note({})[:0] + json.dumps([1]).encode() + b"\3\0\0\0\0aiodcp1") == {}


async def test_complete_steps_are_listed_in_order_with_their_metrics(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        await _save(tmp_path, step, metrics={"loss": step / 10, "text": "no number"})
    dcp.save({"w": torch.ones(3)}, checkpoint_id=str(tmp_path / "step-7"))
    for name in ("step-4", "step-050", "step-x", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-4" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "step-050" / ".metadata").write_bytes(b"")
    (tmp_path / "step-9").write_text("a file")
    steps = await list_steps(LocalStorage(), str(tmp_path))
    written = {step: (tmp_path / f"step-{step}" / ".metadata").stat().st_mtime for step in (3, 7, 20, 100)}
    assert [(each.step, each.saved_at) for each in steps] == list(written.items())
    assert [each.metrics for each in steps] == [{"loss": 0.3}, {}, {"loss": 2.0}, {"loss": 10.0}]
    assert await list_steps(LocalStorage(), str(tmp_path / "nothing")) == []


async def test_a_storage_that_refuses_is_told_as_one_error(faulty: FaultyStorage) -> None:
    for step in range(3):
        await _save("root", step, faulty)

    def refuse(call: str) -> None:
        if call == "open":
            raise OSError(30, "Read-only file system")

    faulty.gate = refuse
    with pytest.raises(ReadError, match=r"memory:root/step-\d/.metadata: .*Read-only"):
        await list_steps(faulty, "root")


async def test_the_metadata_goes_first_and_the_files_beside_it_with_it(faulty: FaultyStorage, tmp_path: Path) -> None:
    await _save(tmp_path, 1)
    (tmp_path / "step-1" / "tokenizer").mkdir()
    (tmp_path / "step-1" / "tokenizer" / "eval.json").write_text("{}")
    await remove_step(LocalStorage(), str(tmp_path / "step-1"))
    assert not (tmp_path / "step-1").exists()

    await _save("root", 3, faulty)

    def refuse(call: str) -> None:
        if call == "remove_tree":
            raise OSError(30, "Read-only file system")

    faulty.gate = refuse
    with pytest.raises(OSError, match="Read-only"):
        await remove_step(faulty, "root/step-3")
    assert [name.endswith(".distcp") for name in faulty.files["root/step-3"]] == [True]


async def test_leftovers_are_removed_unless_they_are_live_or_whole_or_not_ours(tmp_path: Path) -> None:
    await _save(tmp_path, 1)
    for step, names in {
        2: ["__0_dead.distcp", ".metadata.77.tmp"],
        3: ["__0_live.distcp"],
        4: ["notes.txt", "__0_dead.distcp"],
        5: [],
        6: ["config.json"],
    }.items():
        (tmp_path / f"step-{step}").mkdir()
        for name in names:
            (tmp_path / f"step-{step}" / name).write_bytes(b"x")
    removed = await remove_leftovers(LocalStorage(), str(tmp_path), lambda name: "live" in name)
    assert removed == [2, 4, 5]
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-3", "step-4", "step-6"}
    assert [path.name for path in (tmp_path / "step-4").iterdir()] == ["notes.txt"]
    assert await read_note(LocalStorage(), str(tmp_path / "step-1")) == {}
