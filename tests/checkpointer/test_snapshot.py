"""What is staged, read before it is uploaded."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from aiodcp import (
    Checkpoint,
    Checkpointer,
    DeadlockError,
    MemoryStorage,
    ObjectStorage,
    RankError,
    SaveError,
    StageError,
)
from aiodcp._engine import host_memory
from aiodcp._engine.host_memory import Arena
from aiodcp.testing import FaultyStorage

from ..support.ranks import rank_test
from ..support.states import assert_equal


class Held(FaultyStorage):
    """Lets nothing be written before `opened` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.opened = threading.Event()
        self.gate = self._wait

    def _wait(self, call: str) -> Awaitable[object] | None:
        return asyncio.to_thread(self.opened.wait, 30.0) if call == "write" else None


def make_state(value: float) -> dict[str, Any]:
    return {
        "w": torch.full((300, 40), value),
        "half": torch.full((7,), value, dtype=torch.bfloat16),
        "scalar": torch.tensor(value),
        "flag": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        "tied": (base := torch.full((5,), value)),
        "same": base,
        "t": torch.arange(6.0).view(2, 3).t(),
        "n": 3,
    }


async def test_it_is_read_while_the_upload_goes_on_and_the_state_changes() -> None:
    storage = Held()
    state = make_state(1.0)
    expected = {name: value.clone() for name, value in state.items() if isinstance(value, torch.Tensor)}
    async with Checkpointer(storage=storage, no_dist=True) as checkpointer:
        ckpt = await checkpointer.save(state, "ckpt")
        async with ckpt.snapshot() as view:
            assert ckpt.staged.done()
            assert not ckpt.uploaded.done()
            state["w"].zero_()
            assert view.keys() == expected.keys()
            assert_equal(expected, {name: view[name] for name in expected})
            assert view.shape("w") == (300, 40)
            storage.opened.set()
            await ckpt.uploaded
            assert_equal(expected["w"], view["w"])
        with pytest.raises(KeyError, match="over"):
            view["w"]
        loaded = {"w": torch.zeros(300, 40)}
        await checkpointer.load(loaded, "ckpt")
    assert_equal(expected["w"], loaded["w"])


async def test_torch_refuses_to_change_it() -> None:
    async with Checkpointer(storage=MemoryStorage(), no_dist=True) as checkpointer:
        ckpt = await checkpointer.save({"w": torch.ones(4)}, "ckpt")
        async with ckpt.snapshot() as view:
            average = torch.zeros(4)
            average.lerp_(view["w"], 0.5)
            assert torch.equal(average, torch.full((4,), 0.5))
            with pytest.raises(RuntimeError, match="inference tensor"):
                view["w"].add_(1)
            with pytest.raises(RuntimeError, match="inference tensor"):
                view["w"].copy_(torch.zeros(4))


async def test_the_next_save_waits_for_the_end_of_the_block() -> None:
    async with Checkpointer(storage=MemoryStorage(), no_dist=True) as checkpointer:
        first = await checkpointer.save(make_state(1.0), "one")
        await first.uploaded
        entered, leave = asyncio.Event(), asyncio.Event()

        async def read() -> None:
            async with first.snapshot() as view:
                entered.set()
                await leave.wait()
                assert torch.equal(view["w"], torch.ones(300, 40))

        reader = asyncio.create_task(read())
        await entered.wait()
        second = await checkpointer.save(make_state(2.0), "two")
        done, _ = await asyncio.wait([asyncio.ensure_future(_staged(second))], timeout=0.2)
        assert not done
        leave.set()
        await reader
        await second.uploaded
        with pytest.raises(SaveError, match="later save has taken"):
            async with first.snapshot():
                pass
        async with second.snapshot() as view:
            assert torch.equal(view["w"], torch.full((300, 40), 2.0))


async def _staged(ckpt: Checkpoint) -> None:
    await ckpt.staged


async def test_with_a_spare_buffer_the_next_save_does_not_wait() -> None:
    async with Checkpointer(storage=MemoryStorage(), no_dist=True, spare_buffer=True) as checkpointer:
        first = await checkpointer.save(make_state(1.0), "one")
        async with first.snapshot() as view:
            for value in (2.0, 3.0):
                await (await checkpointer.save(make_state(value), f"ckpt-{value}")).uploaded
            assert torch.equal(view["w"], torch.ones(300, 40))
        gc.collect()
        assert len([each for each in gc.get_objects() if type(each) is Arena]) == 1


async def test_a_save_inside_the_block_is_refused() -> None:
    async with Checkpointer(storage=MemoryStorage(), no_dist=True) as checkpointer:
        ckpt = await checkpointer.save(make_state(1.0), "one")
        async with ckpt.snapshot():
            with pytest.raises(DeadlockError, match="spare_buffer"):
                await checkpointer.save(make_state(2.0), "two")
            with pytest.raises(DeadlockError):
                await checkpointer.prepare(make_state(2.0))
            await checkpointer.load({"n": 0}, "one")
        await (await checkpointer.save(make_state(2.0), "two")).uploaded


