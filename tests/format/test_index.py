"""The columns behind the pickle of `.metadata`: what loads read instead of it."""

from __future__ import annotations

import json
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import aiodcp
from aiodcp import Checkpointer, CorruptError, MemoryStorage
from aiodcp._format.index_reader import MAGIC, read_index, without_pickle
from aiodcp._format.metadata_reader import read_metadata
from aiodcp._format.outline import decode_outline
from aiodcp._format.seal import in_pieces, open_seal, seal

from ..support.ranks import rank_test
from ..support.states import assert_equal, blank, make_state


async def saved(storage: MemoryStorage, state: dict[str, Any], place: str = "ckpt") -> bytes:
    async with Checkpointer(storage=storage, no_dist=True) as checkpointer:
        await (await checkpointer.save(state, place)).uploaded
    return storage.files[place][".metadata"]


def with_index(data: bytes, index: bytes) -> bytes:
    """Return a `.metadata` with another index, and right checksums."""
    pickled, found = open_seal(data)
    return seal(bytes(pickled), found.custom_metadata, found.tables, in_pieces(index))


async def test_loads_and_readers_do_without_the_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, state = MemoryStorage(), make_state(1)
    await saved(storage, state)

    def refuse(*arguments: Any) -> Any:
        raise AssertionError("it reads the pickle")

    monkeypatch.setattr("aiodcp._foreign.find.read_sealed", refuse)
    async with Checkpointer(storage=storage) as checkpointer:
        loaded = blank(state)
        await checkpointer.load(loaded, "ckpt")
        assert_equal(state, loaded)
    async with aiodcp.open("ckpt", storage=storage) as ckpt:
        assert_equal(state, await ckpt.state_dict())


async def test_where_another_has_written_the_pickle_is_read(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path, no_dist=True)
    data = (tmp_path / ".metadata").read_bytes()
    assert without_pickle(data) == data
    async with aiodcp.open(tmp_path) as ckpt:
        assert (await ckpt.read("w")).tolist() == [1.0] * 3


async def test_it_is_small() -> None:
    state = {f"model.layers.{number // 10}.weight_{number % 10}": torch.zeros(16) for number in range(10_000)}
    data = await saved(MemoryStorage(), state)
    pickled, found = open_seal(data)
    names_nbytes = sum(len(json.dumps(name)) + 1 for name in state)
    assert len(found.outline) < names_nbytes + 10 * len(state)
    assert len(pickled) < 200 * len(state)


@pytest.mark.filterwarnings("ignore:optim.state has keys")
async def test_it_says_which_keys_lead_to_each_value(tmp_path: Path) -> None:
    tensor = torch.ones(2)
    state: dict[str, Any] = {
        "flat.a.b": tensor,
        "model": {"layers.0.weight": tensor, "bias": tensor, "": tensor, ".": tensor, "a..b": tensor},
        "optim": {"state": {"layers.0.weight": {"exp_avg": tensor, "a.b": 1}, 3: {"step": 1.0}}},
        "list": [tensor, {"x.y": tensor, "z": [tensor]}],
        "x.": {".y": tensor},
        "": {"": {"": tensor}},
        "deep": {f"{n}": tensor for n in range(3)},
    }
    deep: dict[str, Any] = {"w": tensor}
    for step in range(80):
        deep = {f"s{step}": deep}
    data = await saved(MemoryStorage(), state | {"deepest": deep})
    indexed, _ = read_index(without_pickle(data), "")
    paths = read_metadata(data, "").planner_data
    assert indexed.planner_data == paths
    assert list(indexed.planner_data) == list(paths)
    assert len(indexed.planner_data) == len(paths)
    assert all(name in indexed.planner_data for name in paths)
    assert "nothing" not in indexed.planner_data
    with pytest.raises(KeyError):
        indexed.planner_data["nothing"]


async def test_damage_to_the_pickle_is_found_all_the_same() -> None:
    storage = MemoryStorage()
    data = bytearray(await saved(storage, {"w": torch.ones(3)}))
    data[100] ^= 1
    storage.files["ckpt"][".metadata"] = bytes(data)
    async with Checkpointer(storage=storage) as checkpointer:
        with pytest.raises(CorruptError, match="CRC32"):
            await checkpointer.load({"w": torch.zeros(3)}, "ckpt")
    with pytest.raises(CorruptError, match="CRC32"):
        async with aiodcp.open("ckpt", storage=storage):
            pass


async def test_of_a_large_one_the_end_alone_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    storage, state = MemoryStorage(), make_state(1) | {f"w{number}": torch.ones(1) for number in range(200)}
    await saved(storage, state)
    monkeypatch.setattr("aiodcp._foreign.find.LARGE_NBYTES", 100)
    data = bytearray(storage.files["ckpt"][".metadata"])
    data[100] ^= 1  # the pickle is damaged, which nobody reads
    storage.files["ckpt"][".metadata"] = bytes(data)
    async with Checkpointer(storage=storage) as checkpointer:
        loaded = blank(state)
        await checkpointer.load(loaded, "ckpt")
        assert_equal(state, loaded)
        _, found = open_seal(await saved(MemoryStorage(), state))
        data[-found.nbytes - 30] ^= 1  # nor what stands behind it any more
        storage.files["ckpt"][".metadata"] = bytes(data)
        with pytest.raises(CorruptError, match="CRC32"):
            await checkpointer.load(loaded, "ckpt")
    [problem, *_] = await aiodcp.verify("ckpt", storage=storage)
    assert "CRC32" in problem.problem


