"""How ranks connect, and when one that is silent counts as missing."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, HashStore, PrefixStore, TCPStore

from aiodcp import Checkpointer, RankError
from aiodcp._distributed import channel, place
from aiodcp._distributed.address import own_address_towards
from aiodcp._distributed.place import Place
from aiodcp._distributed.stop_agreement import StopAgreement
from aiodcp._distributed.store_pace import pace

from ..support.broken_files import BrokenFiles
from ..support.ranks import Killed, World
from ..support.states import assert_equal, blank


@pytest.fixture
def store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))


def test_the_address_is_the_one_from_which_the_store_is_reached(store: TCPStore) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 1))  # nobody's; sends nothing
        except OSError:
            pytest.skip("this host has no way out")
        own = probe.getsockname()[0]

    class Elsewhere:
        underlying_store = type("Store", (), {"host": "192.0.2.1", "port": 1})()

    assert own_address_towards(Elsewhere()) == own
    assert own_address_towards(PrefixStore("a", PrefixStore("b", store))) is None


def test_loopback_is_an_address_only_where_all_ranks_are_on_one_host(
    store: TCPStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert own_address_towards(store) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert own_address_towards(store) == "127.0.0.1"


def test_a_store_without_an_address_says_nothing(tmp_path: Path) -> None:
    assert own_address_towards(FileStore(str(tmp_path / "store"), 1)) is None
    assert own_address_towards(HashStore()) is None

    class Unknown:
        host, port = "no-such-host.invalid", 1

    assert own_address_towards(Unknown()) is None


OWN_ADDRESS = "127.0.0.7"  # of this test's channels alone


def _connections() -> int:
    """Return how many connections this process has from or to that address."""
    inodes = set()
    for each in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            inodes.add(os.readlink(f"/proc/self/fd/{each}"))
    address = socket.inet_aton(OWN_ADDRESS)[::-1].hex().upper()
    rows = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    ours = [row for row in rows if row[1].startswith(address) or row[2].startswith(address)]
    return sum(row[3] == "01" and f"socket:[{row[9]}]" in inodes for row in ours)


@contextmanager
def _small_blocks() -> Iterator[None]:
    """Have ranks meet in blocks as if they were many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "ONE_BLOCK", 2)
        yield


def _exchange(rank: int, size: int, root: int) -> int:
    async def main() -> int:
        assert dist.group.WORLD is not None
        line = channel.Channel(dist.group.WORLD, root=root, timeout_s=30)
        for _ in range(2):
            table = await line.gather(torch.tensor([[rank, 10 * rank]]))
            assert (table is not None) is (rank == root)
            if table is not None:
                assert table.tolist() == [[[each, 10 * each]] for each in range(size)]
            heard = torch.full((3,), 7 if rank == root else 0)
            await line.broadcast(heard)
            assert heard.tolist() == [7, 7, 7]
            row = torch.zeros(2, dtype=torch.int64)
            await line.scatter(torch.arange(2 * size).reshape(size, 2) if rank == root else None, row)
            assert row.tolist() == [2 * rank, 2 * rank + 1]
        made = _connections()
        dist.barrier()
        line.close()
        return made

    with pytest.MonkeyPatch.context() as patch, _small_blocks():
        patch.setattr(channel, "own_address_towards", lambda store: OWN_ADDRESS)
        return asyncio.run(main())


@pytest.mark.parametrize(("size", "root"), [(5, 0), (6, 4)])
def test_many_ranks_meet_in_blocks_and_few_are_connected_to_many(world: World, size: int, root: int) -> None:
    made = world.run(size, _exchange, root)
    firsts = {root, (root + 3) % size}
    for rank, connections in enumerate(made):
        assert connections <= (3 if rank in firsts else 2)  # of 3 ranks in a block, and 2 blocks


