"""What several ranks want alike leaves storage once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from aiodcp import Checkpointer, PerRank, RankError, Storage
from aiodcp._distributed.relay import Relay
from aiodcp._load.routes import Routes

from ..support.counting_storage import CountingStorage
from ..support.object_servers import S3Server
from ..support.ranks import Killed, World, rank_test
from ..support.states import assert_equal, blank

LARGE = 5 << 20  # elements of a tensor that is read in windows: 20 MiB


def make_state(rank: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    tied = torch.randn(700_000, generator=generator)
    return {
        "large": torch.randn(LARGE, generator=generator),
        "turned": torch.randn(900, 1100, generator=generator).t(),
        "half": torch.randn(300_000, generator=generator).bfloat16(),
        **{f"small{n}": torch.randn(50 + n, generator=generator) for n in range(200)},
        "tied": tied,
        "tied too": tied,
        "step": 7,
        "own": PerRank(torch.full((100,), float(rank))),
    }


def make_target() -> dict[str, Any]:
    target: dict[str, Any] = blank(make_state(0)) | {"own": PerRank(torch.zeros(100))}
    target["tied too"] = target["tied"]
    return target


def assert_loaded(rank: int, target: dict[str, Any]) -> None:
    state = make_state(rank)
    assert_equal(state.pop("own").value, target["own"].value)
    assert_equal(state, {name: value for name, value in target.items() if name != "own"})


def total(nbytes: int) -> int:
    """Return the sum over all ranks."""
    number = torch.tensor([nbytes])
    dist.all_reduce(number)
    return int(number)


async def load_and_count(target: dict[str, Any], path: Path, **options: Any) -> int:
    """Load on all ranks, and return how many bytes they have read together."""
    storage = CountingStorage()
    async with Checkpointer(storage=storage, share_reads=True, **options) as checkpointer:
        await checkpointer.load(target, path)
    return total(storage.nbytes)


@rank_test(3)
async def test_replicas_read_once(rank: int, size: int, tmp_path: Path) -> None:
    state = make_state(rank)
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, tmp_path / "ckpt")).uploaded
    dcp.save({"w": state["large"]}, checkpoint_id=tmp_path / "dcp")  # archives of torch.save
    stored = sum(file.stat().st_size for file in (tmp_path / "ckpt").iterdir())
    target = make_target()
    nbytes = await load_and_count(target, tmp_path / "ckpt")
    assert 0.9 * stored < nbytes < 1.1 * stored, (nbytes, stored)
    assert_loaded(rank, target)
    target = {"w": torch.zeros(LARGE)}
    assert await load_and_count(target, tmp_path / "dcp") < 1.1 * state["large"].nbytes
    assert torch.equal(target["w"], state["large"])
    async with Checkpointer(storage=(storage := CountingStorage())) as checkpointer:  # as it is without being asked
        await checkpointer.load(make_target(), tmp_path / "ckpt")
    assert total(storage.nbytes) > 2.5 * stored


@rank_test(4)
async def test_replicas_of_shards_read_theirs_once(rank: int, size: int, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (2, 2))
    generator = torch.Generator().manual_seed(0)
    whole = {name: torch.randn(1200, 1000, generator=generator) for name in ("rows", "columns", "everywhere")}
    placements: dict[str, list[Placement]] = {
        "rows": [Replicate(), Shard(0)],
        "columns": [Shard(1), Replicate()],
        "everywhere": [Replicate()] * 2,
    }
    state = {name: distribute_tensor(tensor, mesh, placements[name]) for name, tensor in whole.items()}
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, tmp_path)).uploaded
    target = {name: distribute_tensor(torch.zeros(1200, 1000), mesh, placements[name]) for name in whole}
    nbytes = await load_and_count(target, tmp_path)
    for name, tensor in whole.items():
        assert torch.equal(target[name].full_tensor(), tensor), name
    assert nbytes < 1.1 * sum(tensor.nbytes for tensor in whole.values())
    # Other ranks than those that saved, with other shards: parts of chunks are read together, too.
    other = {name: distribute_tensor(torch.zeros(1200, 1000), mesh, [Shard(0), Replicate()]) for name in whole}
    await load_and_count(other, tmp_path)
    for name, tensor in whole.items():
        assert torch.equal(other[name].full_tensor(), tensor), name


@rank_test(2)
async def test_shards_of_archives_are_each_ranks_own(rank: int, size: int, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (size,))
    whole = torch.arange(2048 * 1024, dtype=torch.float32).reshape(2048, 1024)
    if rank == 0:
        dcp.save({"w": whole}, checkpoint_id=tmp_path, no_dist=True)
    dist.barrier()
    target = {"w": distribute_tensor(torch.zeros_like(whole), mesh, [Shard(0)])}
    nbytes = await load_and_count(target, tmp_path)
    assert torch.equal(target["w"].to_local(), whole.chunk(size)[rank])
    assert nbytes < 1.1 * whole.nbytes


@rank_test(2)
async def test_bytes_that_one_rank_wants_twice_are_right(rank: int, size: int, tmp_path: Path) -> None:
    w, v = (torch.randn(LARGE, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    state = {"a": w, "b": w, "c": v, "d": v}
    if rank == 0:
        torch.save(state, tmp_path / "state.pt")
    dist.barrier()
    target = {name: torch.zeros(LARGE) for name in ("abc", "acd")[rank]}
    async with Checkpointer(share_reads=True) as checkpointer:
        await checkpointer.load(target, tmp_path / "state.pt", strict=False)
    assert all(torch.equal(tensor, state[name]) for name, tensor in target.items())


@rank_test(3)
async def test_ranks_that_cannot_connect_or_disagree_fail_and_the_next_load_works(
    rank: int, size: int, tmp_path: Path
) -> None:
    state = make_state(rank)

    async def refuse(relay: Relay) -> None:
        raise OSError(24, "Too many open files")

    def others(routes: Routes) -> list[tuple[str, int, int]]:
        return [("another", 0, 1)]

    async with Checkpointer(share_reads=True, timeout=60) as checkpointer:
        await (await checkpointer.save(state, tmp_path)).uploaded
        for where, name, fault, said in (
            (Relay, "connect", refuse, "rank 1: ReadError: .*Too many open files"),
            (Routes, "fetches", others, "rank 1: LoadError: the ranks disagree on what they read together"),
        ):
            with pytest.MonkeyPatch.context() as patch:
                if rank == 1:
                    patch.setattr(where, name, fault)
                with pytest.raises(RankError, match=said):
                    await checkpointer.load(make_target(), tmp_path)
            target = make_target()
            await checkpointer.load(target, tmp_path)
            assert_loaded(rank, target)


class Failing(CountingStorage):
    """Fails, or worse, when a rank has read some bytes of a tensor."""

    def __init__(self, fault: Any) -> None:
        super().__init__()
        self.fault = fault

    @asynccontextmanager
    async def open(self, checkpoint_id: str, name: str) -> AsyncIterator[Any]:
        async with super().open(checkpoint_id, name) as reader:
            there, fault = reader.read_into, self.fault

            async def read_into(offset: int, buffers: Any) -> None:
                if sum(memoryview(each).nbytes for each in buffers) > 1 << 20:
                    fault()
                await there(offset, buffers)

            reader.read_into = read_into
            yield reader


@rank_test(3)
async def test_a_reader_that_fails_fails_all_and_the_next_load_works(rank: int, size: int, tmp_path: Path) -> None:
    state = make_state(rank)
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, tmp_path)).uploaded

    def fail() -> None:
        if rank == 1:
            raise OSError(5, "Input/output error")

    storage = Failing(fail)
    async with Checkpointer(storage=storage, share_reads=True) as checkpointer:
        with pytest.raises(RankError, match="rank 1: ReadError") as caught:
            await checkpointer.load(make_target(), tmp_path)
        assert {failure.rank for failure in caught.value.failures} == {1}
        storage.fault = lambda: None
        target = make_target()
        await checkpointer.load(target, tmp_path)
    assert_loaded(rank, target)


def _be_killed(rank: int, size: int, path: Path) -> tuple[int, ...]:
    async def main() -> tuple[int, ...]:
        state = make_state(rank)
        async with Checkpointer() as checkpointer:
            await (await checkpointer.save(state, path)).uploaded
        storage: Storage = Failing(lambda: os.kill(os.getpid(), signal.SIGKILL) if rank == 2 else None)
        # For as long gloo's threads of the others spin: these processes run other tests.
        async with Checkpointer(storage=storage, share_reads=True, timeout=10) as checkpointer:
            with pytest.raises(RankError) as caught:
                await checkpointer.load(make_target(), path)
        return tuple(caught.value.missing)

    return asyncio.run(main())


def test_a_reader_that_dies_is_named(world: World, tmp_path: Path) -> None:
    results = world.run(3, _be_killed, tmp_path, killed=True)
    assert isinstance(results[2], Killed)
    assert results[:2] == [(2,), (2,)]


def _load_from_store(rank: int, size: int, url: str, environment: dict[str, str]) -> list[int]:
    fetched: list[int] = []
    real = Relay.fetch

    async def fetch(relay: Relay, number: int, memory: torch.Tensor, read: Any) -> None:
        await real(relay, number, memory, read)
        fetched.append(memory.nbytes)

    async def main() -> None:
        state = {f"w{n}": torch.randn(500_000, generator=torch.Generator().manual_seed(n)) for n in range(4)}
        async with Checkpointer() as checkpointer:
            await (await checkpointer.save(state, url)).uploaded
            target = blank(state)
            await checkpointer.load(target, url)
        assert_equal(state, target)

    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.setattr(Relay, "fetch", fetch)
        asyncio.run(main())
    return fetched


def test_from_object_stores_ranks_read_together_without_being_asked(world: World, s3: S3Server) -> None:
    for fetched in world.run(2, _load_from_store, s3.url(), {**s3.environment, "AWS_ALLOW_HTTP": "true"}):
        assert sum(fetched) >= 4 * 4 * 500_000
