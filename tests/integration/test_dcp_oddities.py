"""What torch.distributed.checkpoint accepts or writes, beyond what is usual."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._shards_wrapper import LocalShardsWrapper
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.two_tensor import TwoTensor

from aiodcp import Checkpointer, MemoryStorage, PerRank

from ..support.ranks import World, rank_test
from ..support.states import assert_equal, blank, make_state

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


async def load(target: dict[str, Any], path: Path, **options: Any) -> None:
    async with Checkpointer() as checkpointer:
        await checkpointer.load(target, path, **options)


async def test_metadata_that_names_the_older_modules_is_read(tmp_path: Path) -> None:
    with patch("torch.distributed.checkpoint.metadata.TensorProperties", TensorProperties):
        dcp.save({"a": torch.arange(4.0)}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    assert b"_shard.sharded_tensor.metadata" in (tmp_path / ".metadata").read_bytes()
    target = {"a": torch.zeros(4)}
    await load(target, tmp_path)
    assert torch.equal(target["a"], torch.arange(4.0))


async def test_a_planner_that_keeps_plans_saves_again_and_again() -> None:
    class Planner(dcp.DefaultSavePlanner):
        pass  # DCP keeps plans by the class's name

    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        for step in range(3):
            state = {"w": torch.full((3,), float(step)), "n": step}
            await (await checkpointer.save(state, "ckpt", planner=Planner(enable_plan_caching=True)))
            target = {"w": torch.zeros(3), "n": None}
            await checkpointer.load(target, "ckpt")
            assert_equal(state, target)


async def test_a_planner_may_add_names_at_the_top_level() -> None:
    state = {"a": {"w": torch.ones(2), "n": 3}, "b": torch.zeros(1)}
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        await (await checkpointer.save(state, "ckpt"))
        got: dict[str, Any] = {}
        await checkpointer.load(got, "ckpt", planner=_EmptyStateDictLoadPlanner())  # type: ignore[no-untyped-call]
        assert_equal(state, got)
        got = {}
        await checkpointer.load(got, "ckpt", planner=_EmptyStateDictLoadPlanner(keys={"a"}))  # type: ignore[no-untyped-call]
        assert_equal({"a": state["a"]}, got)


@contextmanager
def _without_checksums() -> Iterator[None]:
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(True)


async def test_what_torch_does_about_checksums_changes_nothing_that_is_written(tmp_path: Path) -> None:
    state = {"sparse": torch.eye(3).to_sparse(), "pair": (torch.ones(2), 1), **make_state()}
    with _without_checksums():
        async with Checkpointer() as checkpointer:
            await (await checkpointer.save(state, tmp_path / "a"))
            assert not torch.serialization.get_crc32_options()
            await (await checkpointer.save(state, tmp_path / "b", planner=dcp.DefaultSavePlanner()))
    for name in "ab":
        run = subprocess.run(
            [sys.executable, "-m", "aiodcp", "verify", tmp_path / name], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("state", [make_state(), {"w": torch.ones(3)}, {"n": 3}], ids=["both", "a tensor", "a value"])
async def test_what_was_saved_without_checksums_loads_with_a_word(
    state: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with _without_checksums():
        dcp.save(state, checkpoint_id=str(tmp_path), no_dist=True)
    target = blank(state)
    with caplog.at_level(logging.WARNING, "aiodcp"):
        await load(target, tmp_path)
    assert_equal(state, target)
    assert [text for text in caplog.messages if "without checksums" in text] == [
        f"{tmp_path}: some values were saved without checksums: damage to them cannot be detected"
    ]


async def test_an_exported_optimizer_is_one_that_torch_takes(tmp_path: Path) -> None:
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save({"optim": optimizer, "e": {}}, tmp_path / "ours"))
    dcp.save({"optim": optimizer.state_dict()}, checkpoint_id=str(tmp_path / "theirs"), no_dist=True)
    for name in ("ours", "theirs"):
        out = tmp_path / f"{name}.pt"
        subprocess.run([sys.executable, "-m", "aiodcp", "export", tmp_path / name, "--to", "torch", out], check=True)
        exported = torch.load(out)
        assert_equal(optimizer.state_dict(), exported["optim"])
        fresh = torch.optim.AdamW(model.parameters())
        fresh.load_state_dict(exported["optim"])
        assert torch.equal(fresh.state[model.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
        if name == "ours":
            assert exported["e"] == {}


# --- ranks


def _round_trip(checkpointer: Checkpointer, path: Path, state: dict[str, Any], target: dict[str, Any]) -> None:
    checkpointer.save_sync(state, path).uploaded.wait()
    checkpointer.load_sync(target, path)


@rank_test(2)
def test_parts_of_other_kinds_than_plain_tensors_round_trip(rank: int, size: int, tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    mesh = init_device_mesh("cpu", (size,))

    def rows(value: float) -> DTensor:
        """Two shards a rank, as torchrec has them."""
        shards = [torch.full((1, 4), value), torch.full((2, 4), value + 0.5)]
        part = LocalShardsWrapper(shards, [(rank * 3, 0), (rank * 3 + 1, 0)])
        return DTensor.from_local(
            part, mesh, [Shard(0)], run_check=False, shape=torch.Size([3 * size, 4]), stride=(4, 1)
        )

    def two(value: float) -> DTensor:
        part = TwoTensor(torch.full((2, 4), value), torch.full((2, 4), value + 0.5))  # type: ignore[no-untyped-call]
        return DTensor.from_local(part, mesh, [Shard(0)], run_check=False)

    with torch.serialization.safe_globals([TwoTensor]), Checkpointer() as checkpointer:
        target = {"rows": rows(0.0), "two": two(0.0)}
        for step in (1.0, 10.0):  # the second with the plan of the first
            _round_trip(checkpointer, folder, {"rows": rows(rank + step), "two": two(rank + step)}, target)
            for shard, value in zip(target["rows"].to_local().local_shards(), (0.0, 0.5), strict=True):  # type: ignore[attr-defined]
                assert torch.equal(shard, torch.full_like(shard, rank + step + value))
            assert torch.equal(target["two"].to_local().b, torch.full((2, 4), rank + step + 0.5))  # type: ignore[attr-defined]
        if rank == 0:
            checked = Checkpointer(no_dist=True)
            with checked:
                whole = {"rows": torch.zeros(3 * size, 4)}
                checked.load_sync(whole, folder)
            assert whole["rows"][:, 0].tolist() == [
                rank + 10.0 + value for rank in range(size) for value in (0.0, 0.5, 0.5)
            ]
        dist.barrier()


def _holding_nothing(rank: int, size: int, folder: Path) -> list[str]:
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = {"model": get_model_state_dict(model, options=options)}  # {} but on rank 0
    reported = []
    with Checkpointer() as checkpointer:
        checkpointer.save_sync(state, folder / "a").uploaded.wait()
        checkpointer.save_sync({"a": torch.ones(2)} if rank == 1 else {}, folder / "b").uploaded.wait()
        target = {"a": torch.zeros(2)} if rank == 0 else {}
        checkpointer.load_sync(target, folder / "b")
        assert rank or bool(target["a"].all())
        nothings: list[dict[str, Any]] = [{}, {"scaler": {}}]
        for nothing in nothings:
            try:
                checkpointer.save_sync(nothing, folder / "c").uploaded.wait()
                reported.append("saved")
            except Exception as error:
                reported.append(str(error))
    return reported


def test_a_rank_may_hold_nothing_but_not_all_of_them(world: World, tmp_path: Path) -> None:
    for reported in world.run(3, _holding_nothing, tmp_path):
        assert "the state dict contains nothing to save" in reported[0]
        assert reported[1] == "saved"
    assert (tmp_path / "a" / ".metadata").exists()


class _Collective:
    """Talks to the other ranks whenever it is asked for its state."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.name = name
        self.calls = calls

    def _talk(self) -> None:
        code = torch.tensor([ord(self.name)])
        dist.all_reduce(code)
        assert int(code) == dist.get_world_size() * ord(self.name), "another rank asks another object"
        self.calls.append(self.name)

    def state_dict(self) -> dict[str, Any]:
        self._talk()
        return {"v": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._talk()


def _in_another_order(rank: int, size: int, folder: Path) -> list[str]:
    calls: list[str] = []
    names = ["x", "y", "z"]
    state = {name: _Collective(name, calls) for name in names[rank:] + names[:rank]}
    with Checkpointer() as checkpointer:
        _round_trip(checkpointer, folder, dict(state), dict(state))
    return calls


def test_objects_are_asked_in_one_order_on_all_ranks(world: World, tmp_path: Path) -> None:
    assert world.run(3, _in_another_order, tmp_path) == [["x", "y", "z"] * 3] * 3


def _pipeline(rank: int, size: int, folder: Path) -> list[str]:
    """Each rank has layers of its own: what no rank wants, or one wants in vain, is found all the same."""
    reported: list[str] = []

    def state(*more: str) -> dict[str, Any]:
        layers = {f"layer{rank}.w": torch.full((3,), float(rank)), "shared": torch.ones(2)}
        return {"model": layers | {name: torch.ones(1) for name in more}}

    with Checkpointer() as checkpointer:
        checkpointer.save_sync(state(*(["head"] if rank == size - 1 else [])), folder).uploaded.wait()
        target = blank(state(*(["head"] if rank == 0 else [])))
        assert not checkpointer.load_sync(target, folder)
        assert torch.equal(target["model"][f"layer{rank}.w"], torch.full((3,), float(rank)))
        for wanted, strict in (
            (state(), True),
            (state("head", *(["typo"] if rank == 1 else [])), True),
            (state(), False),
        ):
            try:
                report = checkpointer.load_sync(blank(wanted), folder, strict=strict)
                reported.append(str(report.unexpected))
            except Exception as error:
                reported.append(str(error).partition("\n---")[0])
    return reported


def test_wanted_names_are_united_over_the_ranks(world: World, tmp_path: Path) -> None:
    for reported in world.run(3, _pipeline, tmp_path):
        assert "not in the state dict (1):\n  model.head" in reported[0]
        assert "missing from the checkpoint (1):\n  model.typo" in reported[1]
        assert reported[2] == "['model.head']"


class _Position:
    def __init__(self, at: int) -> None:
        self.at = at

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at = state["at"]


@rank_test(3)
def test_a_rank_that_is_new_has_a_choice(rank: int, size: int, tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"

    def state(at: int, new_rank: Any) -> dict[str, Any]:
        return {
            "w": torch.zeros(2),
            "rng": PerRank(torch.full((2,), at), new_rank=new_rank),
            "data": PerRank(_Position(at), new_rank=new_rank),
        }

    if rank == 0:

        async def save_alone() -> None:
            async with Checkpointer(no_dist=True) as checkpointer:
                await (await checkpointer.save(state(7, "keep") | {"w": torch.ones(2)}, folder))

        asyncio.run(save_alone())
    dist.barrier()
    with Checkpointer() as checkpointer:
        target = state(-rank, "keep")
        report = checkpointer.load_sync(target, folder)
        mine = 7 if rank == 0 else -rank
        assert target["w"].all()
        assert (int(target["rng"].value[0]), target["data"].value.at) == (mine, mine)
        assert report.missing == ([f"rng.rank-{rank}", f"data.rank-{rank}.at"] if rank else [])
        with pytest.raises(Exception, match=r"data\.rank-1\.at"):
            checkpointer.load_sync(state(0, "raise"), folder)

        target = state(0, lambda stored: stored[0])
        checkpointer.load_sync(target, folder)
        assert (int(target["rng"].value[0]), target["data"].value.at) == (7, 7)
        with pytest.raises(Exception, match=r"not_there"):  # the rest stays strict
            checkpointer.load_sync(state(0, "keep") | {"not_there": 1}, folder)


@rank_test(2)
def test_wrappers_leave_no_trace_and_fresh_moments_are_shards(rank: int, size: int, folder: Path) -> None:
    """Data-parallel wrappers leave no trace; a fresh optimizer's moments are shards, also inside an object."""
    torch.manual_seed(0)
    plain = nn.Linear(4, 4)
    wrapped = DistributedDataParallel(plain)
    other = nn.Linear(4, 4)
    with Checkpointer() as checkpointer:
        _round_trip(checkpointer, folder / "ddp", {"model": wrapped}, {"model": other})
        assert torch.equal(plain.weight, other.weight)
        _round_trip(checkpointer, folder / "ddp", {"model": other}, {"model": DistributedDataParallel(nn.Linear(4, 4))})
        _round_trip(checkpointer, folder / "d", {"model": dict(wrapped.state_dict())}, {"model": nn.Linear(4, 4)})

        class App:
            def __init__(self) -> None:
                torch.manual_seed(rank)
                self.model = nn.Linear(8, 8)
                fully_shard(self.model, mesh=init_device_mesh("cpu", (size,)))
                self.parts = {"optim": torch.optim.AdamW(self.model.parameters())}

            def step(self) -> None:
                self.model(torch.ones(2, 8)).square().sum().backward()
                self.parts["optim"].step()

            def state_dict(self) -> dict[str, Any]:
                return {"model": self.model.state_dict(), "optim": self.parts["optim"].state_dict()}

            def load_state_dict(self, state: dict[str, Any]) -> None:
                self.model.load_state_dict(state["model"])
                self.parts["optim"].load_state_dict(state["optim"])

        app, fresh = App(), App()
        app.step()
        _round_trip(checkpointer, folder / "fsdp", {"app": app}, {"app": fresh})
        again = torch.optim.AdamW(fresh.model.parameters())
        _round_trip(checkpointer, folder / "fsdp2", {"optim": app.parts["optim"]}, {"optim": again})
        for optimizer in (fresh.parts["optim"], again):
            moment = optimizer.state[fresh.model.weight]["exp_avg"]
            assert isinstance(moment, DTensor)
            assert moment.placements == fresh.model.weight.placements  # type: ignore[attr-defined]
            stored = app.parts["optim"].state[app.model.weight]["exp_avg"]
            assert torch.equal(moment.to_local(), stored.to_local())
        fresh.step()
