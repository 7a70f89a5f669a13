"""An item that is whole, and lies where another one was saved, is found: by every load and by `verify`."""

from __future__ import annotations

import asyncio
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import aiodcp
from aiodcp import Checkpointer, CorruptError, Problem, RankError, joint_checkpoint
from aiodcp._format.item_tables import ItemTables
from aiodcp._format.metadata_reader import read_sealed
from aiodcp._save.bounded_staging import MIN_NBYTES

from ..support.ranks import World
from ..support.states import assert_equal, blank

LARGE = 3 * MIN_NBYTES // 4 // 8  # elements: more than a window


def _state() -> dict[str, Any]:
    return {
        "a": torch.arange(1000.0),
        "b": -torch.arange(1000.0),
        "c": torch.ones(5, 3).to(torch.bfloat16),
        "big": torch.arange(float(LARGE)),
        "big too": torch.zeros(LARGE),
        "lr": 0.125,
        "rl": 0.25,
        "sparse": torch.eye(3).to_sparse(),
        "other": (torch.eye(3) * 2).to_sparse(),
        "obj": {"x": (1, 2)},
    }


PAIRS = [("a", "b"), ("big", "big too"), ("lr", "rl"), ("sparse", "other")]


def _places(folder: Path) -> dict[str, tuple[Path, int, int]]:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    return {
        index.fqn: (folder / info.relative_path, info.offset, info.length)
        for index, info in metadata.storage_data.items()
    }


def _copy_over(folder: Path, one: str, other: str) -> bytes:
    """Copy an item over another one of the same length; return the file's content before."""
    path, start, nbytes = _places(folder)[one]
    source, there, same = _places(folder)[other]
    assert nbytes == same
    before = path.read_bytes()
    data = bytearray(before)
    data[start : start + nbytes] = source.read_bytes()[there : there + same]
    path.write_bytes(data)
    return before


async def _verify(place: Path) -> list[Problem]:
    return await aiodcp.verify(place)


async def _save(kind: str, folder: Path) -> None:
    options = {"max_host_bytes": MIN_NBYTES} if kind == "windows" else {}
    async with Checkpointer(**options) as checkpointer:  # type: ignore[arg-type]
        if kind == "joint":
            async with joint_checkpoint(checkpointer, folder) as joint:
                for name, value in _state().items():
                    joint.add(name, value)
        else:
            for _ in range(2):  # the second time from kept buffers
                await (await checkpointer.save(_state(), folder))


@pytest.mark.parametrize("kind", ["plain", "windows", "joint"])
async def test_an_item_copied_over_another_is_found(kind: str, tmp_path: Path) -> None:
    await _save(kind, tmp_path)
    assert not await _verify(tmp_path)
    async with Checkpointer() as checkpointer:
        target = blank(_state())
        await checkpointer.load(target, tmp_path)
        assert_equal(_state(), target)
        for one, other in PAIRS:
            path, _, _ = _places(tmp_path)[one]
            before = _copy_over(tmp_path, one, other)
            for wanted in (blank(_state()), {one: blank(_state())[one]}, {one: None}):
                with pytest.raises(CorruptError, match=f"({one}).*is not the item that was saved here"):
                    await checkpointer.load(wanted, tmp_path)
            loaded = {one: blank(_state())[one]}
            await checkpointer.load(loaded, tmp_path, check_crc=False)
            assert_equal({one: _state()[other]}, loaded)
            [problem] = await _verify(tmp_path)
            assert (problem.fqn, problem.problem) == (one, "is intact, but is not the item that was saved here")
            path.write_bytes(before)


async def test_a_table_that_is_damaged_or_not_there_is_found(tmp_path: Path) -> None:
    await _save("plain", tmp_path)
    [path] = tmp_path.glob("*.distcp")
    good = path.read_bytes()
    async with Checkpointer() as checkpointer:
        for data in (good[:-1] + bytes([good[-1] ^ 1]), good[:-4], good + bytes(8)):
            path.write_bytes(data)
            with pytest.raises(CorruptError, match="CRC32 mismatch in the checksum table"):
                await checkpointer.load({"a": torch.zeros(1000)}, tmp_path)
            assert await _verify(tmp_path)
        path.write_bytes(good)
        metadata, seal = read_sealed((tmp_path / ".metadata").read_bytes(), "m")
        assert len(seal.tables) == 1
        with pytest.raises(ValueError, match="zip"):
            ItemTables(metadata, [1, 2])
        assert ItemTables(metadata, []).nbytes(path.name) == 0


def _ranks(rank: int, size: int, folder: Path) -> None:
    async def main() -> None:
        state = {f"w{number}": torch.full((64,), float(number)) for number in range(8)} | {f"own{rank}": torch.ones(3)}
        async with Checkpointer() as checkpointer:
            for _ in range(2):
                await (await checkpointer.save(state, folder))
            await checkpointer.load(blank(state), folder)
            if rank == 0:
                places = _places(folder)
                path, start, nbytes = places["w3"]
                there = next(name for name, place in places.items() if name[0] == "w" and place[0] != path)
                data = bytearray(path.read_bytes())
                source, begin, same = places[there]
                data[start : start + nbytes] = source.read_bytes()[begin : begin + same]
                path.write_bytes(data)
            with pytest.raises(RankError, match="is not the item that was saved here"):
                await checkpointer.load(blank(state), folder)

    asyncio.run(main())


def test_ranks_write_a_table_each(world: World, tmp_path: Path) -> None:
    world.run(2, _ranks, tmp_path)
    _, seal = read_sealed((tmp_path / ".metadata").read_bytes(), "m")
    assert len(seal.tables) == len(list(tmp_path.glob("*.distcp"))) == 2
    assert json.loads(seal.custom_metadata or b"{}") == {}