async def test_a_save_that_fails_before_it_is_staged_fails_the_entering(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"v": torch.ones(100)}
    async with Checkpointer(storage=MemoryStorage(), no_dist=True) as checkpointer:
        with monkeypatch.context() as patch:
            patch.setattr(host_memory, "free_nbytes", lambda: 0)
            patch.setattr(host_memory, "SMALL_NBYTES", 0)
            ckpt = await checkpointer.save(state, "ckpt")
            with pytest.raises(StageError):
                async with ckpt.snapshot():
                    pass
        ckpt = await checkpointer.save(state, "ckpt")
        async with ckpt.snapshot() as view:
            assert torch.equal(view["v"], state["v"])


async def test_a_wait_that_is_cancelled_holds_nothing_up() -> None:
    storage = Held()
    storage.opened.set()
    async with Checkpointer(storage=storage, no_dist=True) as checkpointer:
        ckpt = await checkpointer.save(make_state(1.0), "one")

        async def read() -> None:
            async with ckpt.snapshot():
                await asyncio.sleep(60)

        for _ in range(3):
            reader = asyncio.create_task(read())
            await asyncio.sleep(0)
            reader.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reader
        await (await checkpointer.save(make_state(2.0), "two")).uploaded


async def test_memory_that_is_not_kept_lives_as_long_as_it_is_read() -> None:
    async with Checkpointer(storage=MemoryStorage(), no_dist=True, keep_buffers=False) as checkpointer:
        ckpt = await checkpointer.save(make_state(1.0), "one")
        async with ckpt.snapshot() as view:
            await ckpt.uploaded
            assert torch.equal(view["w"], torch.ones(300, 40))
        del view
        gc.collect()
        assert not [each for each in gc.get_objects() if type(each) is Arena]
        with pytest.raises(SaveError, match="given back"):
            async with ckpt.snapshot():
                pass


async def test_bounded_memory_never_has_all_of_it() -> None:
    async with Checkpointer(storage=MemoryStorage(), no_dist=True, max_host_bytes=1 << 20) as checkpointer:
        ckpt = await checkpointer.save({"w": torch.ones(1 << 20)}, "ckpt")
        with pytest.raises(SaveError, match="max_host_bytes"):
            async with ckpt.snapshot():
                pass
        await ckpt.uploaded


def test_without_an_event_loop() -> None:
    with Checkpointer(storage=MemoryStorage(), no_dist=True) as checkpointer:
        ckpt = checkpointer.save_sync({"w": torch.ones(4)}, "ckpt")
        with ckpt.snapshot() as view:
            assert torch.equal(view["w"], torch.ones(4))
            with pytest.raises(DeadlockError):
                checkpointer.save_sync({"w": torch.ones(4)}, "ckpt")
        ckpt.uploaded.wait()


async def test_a_large_tensor_that_a_store_takes_in_pieces_is_whole() -> None:
    pytest.importorskip("obstore")
    storage = ObjectStorage.from_url("memory://snapshot")
    large = torch.arange(float(24 << 20)).view(24, 1 << 20)
    async with Checkpointer(storage=storage, no_dist=True) as checkpointer:
        ckpt = await checkpointer.save({"large": large}, "memory://snapshot/ckpt")
        async with ckpt.snapshot() as view:
            parts = view.parts("large")
            assert len(parts) > 1
            assert torch.equal(view["large"], large)
        await ckpt.uploaded


@rank_test(2)
async def test_each_rank_has_what_it_writes(rank: int, size: int, tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (size,))
    whole = torch.arange(24.0).view(6, 4)
    state = {"w": distribute_tensor(whole, mesh, [Shard(0)]), "a": torch.ones(50), "b": torch.ones(50)}
    async with Checkpointer() as checkpointer:
        ckpt = await checkpointer.save(state, tmp_path)
        async with ckpt.snapshot() as view:
            [part] = view.parts("w")
            assert part.offsets == (3 * rank, 0)
            assert view.shape("w") == (6, 4)
            assert torch.equal(view["w"], whole[3 * rank : 3 * rank + 3])
            held: list[list[str]] = [[], []]
            torch.distributed.all_gather_object(held, list(view))
        assert sorted(held[0] + held[1]) == ["a", "b", "w", "w"]
        await ckpt.uploaded


@rank_test(2)
async def test_a_save_that_one_rank_may_not_make_fails_on_all_at_once(rank: int, size: int, tmp_path: Path) -> None:
    state = {"w": torch.ones(1000)}
    async with Checkpointer(timeout=60) as checkpointer:
        checkpoint = await checkpointer.save(state, tmp_path / "a")
        await checkpoint.uploaded
        if rank == 1:
            async with checkpoint.snapshot():
                with pytest.raises(DeadlockError):
                    await checkpointer.save(state, tmp_path / "b")
        else:
            with pytest.raises(RankError, match="rank 1: DeadlockError"):
                await (await checkpointer.save(state, tmp_path / "b")).uploaded
        await (await checkpointer.save(state, tmp_path / "c")).uploaded
