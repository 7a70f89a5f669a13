"""Sharded state: saved by any number of ranks in any layout, loaded by any other, both ways with DCP."""

from __future__ import annotations

import asyncio
import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from aiodcp import Checkpointer

from ..support.ranks import World

SHAPES = {"odd": (7, 5), "tall": (7, 6), "wide": (3, 16), "few": (2, 4), "one": (1,), "cube": (5, 4, 6)}
LAYOUTS = ["replicated", "rows", "columns", "grid", "hsdp", "sharded_tensor"]
SIZES = [1, 2, 3, 4]


def _whole(name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(name))
    values = torch.randn(SHAPES[name], generator=generator)
    return (values * 100).to(torch.int8) if name == "odd" else values  # rows of it begin at any byte


@cache
def _mesh(_: object, *shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape)


def _lay(layout: str, size: int, whole: torch.Tensor) -> Any:
    """Spread a tensor over all ranks."""
    world = dist.group.WORLD
    if layout == "replicated":
        return whole.clone()
    if layout == "rows":
        return distribute_tensor(whole, _mesh(world, size), [Shard(0)])
    if layout == "columns":
        return distribute_tensor(whole, _mesh(world, size), [Shard(whole.dim() - 1)])
    if layout == "grid":
        return distribute_tensor(whole, _mesh(world, -(-size // 2), size // 2 or 1), [Shard(0), Shard(whole.dim() - 1)])
    if layout == "hsdp":
        return distribute_tensor(whole, _mesh(world, size // 2 or 1, -(-size // 2)), [Replicate(), Shard(0)])
    rank, rows = dist.get_rank(), -(-len(whole) // size)
    part = whole[rank * rows : (rank + 1) * rows].clone()
    offsets = [rank * rows, *[0] * (whole.dim() - 1)]
    shards = [LocalShard.from_tensor_and_offsets(part, offsets, rank)] if len(part) else []
    return init_from_local_shards(shards, whole.shape)


def _fits(layout: str, size: int) -> bool:
    return size != 3 or layout not in ("grid", "hsdp")


def _state(layout: str, size: int, zero: bool) -> dict[str, Any]:
    wholes = {name: torch.zeros_like(_whole(name)) if zero else _whole(name) for name in SHAPES}
    tensors = {name: _lay(layout, size, whole) for name, whole in wholes.items()}
    return {"model": tensors, "step": 0 if zero else 12}


def _check(state: dict[str, Any], layout: str, size: int, where: str) -> None:
    assert state["step"] == 12, where
    for name, value in state["model"].items():
        expected = _lay(layout, size, _whole(name))
        if isinstance(value, ShardedTensor):
            pairs = zip(value.local_shards(), expected.local_shards(), strict=True)
            assert all(torch.equal(one.tensor, other.tensor) for one, other in pairs), (where, name)
        else:
            local, same = (each.to_local() if isinstance(each, DTensor) else each for each in (value, expected))
            assert torch.equal(local, same), (where, name)


def _save_all(rank: int, size: int, folder: Path) -> None:
    async def main() -> None:
        async with Checkpointer() as checkpointer:
            for layout in LAYOUTS:
                if _fits(layout, size):
                    state = _state(layout, size, zero=False)
                    await (await checkpointer.save(state, folder / f"aiodcp-{size}-{layout}")).uploaded

    asyncio.run(main())
    for layout in LAYOUTS:
        if _fits(layout, size):
            dcp.save(_state(layout, size, zero=False), checkpoint_id=folder / f"dcp-{size}-{layout}")


def _load_all(rank: int, size: int, folder: Path) -> int:
    async def main() -> int:
        count = 0
        async with Checkpointer() as checkpointer:
            for number, path in enumerate(sorted(folder.iterdir())):
                saver, saved_size, saved = path.name.split("-")
                others = [each for each in LAYOUTS if each != saved]
                for layout in (saved, others[(number + size) % len(others)]):
                    if not _fits(layout, size):
                        continue
                    where = f"{path.name} into {layout} of {size}"
                    state = _state(layout, size, zero=True)
                    try:
                        await checkpointer.load(state, path)
                    except Exception as error:
                        raise AssertionError(where) from error
                    _check(state, layout, size, where)
                    count += 1
                    if saver == "aiodcp" and not (saved_size == str(size) and layout != saved):
                        state = _state(layout, size, zero=True)
                        dcp.load(state, checkpoint_id=path)
                        _check(state, layout, size, f"dcp.load: {where}")
        return count

    logging.disable(logging.WARNING)  # DCP's, about the version of its own files
    try:
        return asyncio.run(main())
    finally:
        logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def saved(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for size in SIZES:
        world.run(size, _save_all, folder)
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_every_layout_of_every_world_is_loaded_into_this_one(world: World, saved: Path, size: int) -> None:
    counts = world.run(size, _load_all, saved)
    assert counts[0] >= 44
    assert len(set(counts)) == 1


def _parallel_model(size: int) -> torch.nn.Module:
    """FSDP2 over tensor parallel: columns that both shard have the placement `_StridedShard`."""
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.ReLU(), torch.nn.Linear(12, 8))
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    return model


def _save_parallel(rank: int, size: int, path: Path) -> dict[str, torch.Tensor]:
    async def main() -> dict[str, torch.Tensor]:
        model = _parallel_model(size)
        async with Checkpointer() as checkpointer:
            await (await checkpointer.save({"model": model}, path)).uploaded
            whole = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            await checkpointer.load({"model": model}, path)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor.full_tensor(), whole[name]), name
        assert any("Strided" in str(tensor.placements) for tensor in model.state_dict().values())
        again = {"model": {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}}
        dcp.load(again, checkpoint_id=path)
        for name, tensor in again["model"].items():
            assert isinstance(tensor, DTensor)
            assert torch.equal(tensor.full_tensor(), whole[name]), name
        return {name: tensor.detach() for name, tensor in whole.items()}

    return asyncio.run(main())


async def test_a_model_under_fsdp_and_tensor_parallel_is_loaded_by_one_process(world: World, tmp_path: Path) -> None:
    whole = (await asyncio.to_thread(world.run, 4, _save_parallel, tmp_path / "ckpt"))[0]
    target = {"model": {name: torch.zeros_like(tensor) for name, tensor in whole.items()}}
    async with Checkpointer() as checkpointer:
        await checkpointer.load(target, tmp_path / "ckpt")
    for name, tensor in target["model"].items():
        assert torch.equal(tensor, whole[name]), name
