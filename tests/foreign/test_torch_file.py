"""Files of `torch.save`."""

from __future__ import annotations

import collections
import dataclasses
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor, zeros

import aiodcp
from aiodcp import Checkpointer, CorruptError, FormatError, LoadError, MismatchError, UnsafeError

from ..support.counting_storage import CountingStorage
from ..support.ranks import rank_test
from ..support.states import assert_equal, blank, make_state


@dataclasses.dataclass
class Config:
    width: int


class Opaque:
    def __init__(self) -> None:
        self.value = 3


def state_of_all_kinds() -> dict[str, Any]:
    base = torch.arange(24.0)
    return make_state(1) | {
        "view": base[3:9],
        "rows": base.view(4, 6).t(),
        "channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.ones(3, 1).expand(3, 4),
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(4), 0.5, 0, torch.qint8),
        "parameter": nn.Parameter(torch.ones(2, 2)),
        "pair": (torch.ones(2), 3),
        "ordered": collections.OrderedDict(a=torch.ones(1)),
        "int_keys": {1: 2, 3: torch.ones(1)},
        "nothing": {},
        "numpy": np.arange(3),
        "config": Config(7),
        "large": torch.randn(3000, 2000).t(),
    }


async def test_all_kinds_of_values_come_back_as_they_were_saved(tmp_path: Path) -> None:
    state = state_of_all_kinds()
    torch.save(state, tmp_path / "state.pt")
    async with aiodcp.open(tmp_path / "state.pt") as ckpt:
        loaded = await ckpt.state_dict()
    for each in (state, loaded):
        assert each.pop("config") == Config(7)
        assert each.pop("numpy").tolist() == [0, 1, 2]
        tensor, number = each.pop("pair")
        assert tensor.tolist() == [1, 1]
        assert number == 3
    state["ordered"] = dict(state["ordered"])
    state["parameter"] = state["parameter"].data
    assert loaded.keys() == state.keys()
    assert_equal(state, {name: loaded[name] for name in state})


async def test_tensors_are_filled_in_place(tmp_path: Path) -> None:
    state = {
        "t": torch.randn(6, 4).t(),
        "channels": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "sparse": torch.eye(3).to_sparse(),
        "large": torch.randn(3000, 2000).t(),
        "half": torch.randn(5).half(),
    }
    torch.save(state, tmp_path / "state.pt")
    targets = {
        "t": torch.zeros(4, 6),
        "channels": torch.zeros(2, 3, 4, 5),
        "sparse": torch.zeros(3, 3).to_sparse(),
        "large": torch.zeros(2000, 3000),
        "half": torch.zeros(5),
    }
    before = dict(targets)
    async with Checkpointer() as checkpointer:
        report = await checkpointer.load(targets, tmp_path / "state.pt")
    assert report.converted == ["half"]
    for name, tensor in targets.items():
        assert tensor is before[name]
        assert torch.equal(tensor.to_dense(), state[name].to_dense().to(tensor.dtype))


async def test_a_run_goes_on_from_a_file_of_torch_save(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    model, optimizer = make()
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optim": optimizer.state_dict(), "epoch": 4}, tmp_path / "last.ckpt")
    other, fresh = make()
    state: dict[str, Any] = {"model": other, "optim": fresh, "epoch": 0}
    async with Checkpointer() as checkpointer:
        assert not await checkpointer.load(state, tmp_path / "last.ckpt")
    assert state["epoch"] == 4
    assert_equal(dict(model.state_dict()), dict(other.state_dict()))
    assert_equal(optimizer.state_dict(), fresh.state_dict())


@rank_test(2)
async def test_ranks_read_only_the_ranges_of_their_shards(rank: int, size: int, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (size,))
    whole = torch.arange(2048.0 * 512).view(2048, 512)
    if rank == 0:
        torch.save({"w": whole, "n": 3}, tmp_path / "state.pt")
    torch.distributed.barrier()
    storage = CountingStorage()
    state: dict[str, Any] = {"w": zeros(2048, 512, device_mesh=mesh, placements=[Shard(0)]), "n": 0}
    async with Checkpointer(storage=storage) as checkpointer:
        await checkpointer.load(state, tmp_path / "state.pt")
    assert torch.equal(state["w"].to_local(), distribute_tensor(whole, mesh, [Shard(0)]).to_local())
    assert state["n"] == 3
    assert storage.nbytes <= 0.55 * whole.nbytes + (512 << 10)


async def test_only_plain_data_unless_all_is_trusted(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "o": Opaque()}, tmp_path / "state.pt")
    state: dict[str, Any] = {"w": torch.zeros(2), "o": None}
    async with Checkpointer() as checkpointer:
        with pytest.raises(UnsafeError, match="Opaque"):
            await checkpointer.load(state, tmp_path / "state.pt")
        await checkpointer.load(state, tmp_path / "state.pt", weights_only=False)
    assert state["o"].value == 3


