"""A process group's store, used beside the training."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import TCPStore

from aiodcp import Checkpointer, RankError
from aiodcp._distributed.group_store import GroupStore, Rendezvous

from ..support.ranks import rank_test


class Counting:
    """A store that counts the connections which are made to it."""

    def __init__(self, store: Any) -> None:
        self.store = store
        self.connections = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def clone(self) -> Any:
        self.connections += 1
        return self.store.clone()


@pytest.fixture
def shared() -> Counting:
    limit = timedelta(seconds=10)
    return Counting(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit))


def test_who_waits_keeps_nobody_else_waiting(shared: Counting) -> None:
    store = GroupStore(shared, 2).under("ours")
    found: list[bytes] = []
    waiting = threading.Thread(target=lambda: found.append(store.get("late")))
    waiting.start()
    shared.set("theirs", "at once")  # on the connection on which the thread waits
    assert shared.get("theirs") == b"at once"
    assert waiting.is_alive()
    shared.set("ours/late", "here")
    waiting.join(10)
    assert found == [b"here"]
    assert shared.connections == 0


def test_what_is_not_there_in_time_is_an_error(shared: Counting) -> None:
    with pytest.raises(RuntimeError, match="ours/never"):
        GroupStore(shared, 2).under("ours").wait(["never"], timedelta(milliseconds=20))


def test_it_does_what_a_store_does_on_either_connection(shared: Counting) -> None:
    group = GroupStore(shared, 2)
    store = group.under("ours")
    for number in range(2):
        assert store.add(f"count/{number}", 3) == 3
        assert not store.check([f"key/{number}"])
        store.set(f"key/{number}", "value")
        assert store.check([f"key/{number}"])
        assert store.get(f"key/{number}") == b"value"
        assert store.compare_set(f"won/{number}", "", "first") == b"first"
        assert store.compare_set(f"won/{number}", "", "second") == b"first"
        group.take_own_connection()
        for thread in threading.enumerate():
            if thread.name == "aiodcp-ranks":
                thread.join(10)
    group.take_own_connection()
    assert shared.connections == 1
    assert group._connection is not shared


def test_a_store_that_cannot_be_reached_again_is_used_as_it_is(shared: Counting) -> None:
    class Alone(Counting):
        def clone(self) -> Any:
            raise RuntimeError("Connection refused")

    group = GroupStore(Alone(shared.store), 2)
    group._connect()
    group.set("key", "value")
    assert shared.get("key") == b"value"


def test_what_all_ranks_leave_is_fetched_together(shared: Counting) -> None:
    asked: list[tuple[str, ...]] = []

    class Recording(GroupStore):
        def check(self, keys: list[str]) -> bool:
            asked.append(tuple(keys))
            return super().check(keys)

    store = Recording(shared, 3)
    meeting = Rendezvous(store.under("ours"), 1, 3)
    shared.set("ours/0/0", "first")
    shared.set("ours/0/2", "third")
    meeting.set("0/1", "second")
    meeting.wait(["0/0"], timedelta(seconds=10))
    assert [meeting.get(f"0/{rank}") for rank in range(3)] == [b"first", b"second", b"third"]
    assert asked == [("ours/0/0", "ours/0/1", "ours/0/2")]
    shared.set("ours/other", "as it is")
    assert meeting.get("other") == b"as it is"


def test_who_does_not_come_to_a_rendezvous_is_named_by_their_keys(shared: Counting) -> None:
    meeting = Rendezvous(GroupStore(shared, 2).under("ours"), 0, 2)
    meeting.set("0/0", "here")
    with pytest.raises(RuntimeError, match="ours/0/1"):
        meeting.wait(["0/0"], timedelta(milliseconds=20))


@rank_test(4)
async def test_a_rank_that_enters_gets_the_addresses_of_all_others_at_once(
    rank: int, size: int, tmp_path: Path
) -> None:
    fetched: list[int] = []
    get_all = GroupStore.multi_get

    def count(store: GroupStore, keys: list[str]) -> list[bytes]:
        fetched.append(len(keys))
        return get_all(store, keys)

    def refuse(store: GroupStore, key: str) -> bytes:
        raise AssertionError(key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GroupStore, "multi_get", count)
        patch.setattr(GroupStore, "get", refuse)
        async with Checkpointer():
            pass
    assert fetched == [size]


@rank_test(2)
async def test_entering_and_saving_make_no_connection_to_the_store(rank: int, size: int, tmp_path: Path) -> None:
    taken: list[GroupStore] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GroupStore, "take_own_connection", taken.append)
        async with Checkpointer() as checkpointer:
            await (await checkpointer.save({"w": torch.ones(3)}, tmp_path)).uploaded
            await checkpointer.load({"w": torch.zeros(3)}, tmp_path)
            await asyncio.sleep(0)
    assert not taken


@rank_test(2)
async def test_a_store_that_is_gone_at_the_beginning_is_an_error_that_says_so(
    rank: int, size: int, tmp_path: Path
) -> None:
    def refuse(store: GroupStore, key: str, value: int) -> int:
        raise RuntimeError("Connection reset by peer")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GroupStore, "add", refuse)
        with pytest.raises(RankError) as caught:
            async with Checkpointer():
                pass
    assert caught.value.missing == ((0,) if rank else ())  # whose process holds the store
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save({"w": torch.ones(3)}, tmp_path)).uploaded


_LEAVES_A_THREAD = """
import threading, time
from aiodcp._engine.interpreter_exit import finish_at_exit
from aiodcp._engine.threads import start_thread
begun = threading.Event()

def work():
    begun.set()
    time.sleep(0.3)
    print("done", flush=True)

finish_at_exit(start_thread("late", work))
begun.wait()
"""


def test_the_interpreter_waits_for_what_must_not_outlive_it() -> None:
    done = subprocess.run([sys.executable, "-c", _LEAVES_A_THREAD], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