def columns_of(data: bytes) -> tuple[bytes, list[bytes], bytes]:
    """Return the outline, what stands behind it in its parts, and what is of the save."""
    _, found = open_seal(data)
    behind = decode_outline(found.outline).columns
    outline = found.outline[: len(found.outline) - len(behind)]
    header = json.loads(zlib.decompress(behind[8 : 8 + struct.unpack_from("<Q", behind)[0]]))
    parts, position = [], 0
    for _ in range(1 + 3 + 3 * 3 + 2 + 2 * len(header["cuts"])):
        (length,) = struct.unpack_from("<Q", behind, position)
        parts.append(zlib.decompress(behind[position + 8 : position + 8 + length]))
        position += 8 + length
    return outline, parts, behind[position:]


def packed(outline: bytes, parts: list[bytes], of_save: bytes) -> bytes:
    compressed = [zlib.compress(part) for part in parts]
    return b"".join([outline, *(struct.pack("<Q", len(each)) + each for each in compressed), of_save])


async def test_what_does_not_fit_together_is_damage() -> None:
    data = await saved(MemoryStorage(), {"w": torch.ones(3), "v": torch.zeros(2, 2), "n": 3})
    outline, parts, of_save = columns_of(data)
    good = with_index(data, packed(outline, parts, of_save))
    assert read_index(without_pickle(good), "")[0].storage_data
    header = json.loads(parts[0])
    wrong: list[bytes] = []
    for number in range(1, len(parts)):
        count = len(parts[number]) // 8
        for at in range(count):
            for change in (1, -1, 1 << 40, -(1 << 62)):
                values = list(struct.unpack(f"<{count}q", parts[number]))
                values[at] += change
                changed = [*parts]
                changed[number] = struct.pack(f"<{count}q", *((value + 2**63) % 2**64 - 2**63 for value in values))
                wrong.append(packed(outline, changed, of_save))
        wrong += [packed(outline, [*parts[:number], parts[number] + bytes(8), *parts[number + 1 :]], of_save)]
    for key, value in (
        ("chunks", -1),
        ("chunks", 1 << 60),
        ("files", 2),
        ("frozen", 0),
        ("cuts", [[1, 1]]),
        ("cuts", 3),
    ):
        wrong.append(packed(outline, [json.dumps(header | {key: value}).encode(), *parts[1:]], of_save))
    wrong += [packed(outline, parts, of_save[:-1]), packed(outline, parts, of_save + bytes(16))]
    wrong += [packed(outline, parts, b"../" * 10 + b"xx" + of_save[32:]), packed(outline, parts[:3], of_save)]
    harmless = 0
    for index in wrong:
        tail = MAGIC + with_index(data, index)
        try:
            indexed, _ = read_index(tail, "the path")
        except CorruptError:
            continue
        harmless += 1  # an offset, a length: who reads there finds that it is not what was saved
        assert all(
            info.relative_path.endswith(".distcp") and "/" not in info.relative_path
            for info in indexed.storage_data.values()
        )
    assert harmless < len(wrong) / 3


async def test_whatever_is_changed_in_it_nothing_else_than_damage_is_raised() -> None:
    data = await saved(MemoryStorage(), {"w": torch.ones(3), "v": torch.zeros(2, 2), "n": 3})
    outline, parts, of_save = columns_of(data)
    index, chance = packed(outline, parts, of_save), random.Random(0)
    for _ in range(300):
        changed = bytearray(index)
        for _ in range(chance.randint(1, 3)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        changed = changed[: chance.choice([len(changed), chance.randrange(len(changed))])]
        whole = with_index(data, bytes(changed))
        tail = without_pickle(whole)
        if tail != whole:
            try:
                assert read_index(tail, "")[0].storage_data is not None
            except CorruptError:
                continue


async def test_verify_compares_it_with_the_pickle() -> None:
    storage = MemoryStorage()
    data = await saved(storage, {"w": torch.ones(3), "v": torch.zeros(2, 2)})
    assert await aiodcp.verify("ckpt", storage=storage) == []
    other = await saved(MemoryStorage(), {"w": torch.ones(3), "v": torch.zeros(2, 3)})
    _, found = open_seal(other)
    storage.files["ckpt"][".metadata"] = with_index(data, found.outline)
    [problem] = await aiodcp.verify("ckpt", storage=storage)
    assert "contradicts" in problem.problem
    outline, parts, of_save = columns_of(data)
    storage.files["ckpt"][".metadata"] = with_index(data, packed(outline, parts, of_save[:-3]) + b"x")
    assert await aiodcp.verify("ckpt", storage=storage) != []


@rank_test(2)
async def test_ranks_are_sent_the_columns_alone(rank: int, size: int, tmp_path: Path) -> None:
    sent: list[int] = []

    async def broadcast(self: Any, data: bytes, length: int | None = None) -> bytes:
        received = await real(self, data, length)
        sent.append(len(received))
        return received

    from aiodcp._distributed.operation import Operation

    real = Operation.broadcast
    state = {f"w{number}": torch.full((4,), float(number)) for number in range(500)}
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, tmp_path / "ckpt")).uploaded
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Operation, "broadcast", broadcast)
            loaded = blank(state)
            await checkpointer.load(loaded, tmp_path / "ckpt")
        assert_equal(state, loaded)
    whole = (tmp_path / "ckpt" / ".metadata").stat().st_size
    assert 0 < max(sent) < whole / 4
