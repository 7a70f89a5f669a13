"""Ranks that do not do the same: they come back into step, and nothing of two steps is ever saved as one."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from aiodcp import Checkpointer, CheckpointError, PerRank, RankError, SaveCancelled, SaveError
from aiodcp._distributed.channel import Channel, ChannelBrokenError

from ..support.broken_files import BrokenFiles
from ..support.ranks import World, rank_test

CALLS_BEHIND = 10  # at most, in these tests


def _state(rank: int, step: int) -> dict[str, Any]:
    """Each rank has a tensor of its own, so that a checkpoint tells which step every rank gave."""
    return {f"w{rank}": torch.full((10,), float(step)), "step": step}


async def _steps(checkpointer: Checkpointer, path: Path, size: int) -> set[float]:
    target: dict[str, Any] = {f"w{rank}": torch.zeros(10) for rank in range(size)} | {"step": 0}
    await checkpointer.load(target, path)
    return {float(each) for rank in range(size) for each in target[f"w{rank}"]} | {float(target["step"])}


async def _save_in_step(checkpointer: Checkpointer, rank: int, size: int, path: Path) -> None:
    """Save until all ranks are in step again, and check what is saved then.

    A rank that is calls behind fails alone until it has caught up. What succeeds does so on all of them, and from then
    on they are in step.
    """
    for attempt in range(CALLS_BEHIND + 1):
        try:
            await (await checkpointer.save(_state(rank, 101), path))
            break
        except CheckpointError:
            assert attempt < CALLS_BEHIND
    await (await checkpointer.save(_state(rank, 103), path))
    assert await _steps(checkpointer, path, size) == {103.0}


class Unprintable:
    def __str__(self) -> str:
        raise ZeroDivisionError


@rank_test(2)
async def test_errors_of_any_kind_and_planners_on_one_rank_only_are_reported_on_all(
    rank: int, size: int, folder: Path
) -> None:
    """Whatever a load raises on one rank, of whatever kind, all ranks hear of it in the same call."""
    async with Checkpointer(timeout=20) as checkpointer:
        await (await checkpointer.save(_state(rank, 1), folder / "latest"))
        endless: dict[str, Any] = {}
        endless["again"] = endless
        unprintable: dict[Any, Any] = {Unprintable(): torch.zeros(1)}
        for wrong in (endless, unprintable):
            with pytest.raises(RankError, match="rank 1: "):
                await checkpointer.load(wrong if rank else _state(rank, 0), folder / "latest", strict=False)
        with pytest.raises(RankError, match="planner: passed on some ranks"):
            await checkpointer.load(
                _state(rank, 0), folder / "latest", strict=False, planner=DefaultLoadPlanner() if rank else None
            )
        for planner in (None, DefaultSavePlanner()):
            with pytest.raises(RankError, match="planner: passed on some ranks"):
                other = None if planner else DefaultSavePlanner()
                await (
                    await checkpointer.save(
                        _state(rank, 7) | {"n": 1}, folder / "p", planner=planner if rank else other
                    )
                )
        assert await _steps(checkpointer, folder / "latest", size) == {1.0}
        await _save_in_step(checkpointer, rank, size, folder / "latest")


@rank_test(2)
def test_skips_and_failures_leave_no_rank_behind(rank: int, size: int, folder: Path) -> None:
    """Fire and forget, with skips that meet failures at different moments on different ranks."""

    async def main() -> None:
        storage = BrokenFiles()
        path = folder / "latest"
        async with Checkpointer(storage=storage, timeout=20) as checkpointer:
            await (await checkpointer.save(_state(rank, 1), path))
            for step in range(2, 30):

                def fail(call: str) -> None:
                    if call == "write" and rank == 1:
                        raise OSError("now and then")

                storage.fault = fail if step % 3 == 0 else lambda call: None
                try:
                    await checkpointer.save(_state(rank, step), path)
                    await asyncio.sleep(0.002 * ((rank + step) % 3))
                    await checkpointer.save(_state(rank, step), path, on_busy="skip")
                except CheckpointError:
                    continue
            storage.fault = lambda call: None
            await _save_in_step(checkpointer, rank, size, path)

    try:
        asyncio.run(main())
    except SaveError as error:  # of a save that nobody awaited
        assert "now and then" in str(error)  # noqa: PT017 - it need not be raised


@rank_test(2)
async def test_a_commit_that_takes_place_after_the_deadline_finds_all_its_data(
    rank: int, size: int, tmp_path: Path
) -> None:
    """The coordinator's commit hangs beyond the deadline, and then takes place after all."""
    path = tmp_path / "ckpt"
    storage = BrokenFiles()
    async with Checkpointer(storage=storage, timeout=1.0) as checkpointer:
        await (await checkpointer.save(_state(rank, 1), path))
        stuck = threading.Event()
        storage.fault = lambda call: asyncio.to_thread(stuck.wait, 30) if call == "put" else None
        with pytest.raises(RankError) as caught:
            await (await checkpointer.save(_state(rank, 2), path))
        assert caught.value.missing == (0,)
        dist.barrier()
        stuck.set()
        storage.fault = lambda call: None
    dist.barrier()  # the block is left when the commit is over
    async with Checkpointer() as checkpointer:
        assert await _steps(checkpointer, path, size) == {2.0}


