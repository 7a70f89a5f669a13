"""Several ranks in the steady state: who writes what, what is exchanged, and who else may use the process."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from aiodcp import (
    ArgumentError,
    BusyError,
    CaptureError,
    Checkpointer,
    MismatchError,
    NotACheckpointError,
    PerRank,
    RankError,
    SaveCancelled,
)
from aiodcp._save import plan_cache, planning
from aiodcp.checkpointer.checkpointer import session_of
from aiodcp.testing import Gate

from ..support.broken_files import BrokenFiles
from ..support.ranks import World, rank_test
from ..support.states import assert_equal, blank


def _bytes_of_each(rank: int, size: int, folder: Path) -> tuple[int, int]:
    """Bytes staged of replicated state, and of replicated state beside a shard that only rank 0 has."""

    async def main() -> tuple[int, int]:
        sizes = [1000] * 60 + [20_000] * 3  # the large ones last: in this order they would fall on full ranks
        replicated = {f"w{n}": torch.ones(size) for n, size in enumerate(sizes)}
        lopsided = replicated | ({"mine": torch.ones(20_000)} if rank == 0 else {})
        async with Checkpointer() as checkpointer:
            found = []
            for number, state in enumerate((replicated, lopsided)):
                ckpt = await checkpointer.save(state, folder / str(number))
                await ckpt
                found.append(ckpt.progress.bytes_staged)
            target = blank(replicated) | {"mine": torch.zeros(20_000)}
            await checkpointer.load(target, folder / "1")
            assert_equal(replicated | {"mine": torch.ones(20_000)}, target)
        return found[0], found[1]

    return asyncio.run(main())


def test_each_rank_stages_its_part_balanced_by_what_it_holds_besides(world: World, tmp_path: Path) -> None:
    results = world.run(4, _bytes_of_each, tmp_path)
    whole = 4 * 120_000
    staged = [each[0] for each in results]
    assert sum(staged) <= 1.1 * whole + 4 * 4096  # and the last block of each file
    assert max(staged) <= 1.1 * sum(staged) / 4
    lopsided = [each[1] for each in results]
    assert lopsided[0] >= 80_000
    assert max(lopsided) <= 1.1 * sum(lopsided) / 4


def _exchanged(rank: int, size: int, folder: Path, count: int) -> tuple[int, int]:
    async def main() -> tuple[int, int]:
        plans = 0
        real = planning.plan_local

        def plan(taken: Any, *options: Any) -> Any:
            nonlocal plans
            plans += 1
            return real(taken, *options)

        state = {f"w{n}": torch.ones(10) for n in range(count)} | {"lr": 0.1}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plan_cache, "plan_local", plan)
            async with Checkpointer() as checkpointer:
                channel = session_of(checkpointer).flows.channel
                assert channel is not None
                await (await checkpointer.save(state, folder / f"{count}"))
                before = channel.nbytes
                for step in range(4):
                    await (await checkpointer.save(state | {"lr": 0.2 + step}, folder / f"{count}"))
                return (channel.nbytes - before) // 4, plans

    return asyncio.run(main())


def test_a_later_save_plans_nothing_and_exchanges_as_much_for_many_tensors_as_for_few(
    world: World, tmp_path: Path
) -> None:
    few = world.run(2, _exchanged, tmp_path, 10)
    many = world.run(2, _exchanged, tmp_path, 3000)
    assert {each[1] for each in few + many} == {1}
    assert max(each[0] for each in few) < 1024
    # A heartbeat more or less on a slow machine is all that may differ.
    assert max(each[0] for each in many) < 4 * 1024


def _change(rank: int, size: int, path: Path) -> list[int]:
    async def main() -> list[int]:
        plans: list[int] = []
        real = planning.plan_local
        base: dict[str, Any] = {"w": torch.arange(6.0), "n": 1}
        mesh = init_device_mesh("cpu", (size,))
        # Each differs from the one before in one thing, on rank 1 only where it can.
        states = [
            base,
            base | ({"extra": torch.ones(3)} if rank == 1 else {}),
            base,
            base | {"w": torch.arange(6.0, dtype=torch.float64)},
            base | {"w": torch.arange(6)},
            base | {"w": distribute_tensor(torch.arange(6.0), mesh, [Shard(0)])},
            base | {"w": distribute_tensor(torch.arange(6.0), mesh, [Replicate()])},
            # Of these two each rank holds the same.
            base | {"w": distribute_tensor(torch.arange(8.0).view(4, 2), mesh, [Shard(0)])},
            base | {"w": distribute_tensor(torch.arange(4.0).view(2, 2), mesh, [Replicate()])},
        ]
        with pytest.MonkeyPatch.context() as patch:

            def plan(taken: Any, *options: Any) -> Any:
                plans[-1] += 1
                return real(taken, *options)

            patch.setattr(plan_cache, "plan_local", plan)
            async with Checkpointer() as checkpointer:
                for state in states:
                    for _ in range(2):
                        plans.append(0)
                        await (await checkpointer.save(state, path))
                    target = {key: _blank(value) for key, value in state.items()}
                    if rank == 0:
                        target["extra"] = torch.zeros(3)
                    target.setdefault("extra", torch.zeros(3))
                    await checkpointer.load(target, path, strict=False)
                    for key, value in state.items():
                        assert _equal(target[key], value), key
        return plans

    return asyncio.run(main())


def _blank(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        with torch.no_grad():
            return value.clone().zero_()
    return None


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, DTensor):
        one, other = one.to_local(), other.to_local()
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def test_a_change_of_structure_on_one_rank_makes_all_plan_anew(world: World, tmp_path: Path) -> None:
    for plans in world.run(2, _change, tmp_path / "ckpt"):
        # The first structure comes back third, and is still known; all others are new.
        assert plans == [1, 0, 1, 0, 0, 0, *[1, 0] * 6]


@rank_test(2)
async def test_training_collectives_run_throughout_fifty_saves_of_two_checkpointers(
    rank: int, size: int, folder: Path
) -> None:
    groups = len(dist.distributed_c10d._world.pg_map)
    threads = set(threading.enumerate())
    states = [{f"w{n}": torch.full((2000,), float(k)) for n in range(8)} for k in range(2)]
    async with Checkpointer() as one, Checkpointer() as other:
        for step in range(25):
            saves = [await one.save(states[0], folder / "0"), await other.save(states[1], folder / "1")]
            for turn in range(10):
                total = torch.tensor([float(rank + step * turn)])
                dist.all_reduce(total)
                assert total[0] == sum(range(size)) + size * step * turn
                await asyncio.sleep(0)
            for ckpt in saves:
                await ckpt
        assert len(dist.distributed_c10d._world.pg_map) == groups
        for k, each in enumerate((other, one)):
            target = blank(states[k])
            await each.load(target, folder / str(k))
            assert_equal(states[k], target)
    for thread in set(threading.enumerate()) - threads:  # connections are still being closed
        thread.join(10.0)
    assert set(threading.enumerate()) <= threads


def _per_rank(rank: int, size: int, path: Path, caplog_path: Path) -> None:
    async def main() -> None:
        class Loader:
            position = 100 + rank

            def state_dict(self) -> dict[str, Any]:
                return {"position": self.position, "seen": torch.full((3,), float(rank))}

            def load_state_dict(self, state: dict[str, Any]) -> None:
                assert torch.equal(state["seen"], torch.full((3,), float(rank)))
                self.position = state["position"]

        def state() -> dict[str, Any]:
            return {
                "rng": PerRank(torch.full((4,), rank, dtype=torch.uint8)),
                "nested": {"counters": [PerRank({"a": rank, "t": torch.full((2,), float(rank))}), torch.ones(1)]},
                "seed": PerRank(1000 + rank),
                "loader": PerRank(Loader()),
                "w": torch.arange(3.0),
            }

        async with Checkpointer() as checkpointer:
            saved = state()
            await (await checkpointer.save(saved, path))
            target = state()
            target["rng"].value.zero_()
            target["nested"]["counters"][0].value["a"] = None
            target["nested"]["counters"][0].value["t"].zero_()
            target["seed"].value = None
            target["loader"].value.position = 0
            target["w"].zero_()
            await checkpointer.load(target, path)
            assert torch.equal(target["rng"].value, saved["rng"].value)
            assert target["nested"]["counters"][0].value["a"] == rank
            assert torch.equal(target["nested"]["counters"][0].value["t"], torch.full((2,), float(rank)))
            assert target["seed"].value == 1000 + rank
            assert target["loader"].value.position == 100 + rank
            assert torch.equal(target["w"], torch.arange(3.0))
            with pytest.raises((MismatchError, RankError), match=r"loader\.rank-1"):  # without PerRank
                await checkpointer.load({"loader": {"rank-0": {"position": 0, "seen": torch.zeros(3)}}}, path)
            with pytest.raises((CaptureError, RankError), match="a PerRank inside"):
                await checkpointer.save({"pair": (PerRank(1), 2)}, path)

    asyncio.run(main())


def test_per_rank_values_come_back_to_their_own_rank(world: World, tmp_path: Path) -> None:
    world.run(3, _per_rank, tmp_path / "ckpt", tmp_path)


def _disagree(rank: int, size: int, path: Path) -> list[str]:
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("aiodcp").addHandler(handler)

    async def main() -> None:
        async with Checkpointer() as checkpointer:
            for step in range(3):
                state = {"rng": torch.tensor([rank + step]), "seed": rank, "same": 3, "w": torch.ones(9)}
                await (await checkpointer.save(state | ({"new": 1} if step == 2 else {}), path))

    try:
        asyncio.run(main())
    finally:
        logging.getLogger("aiodcp").removeHandler(handler)
    return records


def test_ranks_that_disagree_on_a_value_are_warned_once(world: World, tmp_path: Path) -> None:
    first, second = world.run(2, _disagree, tmp_path / "ckpt")
    [warning] = first
    assert "different values of rng (rank " in warning
    assert "'s is saved), seed (rank " in warning
    assert "aiodcp.PerRank" in warning
    assert second == []


def _skip(rank: int, size: int, folder: Path) -> list[str]:
    async def main() -> list[str]:
        storage = BrokenFiles()
        state = {f"w{n}": torch.ones(100) for n in range(size)}
        done: list[str] = []
        async with Checkpointer(storage=storage) as checkpointer:
            for number in range(40):
                gate = Gate("write")
                storage.fault = gate
                ckpt = await checkpointer.save(state, folder / f"{number}")
                if rank == number % size:  # each rank comes to the question at another moment
                    await asyncio.sleep(0.002)
                if number % 4 == 0:
                    gate.open()
                extra = await checkpointer.save(state, folder / f"{number}-extra", on_busy="skip")
                gate.open()
                storage.fault = lambda call: None
                done.append("skipped" if extra is None else "saved")
                await ckpt
                if extra is not None:
                    await extra
            held = await checkpointer.save(state, folder / "held")
            try:
                await (await checkpointer.save(state, folder / "refused", on_busy="raise"))
                done.append("saved")
            except BusyError:
                done.append("refused")
            await held
        return done

    return asyncio.run(main())


def test_all_ranks_skip_the_same_saves(world: World, tmp_path: Path) -> None:
    results = world.run(3, _skip, tmp_path)
    assert results[0] == results[1] == results[2]
    assert results[0].count("skipped") >= 20


def _groups(rank: int, size: int, folder: Path) -> None:
    async def main() -> None:
        halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        state = {"w": torch.full((5,), float(rank // 2)), "v": torch.ones(6)}
        async with Checkpointer(process_group=halves[rank // 2], coordinator=1) as checkpointer:
            await (await checkpointer.save(state, folder / f"half-{rank // 2}"))
            with pytest.raises(RankError, match=f"rank {rank // 2 * 2}: "):
                await (await checkpointer.save({"n": Uncopied() if rank % 2 == 0 else 1}, folder / "never"))
        async with Checkpointer(no_dist=True) as checkpointer:
            if rank == 3:
                await (await checkpointer.save(state, folder / "alone"))
        with pytest.raises(ArgumentError, match="coordinator"):
            await Checkpointer(coordinator=4).__aenter__()
        with pytest.raises(ArgumentError, match="process_group"):
            await Checkpointer(process_group=halves[1 - rank // 2]).__aenter__()

    asyncio.run(main())


class Uncopied:
    def __reduce__(self) -> Any:
        raise TypeError("not today")


def test_a_process_group_a_coordinator_and_no_dist(world: World, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="TypeError"):
        world.run(4, _groups, tmp_path)
    for name, files in (("half-0", 3), ("half-1", 3), ("alone", 2)):
        assert len(os.listdir(tmp_path / name)) == files


@rank_test(2)
async def test_mistakes_are_refused_by_name_on_all_ranks(rank: int, size: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (size,))
    whole = {"w": torch.ones(4)}

    async def refused(state: dict[str, Any], path: Path, match: str) -> None:
        with pytest.raises((RankError, CaptureError), match=match):
            await (await checkpointer.save(state, path))

    async with Checkpointer() as checkpointer:
        await refused(whole, folder / f"own-{rank}", "different checkpoints")
        await refused({"w": torch.ones(4 + rank)}, folder / "a", r"w: rank 0 has .*\(4,\).*rank 1 has .*\(5,\)")
        await refused({"w": torch.ones(4) if rank else 1}, folder / "a", "w: rank 0 has no tensor")
        await refused({"w": DTensor.from_local(torch.ones(4), mesh, [Partial()])}, folder / "a", "redistribute")
        hole = DTensor.from_local(torch.ones(2), mesh, [Shard(0)], shape=torch.Size([9]), stride=(1,))
        await refused({"w": hole}, folder / "a", "its placements imply")
        assert not list(folder.iterdir())
        await (await checkpointer.save(whole, folder / "good"))
        with pytest.raises(RankError, match="different checkpoints"):
            await checkpointer.load(whole, folder / ("good" if rank else "bad"))
        with pytest.raises(NotACheckpointError, match="bad"):
            await checkpointer.load(whole, folder / "bad")
        with pytest.raises(RankError, match="rank 1: MismatchError"):
            target = {"w": torch.zeros(4 + rank)}
            await checkpointer.load(target, folder / "good")
        assert not target["w"].any()  # of no rank was anything changed
        with pytest.raises(RankError, match="out of step"):
            if rank:
                await checkpointer.load(whole, folder / "good")
            else:
                await (await checkpointer.save(whole, folder / "good"))
        await checkpointer.load(whole, folder / "good")


@rank_test(3)
async def test_who_cancels_cancels_for_all(rank: int, size: int, folder: Path) -> None:
    storage = BrokenFiles()
    gate = Gate("write")
    storage.fault = gate
    state = {f"w{n}": torch.ones(100) for n in range(size)}
    async with Checkpointer(storage=storage) as checkpointer:
        ckpt = await checkpointer.save(state, folder / "ckpt")
        if rank == 1:
            await gate.wait_reached()
            ckpt.cancel()
            with pytest.raises(SaveCancelled):
                await ckpt
        else:
            with pytest.raises(RankError, match="rank 1: SaveCancelled"):
                await ckpt
        dist.barrier()
        assert not (folder / "ckpt").exists()
        storage.fault = lambda call: None
        await (await checkpointer.save(state, folder / "ckpt"))


@rank_test(3)
def test_a_rank_that_has_left_is_named(rank: int, size: int, folder: Path) -> None:
    """Rank 1 leaves the block by an error: the others hear of it at their next save."""

    async def main() -> None:
        state = {f"w{n}": torch.ones(100) for n in range(size)}
        async with Checkpointer() as checkpointer:
            await (await checkpointer.save(state, folder / "ckpt"))
            if rank == 1:
                raise ZeroDivisionError
            with pytest.raises(RankError) as caught:
                await (await checkpointer.save(state, folder / "ckpt"))
            assert caught.value.missing == (1,)

    if rank == 1:
        with pytest.raises(ZeroDivisionError):
            asyncio.run(main())
    else:
        asyncio.run(main())


def _read_part(rank: int, size: int, path: Path, saver: str) -> tuple[int, int]:
    """Bytes that a load wants, and bytes that it reads."""
    from aiodcp.storage import local

    read = 0

    async def main() -> int:
        mesh = init_device_mesh("cpu", (size,))
        wholes: dict[str, Any] = {
            f"w{n}": torch.randn(4096, 129, generator=torch.Generator().manual_seed(n)) for n in range(4)
        }
        state: dict[str, Any] = {
            key: torch.zeros(4096, 129) if size == 1 else distribute_tensor(torch.zeros(4096, 129), mesh, [Shard(0)])
            for key in wholes
        }
        async with Checkpointer() as checkpointer:
            if size == 1:
                if saver == "dcp":
                    dcp.save(wholes, checkpoint_id=path)
                else:
                    await (await checkpointer.save(wholes, path))
                return 0
            real = local._LocalReader.read_into

            async def count(self: Any, offset: int, buffers: Any) -> None:
                nonlocal read
                read += sum(buffer.nbytes for buffer in buffers)
                await real(self, offset, buffers)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(local._LocalReader, "read_into", count)
                await checkpointer.load(state, path)
            for key, whole in wholes.items():
                assert torch.equal(state[key].to_local(), whole.chunk(size)[rank])
        return sum(value.to_local().nbytes for value in state.values())

    return asyncio.run(main()), read


@pytest.mark.parametrize("saver", ["aiodcp", "dcp"])
def test_a_load_reads_only_the_rows_that_it_needs(world: World, tmp_path: Path, saver: str) -> None:
    world.run(1, _read_part, tmp_path / "ckpt", saver)
    for wanted, read in world.run(4, _read_part, tmp_path / "ckpt", saver):
        assert wanted <= read <= 1.1 * wanted