async def test_damage_and_other_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    torch.save({"w": torch.arange(1000.0)}, path)
    good = path.read_bytes()

    async def load() -> dict[str, Any]:
        state: dict[str, Any] = {"w": torch.zeros(1000)}
        async with Checkpointer() as checkpointer:
            await checkpointer.load(state, path)
        return state

    assert torch.equal((await load())["w"], torch.arange(1000.0))
    for cut in (20, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(CorruptError, match=str(path)):
            await load()
    path.write_bytes(good)
    assert await aiodcp.verify(path) == []
    place = good.index(torch.arange(1000.0).numpy().tobytes()[400:440])
    path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    [problem] = await aiodcp.verify(path)
    assert "CRC32" in problem.problem
    for value, problem_text in (([1, 2], "holds a list"), (torch.ones(2), "holds a Tensor")):
        torch.save(value, path)
        with pytest.raises(FormatError, match=problem_text):
            await load()
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match=r"before torch 1\.6"):
        await load()
    path.write_text("a text")
    with pytest.raises(FormatError, match="no format that aiodcp reads"):
        await load()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(FormatError, match=r"not one that torch\.save wrote"):
        await load()


async def test_a_misfit_is_found_before_anything_changes(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "s": torch.eye(2).to_sparse()}, tmp_path / "state.pt")
    state = {"w": torch.zeros(2), "s": torch.zeros(3, 3).to_sparse()}
    async with Checkpointer() as checkpointer:
        with pytest.raises(MismatchError, match=r"s is torch\.float32 of shape"):
            await checkpointer.load(state, tmp_path / "state.pt")
    assert torch.equal(state["w"], torch.zeros(2))


async def test_a_model_of_hugging_faces_in_one_torch_file(tmp_path: Path) -> None:
    model = nn.Linear(2, 3)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    other = nn.Linear(2, 3)
    async with Checkpointer() as checkpointer:
        await checkpointer.load(other.state_dict(), tmp_path)
    assert_equal(dict(model.state_dict()), dict(other.state_dict()))
    (tmp_path / "pytorch_model.bin").rename(tmp_path / "pytorch_model-00001-of-00002.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    async with Checkpointer() as checkpointer:
        with pytest.raises(FormatError, match="from_pretrained"):
            await checkpointer.load(blank(make_state()), tmp_path)


@pytest.mark.parametrize(
    "state",
    [
        {"a.b": torch.zeros(2), "a": {"b": torch.ones(2)}},
        {0: torch.zeros(2), "0": torch.ones(2)},
        {"n": {1: 2}, "n.1": 3},
    ],
)
async def test_values_of_one_name_are_refused(state: dict[Any, Any], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(FormatError, match="two of its values have the name"):
        async with aiodcp.open(tmp_path / "state.pt"):
            pass


def shared(depth: int) -> dict[str, Any]:
    inside: Any = 1
    for _ in range(depth):
        inside = {str(number): inside for number in range(10)}
    return {"a": inside}


def nested_lists() -> dict[str, Any]:
    inside: Any = [1]
    for _ in range(8):
        inside = [inside] * 10
    return {"a": inside}


def itself() -> dict[str, Any]:
    state: dict[str, Any] = {"w": torch.zeros(2)}
    state["again"] = state
    return state


@pytest.mark.parametrize("make", [lambda: shared(6), nested_lists, itself])
async def test_small_files_of_many_values_are_refused(make: Any, tmp_path: Path) -> None:
    torch.save(make(), tmp_path / "state.pt")
    with pytest.raises(FormatError, match="again and again"):
        async with aiodcp.open(tmp_path / "state.pt"):
            pass


async def test_containers_may_be_shared(tmp_path: Path) -> None:
    layer = {"weight": torch.ones(2), "lr": 0.1}
    state = {"layers": [layer] * 100}
    torch.save(state, tmp_path / "state.pt")
    async with aiodcp.open(tmp_path / "state.pt") as ckpt:
        assert_equal(state, await ckpt.state_dict())


async def test_only_the_storages_of_what_is_not_dense_are_read_on_opening(tmp_path: Path) -> None:
    big = torch.arange(1_000_000.0)
    state = {
        "big": big,
        "other": torch.nn.Parameter(torch.zeros(500_000)),
        "sparse": torch.eye(3).to_sparse(),
        "conj": torch.randn(3, dtype=torch.complex64).conj(),
        "config": Config(width=3),
    }
    torch.save(state, tmp_path / "state.pt")
    storage = CountingStorage()
    async with aiodcp.open(tmp_path / "state.pt", storage=storage) as ckpt:
        assert storage.nbytes < 300_000
        assert_equal(state, await ckpt.state_dict())


async def test_what_is_not_dense_may_share_a_storage_with_what_is(tmp_path: Path) -> None:
    values = torch.tensor([1.0, 2.0, 3.0])
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 1, 2]]), values, (3,), check_invariants=True)
    complex_ = torch.randn(3, dtype=torch.complex64)
    state = {"values": sparse._values(), "sparse": sparse, "plain": complex_, "conj": complex_.conj()}
    torch.save(state, tmp_path / "state.pt")
    async with aiodcp.open(tmp_path / "state.pt") as ckpt:
        assert_equal(state, await ckpt.state_dict())


def test_what_cannot_be_allocated_is_an_error_of_ours(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(1).expand(10**13)}, tmp_path / "state.pt")
    with aiodcp.open(tmp_path / "state.pt") as ckpt, pytest.raises(LoadError, match=r"w, .* cannot be allocated"):
        ckpt.read_sync("w")
