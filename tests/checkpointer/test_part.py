"""Parts that several processes write, and one commits."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import pickle
import signal
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor, zeros

import aiodcp
from aiodcp import (
    ArgumentError,
    Checkpointer,
    CheckpointManager,
    DeadlockError,
    MemoryStorage,
    NotACheckpointError,
    ObjectStorage,
    SaveError,
    Storage,
    WriteError,
)
from aiodcp.testing import FaultyStorage

from ..support.ranks import World, rank_test
from ..support.states import assert_equal, blank, make_state


def storages() -> list[Any]:
    return [pytest.param(MemoryStorage, id="memory"), pytest.param(lambda: None, id="disk")]


@pytest.mark.parametrize("make_storage", storages())
async def test_parts_become_one_checkpoint(tmp_path: Path, make_storage: Any) -> None:
    storage: Storage | None = make_storage()
    place = str(tmp_path / "ckpt")
    states = {name: {name: make_state(number)} for number, name in enumerate(("trainer", "actor", "controller"))}
    async with AsyncExitStack() as stack:
        own = [await stack.enter_async_context(Checkpointer(storage=storage, no_dist=True)) for _ in range(len(states))]
        for round_ in range(2):  # the second replaces the first
            parts = [await each.save_part(state, place) for each, state in zip(own, states.values(), strict=True)]
            tickets = [pickle.loads(pickle.dumps(await part.ticket())) for part in parts]
            if round_ == 0:
                with pytest.raises(NotACheckpointError):
                    await own[0].read_custom_metadata(place)
            await own[2].commit(place, tickets, custom_metadata={"round": round_})
            for part in parts:
                await part.finish(committed=True)
        assert await own[0].read_custom_metadata(place) == {"round": 1}
        whole = states["trainer"] | states["actor"] | states["controller"]
        loaded = blank(whole)
        assert not await own[1].load(loaded, place)
        assert_equal(whole, loaded)
        assert await aiodcp.verify(place, storage=storage) == []
    if storage is None:
        loaded = blank(whole)
        dcp.load(loaded, checkpoint_id=place, no_dist=True)
        assert_equal(whole, loaded)
        assert len(list(Path(place).iterdir())) == 4


async def test_what_is_not_committed_is_removed() -> None:
    storage = MemoryStorage()
    async with Checkpointer(storage=storage, no_dist=True) as checkpointer:
        async with await checkpointer.save_part({"a": torch.ones(9)}, "ckpt") as part:
            await part.staged
            assert await part.ticket() is not None
            assert storage.files["ckpt"]
        assert not storage.files.get("ckpt")
        with pytest.raises(ZeroDivisionError):
            async with await checkpointer.save_part({"a": torch.ones(9)}, "ckpt") as part:
                await part.ticket()
                raise ZeroDivisionError
        assert not storage.files.get("ckpt")
        await (await checkpointer.save({"a": torch.ones(9)}, "ckpt")).uploaded


async def test_one_that_is_committed_and_not_told_so_stays() -> None:
    storage = MemoryStorage()
    async with Checkpointer(storage=storage, no_dist=True) as checkpointer:
        async with await checkpointer.save_part({"a": torch.ones(9)}, "ckpt") as part:
            ticket = await part.ticket()
            assert ticket is not None
            await checkpointer.commit("ckpt", [ticket])
        state = {"a": torch.zeros(9)}
        await checkpointer.load(state, "ckpt")
        assert torch.equal(state["a"], torch.ones(9))


async def test_what_cannot_be_committed_is_named() -> None:
    storage = MemoryStorage()
    async with Checkpointer(storage=storage, no_dist=True) as one, Checkpointer(storage=storage, no_dist=True) as two:
        a, b = await one.save_part({"a": torch.ones(3)}, "ckpt"), await two.save_part({"a": torch.ones(3)}, "ckpt")
        tickets = [await a.ticket(), await b.ticket()]
        assert tickets[0] is not None
        for given, problem in (([], "none"), (tickets, "named 'a'"), ([3], "int")):
            with pytest.raises(ArgumentError, match=problem):
                await one.commit("ckpt", given)  # type: ignore[arg-type]
        with pytest.raises(ArgumentError, match="part of ckpt"):
            await one.commit("elsewhere", [tickets[0]])
        await b.finish(committed=False)
        with pytest.raises(SaveError, match="disappeared"):
            await one.commit("ckpt", [await b.ticket()])  # type: ignore[list-item]
        await one.commit("ckpt", [tickets[0]])
        with pytest.raises(WriteError, match="overwrite=False"):
            await one.commit("ckpt", [tickets[0]], overwrite=False)
        await a.finish(committed=True)


async def test_a_part_that_cannot_be_written_says_so() -> None:
    storage = FaultyStorage()

    def gate(call: str) -> None:
        if call == "write":
            raise OSError(28, "No space left on device")

    storage.gate = gate
    async with Checkpointer(storage=storage, no_dist=True) as checkpointer:
        part = await checkpointer.save_part({"a": torch.ones(3)}, "ckpt")
        with pytest.raises(WriteError, match="No space"):
            await part.ticket()
        with pytest.raises(WriteError, match="No space"):
            await part.finish(committed=False)


async def test_parts_in_an_object_store() -> None:
    pytest.importorskip("obstore")
    storage = ObjectStorage.from_url("memory://parts")
    place = "memory://parts/ckpt"
    async with Checkpointer(storage=storage, no_dist=True) as one, Checkpointer(storage=storage, no_dist=True) as two:
        parts = [
            await one.save_part({"a": torch.ones(5 << 20)}, place),
            await two.save_part({"b": torch.zeros(5 << 20)}, place),
        ]
        tickets = [await part.ticket() for part in parts]
        await one.commit(place, [ticket for ticket in tickets if ticket is not None])
        for part in parts:
            await part.finish(committed=True)
        state = {"a": torch.zeros(5 << 20), "b": torch.ones(5 << 20)}
        await one.load(state, place)
        assert state["a"].all()
        assert not state["b"].any()


def _train(rank: int, size: int, place: str) -> bytes | None:
    """A trainer of several ranks, which writes its part, and is killed after it has handed the ticket over."""

    async def main() -> bytes | None:
        mesh = init_device_mesh("cpu", (size,))
        weights = distribute_tensor(torch.arange(24.0).view(6, 4), mesh, [Shard(0)])
        async with Checkpointer() as checkpointer:
            async with await checkpointer.save_part({"trainer": {"w": weights}}, place) as part:
                ticket = await part.ticket()
                assert (ticket is not None) == (rank == 0)
                part.mark_committed()
            return pickle.dumps(ticket)

    return asyncio.run(main())


def test_a_controller_commits_what_the_ranks_of_a_group_have_written(world: World, tmp_path: Path) -> None:
    place = str(tmp_path / "ckpt")
    ticket = pickle.loads(world.run(2, _train, place)[0])

    async def main() -> None:
        async with Checkpointer(no_dist=True) as checkpointer:
            part = await checkpointer.save_part({"controller": {"step": 7}}, place)
            mine = await part.ticket()
            assert mine is not None
            await checkpointer.commit(place, [mine, ticket])
            await part.finish(committed=True)
            state: dict[str, Any] = {"trainer": {"w": torch.zeros(6, 4)}, "controller": {"step": 0}}
            await checkpointer.load(state, place)
        assert torch.equal(state["trainer"]["w"], torch.arange(24.0).view(6, 4))
        assert state["controller"] == {"step": 7}

    asyncio.run(main())


def _write_and_die(place: str) -> None:
    async def main() -> None:
        async with Checkpointer(no_dist=True) as checkpointer:
            part = await checkpointer.save_part({"a": torch.ones(9)}, place)
            await part.ticket()
            os.kill(os.getpid(), signal.SIGKILL)

    asyncio.run(main())


def test_what_a_killed_process_has_written_is_cleared_up(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as manager:
        manager.save_sync(1, {"n": 1}).uploaded.wait()
        path = manager.path(2)
    process = multiprocessing.get_context("spawn").Process(target=_write_and_die, args=(path,))
    process.start()
    process.join(60)
    assert list(Path(path).glob("*.distcp"))
    with CheckpointManager(tmp_path) as manager:
        manager.save_sync(3, {"n": 3}).uploaded.wait()
        assert manager.steps() == [1, 3]
    assert not Path(path).exists()


@rank_test(2)
async def test_a_rank_that_fails_fails_the_part_of_all(rank: int, size: int, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (size,))
    async with Checkpointer() as checkpointer:
        state: dict[str, Any] = {"w": zeros(4, 4, device_mesh=mesh, placements=[Shard(0)])}
        if rank == 1:
            state["bad"] = lambda: 0
        with pytest.raises((aiodcp.CaptureError, aiodcp.RankError)):
            part = await checkpointer.save_part(state, tmp_path / "ckpt")
            await part.ticket()
        part = await checkpointer.save_part({"w": state["w"]}, tmp_path / "ckpt")
        await part.ticket()
        await part.finish(committed=False)
    torch.distributed.barrier()
    assert not list(tmp_path.glob("ckpt/*.distcp"))


W = torch.zeros(3)


@pytest.mark.parametrize(
    ("one", "other", "problem"),
    [
        ({"a": W}, {"a": {"b": W}}, "'a' is a value in one part, and a dict in another"),
        ({"o": {0: W}}, {"o": {"1": W}}, "'o' is a dict with int keys in one part, and a dict in another"),
        ({"l": [W]}, {"l": {"foo": W}}, "'l' is a list in one part, and a dict in another"),
        ({"a": {"b": W}}, {"a": {"b": W}}, r"two parts have a value named 'a\.b'"),
    ],
)
async def test_parts_that_do_not_fit_together_are_refused(
    one: dict[str, Any], other: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    async with Checkpointer() as a, Checkpointer() as b:
        async with await a.save_part(one, tmp_path / "ckpt") as p, await b.save_part(other, tmp_path / "ckpt") as q:
            tickets = [await p.ticket(), await q.ticket()]
            with pytest.raises(ArgumentError, match=problem):
                await a.commit(tmp_path / "ckpt", [each for each in tickets if each is not None])
    assert not any((tmp_path / "ckpt").glob("*"))


async def test_one_container_may_be_of_several_parts(tmp_path: Path) -> None:
    one, other = {"model": {"a": W, "layers": {0: W}}}, {"model": {"b": W + 1, "layers": {1: W + 2}}}
    async with Checkpointer() as a, Checkpointer() as b:
        async with await a.save_part(one, tmp_path / "ckpt") as p, await b.save_part(other, tmp_path / "ckpt") as q:
            await a.commit(tmp_path / "ckpt", [each for each in (await p.ticket(), await q.ticket()) if each])
            p.mark_committed()
            q.mark_committed()
    async with aiodcp.open(tmp_path / "ckpt") as ckpt:
        found = await ckpt.state_dict()
    assert_equal({"model": {"a": W, "layers": {0: W, 1: W + 2}, "b": W + 1}}, found)


async def test_within_a_part_what_would_wait_for_its_end_is_refused_and_loads_are_not(tmp_path: Path) -> None:
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save({"w": W + 1}, tmp_path / "other")).uploaded
        async with await checkpointer.save_part({"w": W}, tmp_path / "ckpt") as part:
            await part.ticket()
            state = {"w": torch.ones(3)}
            await checkpointer.load(state, tmp_path / "other")
            assert_equal({"w": W + 1}, state)
            assert (await checkpointer.check(state, tmp_path / "other")).refusal is None
            for call in (checkpointer.save, checkpointer.save_part):
                with pytest.raises(DeadlockError, match="leave the block first"):
                    await call(state, tmp_path / "third")
            with pytest.raises(DeadlockError):
                await checkpointer.prepare(state)
        await (await checkpointer.save(state, tmp_path / "third")).uploaded


async def test_a_ticket_that_names_files_that_no_part_has_is_refused(tmp_path: Path) -> None:
    async with Checkpointer() as checkpointer:
        async with await checkpointer.save_part({"w": W}, tmp_path / "ckpt") as part:
            ticket = await part.ticket()
            assert ticket is not None
            wrong: list[Any] = [(5,), ("../../etc/passwd",), (*ticket.files, "x")]
            for files in wrong:
                with pytest.raises(ArgumentError, match="names files that no part has"):
                    await checkpointer.commit(tmp_path / "ckpt", [replace(ticket, files=files)])