@rank_test(2)
async def test_two_checkpointers_of_several_ranks_at_one_place_leave_each_others_files_alone(
    rank: int, size: int, tmp_path: Path
) -> None:
    path = tmp_path / "ckpt"
    storage = BrokenFiles()
    written = threading.Event()

    async def hold() -> None:
        await asyncio.to_thread(written.wait, 30)

    async with Checkpointer() as one, Checkpointer(storage=storage) as other:
        storage.fault = lambda call: hold() if call == "sync" and rank == 0 else None
        slow = await other.save(_state(rank, 2), path)
        while rank == 1 and not list(path.glob("__1_*")):
            await asyncio.sleep(0.01)
        dist.barrier()
        await (await one.save(_state(rank, 1), path))
        async with Checkpointer(no_dist=True):
            pass
        dist.barrier()
        written.set()
        await slow
        assert await _steps(other, path, size) == {2.0}


@rank_test(2)
async def test_a_rank_that_is_done_can_still_cancel(rank: int, size: int, folder: Path) -> None:
    storage = BrokenFiles()
    written = threading.Event()
    if rank == 0:
        storage.fault = lambda call: asyncio.to_thread(written.wait, 1) if call == "sync" else None
    async with Checkpointer(storage=storage) as checkpointer:
        ckpt = await checkpointer.save(_state(rank, 1), folder / "ckpt")
        if rank == 1:
            while ckpt.progress.bytes_written < ckpt.progress.bytes_total or not ckpt.progress.bytes_total:
                await asyncio.sleep(0.01)
            ckpt.cancel()  # this rank's part is done, the save is not
            with pytest.raises(SaveCancelled):
                await ckpt
        else:
            with pytest.raises(RankError, match="rank 1: SaveCancelled"):
                await ckpt
        assert not list(folder.glob("ckpt/.metadata"))


class Opaque:
    pass


@rank_test(2)
async def test_a_value_that_is_refused_on_one_rank_leaves_the_tensors_of_all_alone(
    rank: int, size: int, tmp_path: Path
) -> None:
    path = tmp_path / "ckpt"
    async with Checkpointer() as checkpointer:
        state = {"w": torch.ones(3), "own": PerRank(Opaque() if rank else 1)}
        await (await checkpointer.save(state, path))
        target: dict[str, Any] = {"w": torch.zeros(3), "own": PerRank(None)}
        with pytest.raises(RankError, match="rank 1: UnsafeError"):
            await checkpointer.load(target, path)
        assert not target["w"].any()


@rank_test(2)
async def test_after_one_rank_failed_to_open_alone_all_open_together(rank: int, size: int, tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    if rank == 0:
        began = time.monotonic()
        with pytest.raises(RankError, match=r"missing.*rank 1"):
            await Checkpointer(timeout=0.5).__aenter__()
        assert time.monotonic() - began < 15
    dist.barrier()
    async with Checkpointer(timeout=20) as checkpointer:
        await (await checkpointer.save(_state(rank, 1), path))


def _fire_and_forget(rank: int, size: int, folder: Path) -> list[str]:
    """Nobody awaits; one rank hears of a failure first, then to another, and then it is over."""

    async def main() -> list[str]:
        storage = BrokenFiles()
        path = folder / "latest"
        done: list[str] = []
        async with Checkpointer(storage=storage, timeout=20) as checkpointer:

            def fail(call: str) -> None:
                if call == "write":
                    raise OSError("once")

            storage.fault = fail
            first = await checkpointer.save(_state(rank, 1), path)
            while rank == 1 and not first.uploaded.done():
                await asyncio.sleep(0.01)
            if rank == 1:  # rank 0 asks before it is known, this one after
                storage.fault = lambda call: None
            for step in range(2, 8):
                try:
                    await checkpointer.save(_state(rank, step), path)
                    done.append("saved")
                except CheckpointError:
                    done.append("reported")
                storage.fault = lambda call: None
            await _save_in_step(checkpointer, rank, size, path)
        return done

    return asyncio.run(main())


def test_ranks_that_hear_of_a_failure_do_not_fail_each_other_for_ever(world: World, tmp_path: Path) -> None:
    for done in world.run(2, _fire_and_forget, tmp_path):
        assert done[-2:] == ["saved", "saved"]
        assert done.count("reported") <= 2


def _abandon(rank: int, size: int) -> None:
    async def main() -> None:
        assert dist.group.WORLD is not None
        line = Channel(dist.group.WORLD, root=0, timeout_s=600)
        group = await line.connect()
        dist.barrier()
        if rank == 1:  # finds the line broken, and has its end of the group open still
            assert (await line._break()).missing == ()
            dist.barrier()
        else:
            with pytest.raises(ChannelBrokenError):
                await line.gather(torch.zeros(1))
            del line, group
            gc.collect()  # frees what it finds, which must not wait for the collective
            dist.barrier()

    asyncio.run(main())


def test_a_collective_that_was_given_up_holds_nobody_who_frees_its_group(world: World) -> None:
    world.run(2, _abandon)