def _save_in_blocks(rank: int, size: int, path: Path, victim: int) -> tuple[int, ...]:
    async def main() -> tuple[int, ...]:
        storage = BrokenFiles()
        state = {f"w{n}": torch.full((1000,), float(n)) for n in range(size)}
        async with Checkpointer(storage=storage, coordinator=1) as checkpointer:
            for _ in range(2):
                await (await checkpointer.save(state, path)).uploaded
            target = blank(state)
            await checkpointer.load(target, path)
            assert_equal(state, target)
            if rank == victim:
                storage.fault = lambda call: os.kill(os.getpid(), signal.SIGKILL)
            with pytest.raises(RankError) as caught:
                await (await checkpointer.save(state, path)).uploaded
            return tuple(caught.value.missing)

    with _small_blocks():
        return asyncio.run(main())


@pytest.mark.parametrize("victim", [4, 0])  # with rank 1 as the root: the first of the second block, and one behind it
def test_a_rank_of_any_block_that_dies_is_named(world: World, tmp_path: Path, victim: int) -> None:
    results = world.run(5, _save_in_blocks, tmp_path, victim, killed=True)
    assert isinstance(results.pop(victim), Killed)
    assert results == [(victim,)] * 4


@pytest.mark.parametrize("root", [0, 7, 4095])
def test_places_of_many_ranks(root: int) -> None:
    size = 4096
    places = [Place.of(rank, size, root) for rank in range(size)]
    assert {each.block_size for each in places} == {64}
    assert [rank for rank, each in enumerate(places) if each.is_first] == sorted(places[0].firsts)
    assert places[root].firsts[0] == places[root].block[0] == root
    for rank, each in enumerate(places):
        assert rank in each.block
        assert each.is_first is (each.block[0] == rank)
        assert each.block[0] in each.firsts
    assert sorted(rank for first in places[0].firsts for rank in places[first].block) == list(range(size))
    table = torch.arange(size)
    assert torch.equal(places[0].by_rank(places[0].by_position(table)), table)


def test_ranks_ask_their_store_no_more_than_so_often_all_together() -> None:
    assert pace(1.0, 2) == pace(1.0, 1024) == 1.0
    assert pace(1.0, 4096) == 4.0
    for ranks in (2, 4096):
        agreement = StopAgreement(store=None, rank=0, size=ranks, root=0)
        assert ranks / agreement.look_s <= 1024


def test_few_ranks_are_one_block_and_the_last_block_may_be_short() -> None:
    assert Place.of(3, 32, 5).block == [*range(5, 32), *range(5)]
    assert Place.of(3, 32, 5).firsts == [5]
    sizes = [len(Place.of(rank, 38, 0).block) for rank in Place.of(0, 38, 0).firsts]
    assert sizes == [7, 7, 7, 7, 7, 3]


def _stop_in_the_middle(rank: int, size: int, path: Path) -> float:
    async def main() -> float:
        storage = BrokenFiles()
        state = {f"w{n}": torch.ones(1000) for n in range(size)}
        async with Checkpointer(storage=storage, timeout=600, heartbeat_timeout=2) as checkpointer:
            await (await checkpointer.save(state, path)).uploaded

            def stop(call: str) -> None:
                if call == "write":
                    storage.fault = lambda call: None
                    os.kill(os.getpid(), signal.SIGSTOP)

            if rank == 1:
                storage.fault = stop
            began = time.monotonic()
            with pytest.raises(RankError) as caught:
                await (await checkpointer.save(state, path)).uploaded
            assert rank == 1 or caught.value.missing == (1,)
            return time.monotonic() - began

    pids = torch.zeros(size, dtype=torch.int64)
    pids[rank] = os.getpid()
    dist.all_reduce(pids)
    try:
        return asyncio.run(main())
    finally:
        if rank == 0:
            os.kill(int(pids[1]), signal.SIGCONT)


def test_a_rank_that_falls_silent_is_missed_long_before_the_limit_for_work(world: World, tmp_path: Path) -> None:
    seconds = world.run(3, _stop_in_the_middle, tmp_path / "ckpt")
    assert max(seconds[0], seconds[2]) < 20
