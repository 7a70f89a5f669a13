"""Several ranks: agreement, failures, deadlines, death."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from aiodcp import Checkpointer, CheckpointError, LocalStorage, RankError
from aiodcp._distributed import operation
from aiodcp._distributed.channel import Channel
from aiodcp._save import plan_cache
from aiodcp._save.staging import Staging
from aiodcp.checkpointer.checkpointer import session_of
from aiodcp.testing import Gate

from ..support.broken_files import BrokenFiles
from ..support.ranks import Killed, World, rank_test
from ..support.states import assert_equal, blank, make_state


def _save_and_load(rank: int, size: int, path: Path) -> list[str]:
    async def main() -> None:
        state = make_state(3)
        async with Checkpointer() as checkpointer:
            for _ in range(3):
                ckpt = await checkpointer.save(state, path)
                await ckpt.staged
                await ckpt.uploaded
            target = blank(state)
            await checkpointer.load(target, path)
            assert_equal(state, target)

    asyncio.run(main())
    return sorted(os.listdir(path))


@pytest.mark.parametrize("size", [2, 3, 4])
def test_replicated_state_is_saved_once(world: World, tmp_path: Path, size: int) -> None:
    names = world.run(size, _save_and_load, tmp_path / "ckpt")[0]
    assert names[0] == ".metadata"
    assert len(names) == 1 + size


@pytest.mark.parametrize("delay_s", [0.0, 0.04])
def test_a_later_save_takes_three_round_trips_over_any_link(world: World, tmp_path: Path, delay_s: float) -> None:
    for counted in world.run(2, _count_messages, tmp_path, delay_s):
        assert min(counted) == 6  # a gather and a broadcast each: captured, written, committed
        assert max(counted) == 6 or delay_s  # over a link what takes longer than a round trip costs one more


def _count_messages(rank: int, size: int, folder: Path, delay_s: float) -> list[int]:
    """Return how many messages each save after the first took, if each took so long."""

    class Slow(LocalStorage):
        @asynccontextmanager
        async def create(self, checkpoint_id: str, name: str) -> AsyncIterator[Any]:
            async with super().create(checkpoint_id, name) as writer:
                yield writer
                await asyncio.sleep(delay_s)

    async def main() -> list[int]:
        real, counted = Channel._finish, []

        async def slow(self: Channel, collective: Any, arguments: tuple[Any, ...], nbytes: int) -> None:
            await asyncio.sleep(delay_s)
            await real(self, collective, arguments, nbytes)

        async with Checkpointer(storage=Slow()) as checkpointer:
            state = {"w": torch.zeros(1000), "n": 3}
            await (await checkpointer.save(state, folder / "0")).uploaded
            channel = session_of(checkpointer).flows.channel
            assert channel is not None
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Channel, "_finish", slow)
                if not delay_s:  # a machine may take longer to write than until the first beat
                    patch.setattr(operation, "FIRST_HEARTBEAT_S", 10.0)
                for number in range(25):
                    before = channel.messages
                    await (await checkpointer.save(state, folder / str(number))).uploaded
                    counted.append(channel.messages - before)
        return counted[20:]

    return asyncio.run(main())


@rank_test(3)
async def test_what_ranks_tell_each_other_in_a_first_save_and_in_a_load(rank: int, size: int, folder: Path) -> None:
    state = {"w": torch.zeros(1000), "n": 3}
    counted: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operation, "FIRST_HEARTBEAT_S", 10.0)  # a machine may take longer than until a beat
        async with Checkpointer() as checkpointer:
            channel = session_of(checkpointer).flows.channel
            assert channel is not None
            counted.append(channel.messages)
            await (await checkpointer.save(state, folder)).uploaded
            counted.append(channel.messages)
            await checkpointer.load(state, folder)
            counted.append(channel.messages)
    entered, saved, loaded = counted
    assert saved - entered == 4 * 2 + 3  # captured, planned, written, committed; plans up and down, places of values
    assert loaded - saved == 4 * 2 + 1  # found, planned, values, tensors; the metadata


class UnpicklableError(Exception):
    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class Stateful:
    def __init__(self, state: dict[str, Any], error: Exception | None) -> None:
        self.state, self.error = state, error

    def state_dict(self) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


def _no_space(call: str) -> None:
    if call == "write":
        raise OSError(errno.ENOSPC, "No space left on device")


def _no_put(call: str) -> None:
    if call == "put":
        raise OSError(errno.EDQUOT, "Disk quota exceeded")


def _uncopyable(*_: object) -> None:
    raise RuntimeError("the copy engine is on fire")


def _unplannable(taken: Any, *options: Any) -> Any:
    raise UnpicklableError


FAULTS = {
    "state_dict": ("capture", "CaptureError", "state_dict() of Stateful raised"),
    "unpicklable": ("capture", "CaptureError", "holds a lock"),
    "argument": ("capture", "ArgumentError", "must be a str or os.PathLike, got int"),
    "plan": ("capture", "SaveError", "planning failed"),
    "long plan": ("capture", "SaveError", "more than can be sent"),
    "stage": ("write", "StageError", "on fire"),
    "write": ("write", "WriteError", "No space left on device"),
    "metadata": ("commit", "WriteError", "Disk quota exceeded"),
}


async def _save_with(fault: str, checkpointer: Checkpointer, storage: BrokenFiles, state: Any, path: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        error: Exception | None = None
        if fault == "state_dict":
            error = ValueError("no state today")
        elif fault == "unpicklable":
            error = UnpicklableError()
        elif fault == "argument":
            path = 3
        elif fault == "plan":
            patch.setattr(plan_cache, "plan_local", _unplannable)
        elif fault == "long plan":
            patch.setattr(plan_cache, "LONGEST_PLAN_NBYTES", 10)
        elif fault == "stage":
            patch.setattr(Staging, "copy", _uncopyable)
        elif fault == "write":
            storage.fault = _no_space
        elif fault == "metadata":
            storage.fault = _no_put
        try:
            ckpt = await checkpointer.save({"app": Stateful(state, error)}, path)
            await ckpt.uploaded
        finally:
            storage.fault = lambda call: None


@rank_test(3)
async def test_an_error_on_one_rank_in_any_phase_is_reported_on_all_and_nothing_is_committed(
    rank: int, size: int, folder: Path
) -> None:
    storage = BrokenFiles()
    state = {"w": torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), "v": torch.zeros(5), "n": 1}
    async with Checkpointer(storage=storage) as checkpointer:
        for number, (fault, (phase, kind, text)) in enumerate(FAULTS.items()):
            path = folder / fault
            await (await checkpointer.save({"app": Stateful(state, None)}, path)).uploaded
            dist.barrier()
            before = sorted(os.listdir(path))
            failing = {1, 2} if fault == "write" else {0} if fault == "metadata" else {number % size}
            changed = state | ({"new": torch.zeros(2)} if "plan" in fault else {})
            began = time.monotonic()
            with pytest.raises(CheckpointError) as caught:
                await _save_with(fault if rank in failing else "", checkpointer, storage, changed, path)
            assert time.monotonic() - began < 10
            error = caught.value
            if isinstance(error, RankError):
                assert error.phase == phase
                assert {each.rank for each in error.failures} == failing, fault
                assert {each.kind for each in error.failures} == {kind}
                assert all(text in each.text and "Traceback" in each.traceback for each in error.failures)
                assert not error.missing
                assert all(f"rank {each}" in str(error) and text in str(error) for each in failing)
                assert (error.__cause__ is not None) == (rank in failing), (fault, error.__cause__)
            else:
                assert rank in failing
                assert type(error).__name__ == kind
            dist.barrier()
            assert sorted(os.listdir(path)) == before, fault
            await (await checkpointer.save({"app": Stateful(state, None)}, path)).uploaded
            target = Stateful(blank(state), None)
            await checkpointer.load({"app": target}, path)
            assert_equal(state, target.state)


@rank_test(3)
async def test_a_failure_stops_the_writing_of_the_others(rank: int, size: int, tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    storage = BrokenFiles()
    gate = Gate("write")
    if rank == 1:
        storage.fault = _no_space
    else:
        storage.fault = gate  # never opened: only being stopped ends it
    state = {f"w{n}": torch.ones(1000) for n in range(size)}
    async with Checkpointer(storage=storage) as checkpointer:
        with pytest.raises(RankError, match="rank 1: WriteError"):
            await (await checkpointer.save(state, path)).uploaded
        storage.fault = lambda call: None
        await (await checkpointer.save(state, path)).uploaded


@rank_test(3)
async def test_at_the_deadline_the_rank_that_is_not_done_is_named_and_the_next_save_works(
    rank: int, size: int, tmp_path: Path
) -> None:
    path = tmp_path / "ckpt"
    storage = BrokenFiles()
    state = {f"w{n}": torch.ones(1000) for n in range(size)}
    async with Checkpointer(storage=storage, timeout=1.5) as checkpointer:
        await (await checkpointer.save(state, path)).uploaded
        stuck = threading.Event()
        if rank == 1:  # in a thread that cannot be interrupted, as a hung file system holds one
            storage.fault = lambda call: asyncio.to_thread(stuck.wait, 30) if call == "write" else None
        ckpt = await checkpointer.save(state, path)
        with pytest.raises(RankError) as caught:
            await ckpt.uploaded
        assert caught.value.missing == (1,)
        assert caught.value.phase == "write"
        assert not stuck.is_set()
        stuck.set()
        storage.fault = lambda call: None
        await (await checkpointer.save(state, path)).uploaded
        target = blank(state)
        await checkpointer.load(target, path)
        assert_equal(state, target)


def _come_late(rank: int, size: int, path: Path, late: int) -> None:
    async def main() -> None:
        state = {f"w{n}": torch.ones(1000) for n in range(size)}
        async with Checkpointer(timeout=1.0) as checkpointer:
            await (await checkpointer.save(state, path)).uploaded
            if rank == late:
                others = Path(f"{path}-others")
                while len(os.listdir(others)) < size - 1:
                    await asyncio.sleep(0.01)
            with pytest.raises(RankError) as caught:
                await (await checkpointer.save(state, path)).uploaded
            assert caught.value.missing == (late,)
            Path(f"{path}-others", str(rank)).touch()
            await (await checkpointer.save(state, path)).uploaded
            target = blank(state)
            await checkpointer.load(target, path)
            assert_equal(state, target)

    os.makedirs(f"{path}-others", exist_ok=True)
    dist.barrier()
    asyncio.run(main())


@pytest.mark.parametrize("late", [0, 2])
def test_a_rank_that_comes_too_late_is_named_and_joins_the_next_save(world: World, tmp_path: Path, late: int) -> None:
    world.run(3, _come_late, tmp_path / "ckpt", late)


def _be_killed(rank: int, size: int, path: Path, victim: int, moment: str) -> Any:
    async def main() -> Any:
        storage = BrokenFiles()
        state = {f"w{n}": torch.full((1000,), 1.0) for n in range(size)}
        async with Checkpointer(storage=storage) as checkpointer:
            await (await checkpointer.save(state, path)).uploaded
            dist.barrier()

            def die(call: str) -> None:
                if call == moment:
                    os.kill(os.getpid(), signal.SIGKILL)

            if rank == victim:
                storage.fault = die
            changed = {f"w{n}": torch.full((1000,), 2.0) for n in range(size)}
            began = time.monotonic()
            with pytest.raises(RankError) as caught:
                await (await checkpointer.save(changed, path)).uploaded
            return caught.value.missing, time.monotonic() - began

    return asyncio.run(main())


def _load_after_death(rank: int, size: int, path: Path) -> float:
    async def main() -> float:
        state = {f"w{n}": torch.zeros(1000) for n in range(4)}
        async with Checkpointer() as checkpointer:
            await checkpointer.load(state, path)
        [value] = {float(each) for tensor in state.values() for each in tensor}
        return value

    return asyncio.run(main())


@pytest.mark.parametrize(("victim", "moment"), [(2, "write"), (0, "put"), (0, "sync")])
def test_a_killed_rank_is_named_by_the_survivors_and_the_old_checkpoint_stays(
    world: World, tmp_path: Path, victim: int, moment: str
) -> None:
    results = world.run(4, _be_killed, tmp_path / "ckpt", victim, moment, killed=True)
    assert isinstance(results.pop(victim), Killed)
    for missing, seconds in results:
        assert missing == (victim,)
        assert seconds < 30
    if moment == "put":  # it might have been killed a moment later: the data that the commit names is not removed
        assert len(list((tmp_path / "ckpt").glob("*.distcp"))) == 8
    assert world.run(2, _load_after_death, tmp_path / "ckpt") == [1.0, 1.0]
