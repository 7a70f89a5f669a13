"""The steps below a root: found when complete, removed in an order that leaves no half that looks whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from aiodcp import ArgumentError, Checkpointer, LocalStorage, NotACheckpointError
from aiodcp._format.custom_metadata import decode_custom_metadata, encode_custom_metadata
from aiodcp._format.seal import CLAIM, OLD_MARK, SealError, open_seal, read_seal, seal, seal_nbytes
from aiodcp._load.read_custom_metadata import read_custom_metadata
from aiodcp.manager.steps import list_steps, remove_leftovers, remove_step
from aiodcp.testing import FaultyStorage

from ..support.states import assert_equal, blank, make_state


async def _save(root: Path | str, step: int, storage: object = None, **custom_metadata: object) -> None:
    async with Checkpointer(storage=storage) as checkpointer:  # type: ignore[arg-type]
        ckpt = await checkpointer.save(make_state(step), f"{root}/step-{step}", custom_metadata=custom_metadata or None)
        await ckpt


@pytest.mark.parametrize("custom_metadata", [{}, {"metrics": {"loss": 0.5}}, {"long": "ü" * 100_000}])
async def test_custom_metadata_comes_back_and_dcp_does_not_see_it(
    custom_metadata: dict[str, object], tmp_path: Path
) -> None:
    state = make_state(3)
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, tmp_path / "a", custom_metadata=custom_metadata)).uploaded
        assert await checkpointer.read_custom_metadata(tmp_path / "a") == custom_metadata
        target = blank(state)
        await checkpointer.load(target, tmp_path / "a")
        assert_equal(state, target)
    weights = {"model": {"weight": torch.zeros(40, 30)}}
    dcp.load(weights, checkpoint_id=str(tmp_path / "a"))
    assert torch.equal(weights["model"]["weight"], state["model"]["weight"])


async def test_there_is_no_custom_metadata_where_none_was_given(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(3)}, checkpoint_id=str(tmp_path / "theirs"))
    await _save(tmp_path, 1)
    async with Checkpointer() as checkpointer:
        assert await checkpointer.read_custom_metadata(tmp_path / "theirs") == {}
        assert await checkpointer.read_custom_metadata(tmp_path / "step-1") == {}
        with pytest.raises(NotACheckpointError):
            await checkpointer.read_custom_metadata(tmp_path / "nothing")


async def test_custom_metadata_that_json_cannot_say_is_refused_before_anything_happens(tmp_path: Path) -> None:
    async with Checkpointer() as checkpointer:
        with pytest.raises(ArgumentError, match="custom_metadata"):
            await checkpointer.save(make_state(), tmp_path / "a", custom_metadata={"t": torch.ones(1)})
    assert not (tmp_path / "a").exists()


def test_a_seal_of_before_the_checksums_is_read() -> None:
    custom_metadata = json.dumps({"a": 1}).encode()
    pickled, found = open_seal(b"pickle." + custom_metadata + len(custom_metadata).to_bytes(4, "little") + OLD_MARK)
    assert bytes(pickled) == b"pickle."
    assert decode_custom_metadata(found.custom_metadata) == {"a": 1}
    assert bytes(open_seal(b"a pickle of others.")[0]) == b"a pickle of others."


def test_every_bit_of_a_seal_is_checked() -> None:
    pickled = b"pickle " + CLAIM.encode() + b"."
    good = seal(pickled, encode_custom_metadata({"a": 1}), [1, 1 << 31])
    assert bytes(open_seal(good)[0]) == pickled
    assert read_seal(good[-seal_nbytes(good) :]).custom_metadata == b'{"a":1}'
    assert open_seal(good)[1].tables == (1, 1 << 31)
    for bit in range(8 * len(good)):
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SealError):
            open_seal(bytes(damaged))
    for cut in range(1, len(good) - len(pickled)):
        with pytest.raises(SealError):
            open_seal(good[:-cut])


async def test_complete_steps_are_listed_in_order_with_their_metrics(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        await _save(tmp_path, step, metrics={"loss": step / 10, "text": "no number"})
    dcp.save({"w": torch.ones(3)}, checkpoint_id=str(tmp_path / "step-7"))
    for name in ("step-4", "step-050", "step-x", "other"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-4" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / "step-050" / ".metadata").write_bytes(b"")
    (tmp_path / "step-9").write_text("a file")
    steps = (await list_steps(LocalStorage(), str(tmp_path))).steps
    written = {step: (tmp_path / f"step-{step}" / ".metadata").stat().st_mtime for step in (3, 7, 20, 100)}
    assert [(each.step, each.saved_at) for each in steps] == list(written.items())
    assert [each.metrics for each in steps] == [{"loss": 0.3}, {}, {"loss": 2.0}, {"loss": 10.0}]
    assert (await list_steps(LocalStorage(), str(tmp_path / "nothing"))).steps == []


async def test_steps_that_cannot_be_read_are_named_and_the_others_listed(faulty: FaultyStorage) -> None:
    for step in range(3):
        await _save("root", step, faulty)

    def refuse(call: str) -> None:
        if call == "open" and faulty.calls.count("open") == 2:
            raise OSError(30, "Read-only file system")

    faulty.gate = refuse
    faulty.calls.clear()
    found = await list_steps(faulty, "root")
    [(step, why)] = found.unreadable.items()
    assert why == f"cannot read memory:root/step-{step}/.metadata: [Errno 30] Read-only file system"
    assert [each.step for each in found.steps] == sorted({0, 1, 2} - {step})


async def test_the_metadata_goes_first_and_the_files_beside_it_with_it(faulty: FaultyStorage, tmp_path: Path) -> None:
    await _save(tmp_path, 1)
    (tmp_path / "step-1" / "tokenizer").mkdir()
    (tmp_path / "step-1" / "tokenizer" / "eval.json").write_text("{}")
    await remove_step(LocalStorage(), str(tmp_path / "step-1"), set())
    assert not (tmp_path / "step-1").exists()

    await _save("root", 3, faulty)

    def refuse(call: str) -> None:
        if call == "remove_tree":
            raise OSError(30, "Read-only file system")

    faulty.gate = refuse
    seen: set[str] = set()
    with pytest.raises(OSError, match="Read-only"):
        await remove_step(faulty, "root/step-3", seen)
    assert [name.endswith(".distcp") for name in faulty.files["root/step-3"]] == [True]
    faulty.gate = lambda call: None
    await remove_step(faulty, "root/step-3", seen)  # half of it is gone, and it is known what the other half is
    assert not faulty.files.get("root/step-3")


async def test_what_another_process_saves_to_a_step_outlives_its_removal(faulty: FaultyStorage) -> None:
    await _save("root", 3, faulty)
    alive = f"__0_0_{32 * 'a'}.distcp"
    faulty.files["root/step-3"] |= {alive: b"data", "tokenizer.json": b"{}"}
    await remove_step(faulty, "root/step-3", set())
    assert [*faulty.files["root/step-3"]] == [alive]


async def test_leftovers_are_removed_unless_they_are_live_or_whole_or_not_ours(tmp_path: Path) -> None:
    await _save(tmp_path, 1)
    live = 32 * "f"
    for step, names in {
        2: [f"__0_0_{32 * '0'}.distcp", f".metadata.{32 * '7'}.tmp"],
        3: [f"__0_0_{live}.distcp"],
        4: ["notes.txt", f"__0_0_{32 * '0'}.distcp"],
        5: [],
        6: ["config.json"],
        7: ["__0_0.distcp"],  # of `dcp.save`, which may be alive
    }.items():
        (tmp_path / f"step-{step}").mkdir()
        for name in names:
            (tmp_path / f"step-{step}" / name).write_bytes(b"x")
    removed = await remove_leftovers(LocalStorage(), str(tmp_path), lambda name: live in name)
    assert removed == [2, 4, 5]
    assert {path.name for path in tmp_path.iterdir()} == {"step-1", "step-3", "step-4", "step-6", "step-7"}
    assert [path.name for path in (tmp_path / "step-4").iterdir()] == ["notes.txt"]
    assert await read_custom_metadata(LocalStorage(), str(tmp_path / "step-1")) == {}
