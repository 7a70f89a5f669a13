"""A caller's own planners, those of DCP's documentation among them."""

from __future__ import annotations

import asyncio
import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from aiodcp import ArgumentError, Checkpointer, LoadError, MemoryStorage, MismatchError, SaveError

from ..support.ranks import World
from ..support.states import assert_equal, blank, make_state


class HalfPlanner(DefaultSavePlanner):
    """Saves float32 as float16. From the documentation of `SavePlanner`, with the dtypes declared."""

    global_plans = 0

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        items = [self._halved(item) if item.type is not WriteItemType.BYTE_IO else item for item in plan.items]
        self.plan = dataclasses.replace(plan, items=items)
        return self.plan

    def _halved(self, item: WriteItem) -> WriteItem:
        data = item.tensor_data
        assert data is not None
        if data.properties.dtype is not torch.float32:
            return item
        properties = dataclasses.replace(data.properties, dtype=torch.float16)
        return dataclasses.replace(item, tensor_data=dataclasses.replace(data, properties=properties))

    def create_global_plan(self, all_plans: list[SavePlan]) -> Any:
        type(self).global_plans += 1
        return super().create_global_plan(all_plans)

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:  # noqa: A002 - DCP's name
        made = super().transform_object(write_item, object)
        return made.half() if isinstance(made, torch.Tensor) and made.dtype is torch.float32 else made


class RenamePlanner(DefaultLoadPlanner):
    """Loads `model.x` from `old.x`."""

    def set_up_planner(self, state_dict: Any, metadata: Any = None, is_coordinator: bool = False) -> None:
        self.original = state_dict["model"]
        super().set_up_planner({"old": state_dict["model"]}, metadata, is_coordinator)

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.original[read_item.dest_index.fqn.removeprefix("old.")] = torch.load(value)


async def test_stock_planners_save_and_load_what_no_planner_does() -> None:
    state = make_state(4)
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        for _ in range(2):
            await (await checkpointer.save(state, "ckpt", planner=DefaultSavePlanner()))
        target = blank(state)
        await checkpointer.load(target, "ckpt")
        assert_equal(state, target)
        target = blank(state)
        await checkpointer.load(target, "ckpt", planner=DefaultLoadPlanner())
        assert_equal(state, target)


def _halve(rank: int, size: int, path: Path) -> None:
    async def main() -> None:
        mesh = init_device_mesh("cpu", (size,))
        whole = torch.arange(12.0).reshape(6, 2)
        state = {
            "old": {
                "w": distribute_tensor(whole, mesh, [Shard(0)]),
                "r": torch.full((3,), 0.5),
                "ids": torch.arange(3),
            },
            "n": 7,
        }
        HalfPlanner.global_plans = 0
        async with Checkpointer() as checkpointer:
            for step in range(3):
                await (await checkpointer.save(state | {"n": step}, path, planner=HalfPlanner()))
            assert HalfPlanner.global_plans == (1 if rank == 0 else 0)
            renamed: dict[str, Any] = {
                "model": {
                    "w": distribute_tensor(torch.zeros(6, 2), mesh, [Shard(1)]),
                    "r": torch.zeros(3, dtype=torch.float16),
                    "ids": torch.zeros(3, dtype=torch.int64),
                }
            }
            await checkpointer.load(renamed, path, planner=RenamePlanner())
            assert torch.equal(renamed["model"]["w"].to_local(), whole.chunk(size, 1)[rank])
            assert torch.equal(renamed["model"]["ids"], torch.arange(3))
            assert renamed["model"]["r"].tolist() == [0.5] * 3
        again: dict[str, Any] = {"old": {"w": torch.zeros(6, 2, dtype=torch.float16)}, "n": None}
        dcp.load(again, checkpoint_id=path)
        assert torch.equal(again["old"]["w"].float(), whole)
        assert again["n"] == 2

    asyncio.run(main())


@pytest.mark.parametrize("size", [1, 2])
def test_a_planner_that_casts_and_one_that_renames(world: World, tmp_path: Path, size: int) -> None:
    world.run(size, _halve, tmp_path / "ckpt")


class Careless(DefaultSavePlanner):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def create_local_plan(self) -> SavePlan:
        if self.fault == "local":
            raise KeyError("lost")
        return super().create_local_plan()

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:  # noqa: A002 - DCP's name
        made = super().transform_object(write_item, object)
        return made.double() if self.fault == "dtype" else made[1:] if self.fault == "shape" else made

    def create_global_plan(self, all_plans: list[SavePlan]) -> Any:
        plans, metadata = super().create_global_plan(all_plans)
        if self.fault == "global":
            index = dataclasses.replace(plans[0].items[0].index, fqn="other")
            plans[0].items[0] = dataclasses.replace(plans[0].items[0], index=index)
        return plans, metadata

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        plan = super().finish_plan(new_plan)
        return SavePlan([]) if self.fault == "finish" else plan


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        ("local", "Careless raised KeyError"),
        ("dtype", r"w: planned as .*float32.*resolved as .*float64"),
        ("shape", r"w: planned as .*\(4,\).*resolved as .*\(3,\)"),
        ("global", "other: the global plan gives rank 0 an item"),
        ("finish", r"Careless\.finish_plan\(\) changed the items"),
    ],
)
async def test_a_planner_that_contradicts_itself_is_named(fault: str, match: str) -> None:
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        with pytest.raises(SaveError, match=match):
            await (await checkpointer.save({"w": torch.ones(4)}, "ckpt", planner=Careless(fault)))
        await (await checkpointer.save({"w": torch.ones(4)}, "ckpt", planner=Careless("")))


class Unfit(DefaultLoadPlanner):
    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        return torch.zeros(1)

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        raise KeyError("nowhere to put it")


async def test_a_load_planner_is_checked_too() -> None:
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        await (await checkpointer.save({"w": torch.ones(4), "one": torch.ones(1)}, "ckpt"))
        with pytest.raises(MismatchError, match=r"w has shape \(4,\) in the load plan, \(1,\) in its target"):
            await checkpointer.load({"w": torch.zeros(4)}, "ckpt", planner=Unfit(allow_partial_load=True))
        with pytest.raises(LoadError, match="nowhere to put it"):
            await checkpointer.load({"one": torch.zeros(1)}, "ckpt", planner=Unfit())
        with pytest.raises(LoadError, match="DefaultLoadPlanner raised"):
            await checkpointer.load({"missing": torch.zeros(1)}, "ckpt", planner=DefaultLoadPlanner())
        with pytest.raises(MismatchError, match=r"torch\.float32 in the checkpoint, torch\.float16"):
            half = {"w": torch.zeros(4, dtype=torch.float16)}
            await checkpointer.load(half, "ckpt", planner=DefaultLoadPlanner())
        await checkpointer.load(half, "ckpt", planner=DefaultLoadPlanner(), cast=True)
        assert half["w"].tolist() == [1.0] * 4
        with pytest.raises(ArgumentError, match="planner"):
            await checkpointer.save(half, "ckpt", planner=DefaultLoadPlanner())  # type: ignore[call-overload]
        with pytest.raises(ArgumentError, match="planner"):
            await checkpointer.load(half, "ckpt", planner=DefaultSavePlanner())  # type: ignore[arg-type]
