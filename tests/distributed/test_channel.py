"""How ranks connect, and when one that is silent counts as missing."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, HashStore, PrefixStore, TCPStore

from aiodcp import Checkpointer, RankError
from aiodcp._distributed import channel
from aiodcp._distributed.address import own_address_towards

from ..support.broken_files import BrokenFiles
from ..support.ranks import World


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


def _count_connections(rank: int, size: int, path: Path) -> int:
    async def main() -> int:
        async with Checkpointer() as checkpointer:
            await (await checkpointer.save({"w": torch.ones(10)}, path)).uploaded
            dist.barrier()
            made = _connections()
            dist.barrier()
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(channel, "own_address_towards", lambda store: OWN_ADDRESS)
        return asyncio.run(main())


def test_only_the_coordinator_is_connected_to_every_rank(world: World, tmp_path: Path) -> None:
    size = 6
    made = world.run(size, _count_connections, tmp_path / "ckpt")
    assert made[0] == size - 1
    assert made[-1] <= 2  # a leaf in the tree of a broadcast
    assert all(1 <= each < size - 1 for each in made[1:])


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
