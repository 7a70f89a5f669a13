import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import aiodcp
from aiodcp import (
    BusyError,
    CaptureError,
    Checkpointer,
    ClosedError,
    LocalStorage,
    MemoryStorage,
    SaveCancelled,
    SaveError,
    StageError,
    WriteError,
)
from aiodcp._engine import host_memory
from aiodcp._format import naming
from aiodcp._format.metadata_reader import read_metadata
from aiodcp._save import commit, plan_cache, planning
from aiodcp._save.bounded_staging import MIN_NBYTES
from aiodcp._save.saver import Saver
from aiodcp.storage import file_io, local
from aiodcp.testing import FaultyStorage, Gate

from ..support.states import assert_equal, blank, make_state


async def load(checkpointer: Checkpointer, like: dict[str, Any], path: str) -> dict[str, Any]:
    target: dict[str, Any] = blank(like)
    await checkpointer.load(target, path)
    return target


@pytest.mark.parametrize("keep_buffers", [True, False])
@pytest.mark.parametrize("storage", [LocalStorage, MemoryStorage])
async def test_a_state_comes_back_bit_for_bit(tmp_path: Path, keep_buffers: bool, storage: Any) -> None:
    async with Checkpointer(storage=storage(), keep_buffers=keep_buffers) as checkpointer:
        for seed in range(3):
            state = make_state(seed)
            checkpoint = await checkpointer.save(state, tmp_path / "ckpt")
            await checkpoint.staged
            await checkpoint.uploaded
            assert_equal(state, await load(checkpointer, state, str(tmp_path / "ckpt")))


async def test_the_state_may_change_once_it_is_staged(tmp_path: Path) -> None:
    storage = FaultyStorage()
    gate = Gate("write")
    storage.gate = gate
    state = make_state(1)
    expected = make_state(1)
    async with Checkpointer(storage=storage) as checkpointer:
        checkpoint = await checkpointer.save(state, "ckpt")
        state["epoch"] = 99  # other values are taken at once
        await checkpoint.staged
        state["model"]["weight"].zero_()
        assert not checkpoint.uploaded.done()
        gate.open()
        await checkpoint.uploaded
        assert_equal(expected, await load(checkpointer, expected, "ckpt"))


async def test_states_of_different_structures_take_turns_on_one_checkpointer() -> None:
    states = [make_state(1), {"only": torch.arange(5)}, {"n": 1}, make_state(2), {"only": torch.arange(6.0)}]
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        for _ in range(2):
            for number, state in enumerate(states):
                await (await checkpointer.save(state, f"ckpt-{number}")).uploaded
        for number, state in enumerate(states):
            assert_equal(state, await load(checkpointer, state, f"ckpt-{number}"))


@pytest.mark.parametrize("change", ["dtype", "shape", "name", "kind", "more"])
async def test_a_changed_structure_is_planned_anew(change: str) -> None:
    before = {"a": torch.ones(3), "b": torch.ones(2, 2), "c": 1}
    after: dict[str, Any] = {
        "dtype": before | {"a": torch.ones(3).double() / 3},
        "shape": before | {"b": torch.ones(4, 1)},
        "name": {"x": before["a"], "b": before["b"], "c": 1},
        "kind": before | {"c": torch.tensor(1)},
        "more": before | {"d": torch.zeros(1)},
    }[change]
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        for state in (before, after, before):
            await (await checkpointer.save(state, "ckpt")).uploaded
            assert_equal(state, await load(checkpointer, state, "ckpt"))


async def test_a_later_save_of_the_same_structure_plans_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    real = planning.plan_local

    def count(taken: Any, *options: Any) -> Any:
        plans.append(taken)
        return real(taken, *options)

    monkeypatch.setattr(plan_cache, "plan_local", count)
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        await checkpointer.prepare(make_state(0))
        for seed in range(3):
            await (await checkpointer.save(make_state(seed), "ckpt")).uploaded
    assert len(plans) == 1


async def test_a_save_lists_its_files_twice_and_not_once_more() -> None:
    """Before the commit and after it: in an object store each is a request that is paid for."""

    class Listed(MemoryStorage):
        count = 0

        async def list_files(self, checkpoint_id: str) -> list[str]:
            self.count += 1
            return await super().list_files(checkpoint_id)

    storage = Listed()
    async with Checkpointer(storage=storage) as checkpointer:
        for number in (1, 2):
            await (await checkpointer.save({"w": torch.ones(3)}, "ckpt")).uploaded
            assert storage.count == 2 * number
    assert len(storage.files["ckpt"]) == 2


async def test_frozen_values_may_grow_from_save_to_save() -> None:
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        for size in (1, 1000, 300_000, 10):
            state = {"w": torch.full((3,), float(size)), "log": "x" * size, "more": list(range(size % 7))}
            await (await checkpointer.save(state, "ckpt")).uploaded
            assert_equal(state, await load(checkpointer, state, "ckpt"))


async def test_only_viewed_bytes_of_tied_expanded_and_strided_tensors_are_saved(tmp_path: Path) -> None:
    base = torch.randn(1000, 1000)
    weight = torch.nn.Parameter(torch.randn(8, 8))
    state = {
        "column": base[:, 3],
        "block": base[10:12, 20:25],
        "transposed": base[:30, :20].t(),
        "expanded": torch.arange(4.0).expand(5, 4),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "embedding": weight,
        "head": weight,
        "conj": torch.randn(4, dtype=torch.complex64).conj(),
        "neg": torch.randn(4, dtype=torch.complex64).conj().imag,
    }
    target = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in state.items()}
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, tmp_path)).uploaded
        await checkpointer.load(target, tmp_path)
    for name, tensor in state.items():
        assert torch.equal(tensor, target[name]), name
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 100_000


# --- one at a time


async def test_saves_take_turns_in_the_order_in_which_they_were_asked_for() -> None:
    storage = FaultyStorage()
    gate = Gate("put")
    storage.gate = gate
    order: list[int] = []
    async with Checkpointer(storage=storage) as checkpointer:

        async def save(number: int) -> None:
            checkpoint = await checkpointer.save({"n": number}, f"ckpt-{number}")
            order.append(number)
            await checkpoint.uploaded
            order.append(-number)

        tasks = []
        for number in (1, 2, 3):
            tasks.append(asyncio.create_task(save(number)))
            await asyncio.sleep(0)
        await gate.wait_reached()
        assert order == [1]
        gate.open()
        await asyncio.gather(*tasks)
    assert order == [1, -1, 2, -2, 3, -3]


async def test_a_save_that_finds_another_in_flight_is_skipped_or_raises_if_asked() -> None:
    storage = FaultyStorage()
    gate = Gate("put")
    storage.gate = gate
    async with Checkpointer(storage=storage) as checkpointer:
        first = await checkpointer.save({"n": 1}, "first")
        assert await checkpointer.save({"n": 2}, "second", on_busy="skip") is None
        with pytest.raises(BusyError, match="first"):
            await checkpointer.save({"n": 2}, "second", on_busy="raise")
        gate.open()
        await first.uploaded
    assert sorted(storage.files) == ["first"]


async def test_giving_up_a_turn_leaves_it_to_the_next() -> None:
    storage = FaultyStorage()
    gate = Gate("put")
    storage.gate = gate
    async with Checkpointer(storage=storage) as checkpointer:
        await checkpointer.save({"n": 1}, "first")
        second = asyncio.create_task(checkpointer.save({"n": 2}, "second"))
        third = asyncio.create_task(checkpointer.save({"n": 3}, "third"))
        await gate.wait_reached()
        second.cancel()
        gate.open()
        await (await third).uploaded
        with pytest.raises(asyncio.CancelledError):
            await second
    assert sorted(storage.files) == ["first", "third"]


class SlowLocks(FaultyStorage):
    """Takes its time to lock, as a network file system does."""

    @asynccontextmanager
    async def lock(self, root: str, *, exclusive: bool, create: bool = True) -> AsyncIterator[bool]:
        await self.enter("lock")
        async with super().lock(root, exclusive=exclusive, create=create) as is_locked:
            yield is_locked


@pytest.mark.parametrize("max_host_bytes", [None, MIN_NBYTES])
async def test_what_is_staged_does_not_wait_for_the_lock_and_what_is_written_does(max_host_bytes: int | None) -> None:
    storage, gate = SlowLocks(), Gate("lock")
    storage.gate = gate
    weights = torch.ones(MIN_NBYTES)
    state = {"w": weights, "n": 1}
    async with Checkpointer(storage=storage, max_host_bytes=max_host_bytes) as checkpointer:
        checkpoint = await checkpointer.save(state, "root/ckpt")
        await gate.wait_reached()
        if max_host_bytes is None:  # else what is staged makes room by being written
            await checkpoint.staged
            weights.zero_()
        assert set(storage.calls) == {"lock"}
        gate.open()
        await checkpoint.uploaded
        target = await load(checkpointer, state, "root/ckpt")
    assert_equal(target["w"], torch.ones(MIN_NBYTES))


@pytest.mark.parametrize("max_host_bytes", [None, MIN_NBYTES])
async def test_a_lock_that_cannot_be_had_fails_the_save_which_leaves_nothing(max_host_bytes: int | None) -> None:
    storage = SlowLocks()

    def fail(call: str) -> None:
        if call == "lock":
            raise OSError(37, "No locks available")

    storage.gate = fail
    async with Checkpointer(storage=storage, max_host_bytes=max_host_bytes) as checkpointer:
        checkpoint = await checkpointer.save({"w": torch.ones(MIN_NBYTES)}, "root/ckpt")
        with pytest.raises(WriteError, match="No locks available"):
            await checkpoint.uploaded
        assert not storage.files.get("root/ckpt")
        storage.gate = lambda call: None
        await (await checkpointer.save({"w": torch.ones(MIN_NBYTES)}, "root/ckpt")).uploaded


# --- failures


@pytest.mark.parametrize("call", ["create", "write", "sync", "put"])
async def test_an_error_of_any_call_fails_the_save_and_the_old_checkpoint_stays(
    call: str, faulty: FaultyStorage
) -> None:
    old, new = make_state(1), make_state(2)

    def fail(name: str) -> None:
        if name == call:
            raise OSError(28, "No space left on device")

    async with Checkpointer(storage=faulty) as checkpointer:
        await (await checkpointer.save(old, "ckpt")).uploaded
        files = dict(faulty.files["ckpt"])
        faulty.gate = fail
        checkpoint = await checkpointer.save(new, "ckpt")
        with pytest.raises(WriteError, match="No space left") as caught:
            await checkpoint.uploaded
        assert isinstance(caught.value.__cause__, OSError)
        assert "ckpt" in caught.value.path
        assert checkpoint.progress.phase == "failed"
        assert faulty.files["ckpt"] == files
        faulty.gate = lambda name: None
        assert_equal(old, await load(checkpointer, old, "ckpt"))
        await (await checkpointer.save(new, "ckpt")).uploaded
        assert_equal(new, await load(checkpointer, new, "ckpt"))
    assert faulty.open_files == 0


async def test_a_real_full_file_fails_the_save_with_the_systems_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    async with Checkpointer() as checkpointer:
        monkeypatch.setattr(os, "pwrite", full)
        checkpoint = await checkpointer.save(make_state(), tmp_path / "ckpt")
        with pytest.raises(WriteError) as caught:
            await checkpoint.uploaded
        assert isinstance(caught.value.__cause__, OSError)
        assert caught.value.__cause__.errno == 28
    assert not (tmp_path / "ckpt").exists()


async def test_a_place_that_cannot_be_made_fails_the_save(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    async with Checkpointer() as checkpointer:
        checkpoint = await checkpointer.save(make_state(), tmp_path / "file" / "ckpt")
        with pytest.raises(WriteError):
            await checkpoint.uploaded


async def test_a_failure_nobody_awaited_is_raised_by_the_next_save(faulty: FaultyStorage) -> None:
    faulty.gate = _fail_put
    async with Checkpointer(storage=faulty) as checkpointer:
        checkpoint = await checkpointer.save({"n": 1}, "ckpt")
        with pytest.raises(WriteError, match="broken"):
            await checkpointer.save({"n": 2}, "ckpt")  # waits for the first and tells of it
        faulty.gate = lambda name: None
        await (await checkpointer.save({"n": 3}, "ckpt")).uploaded
        with pytest.raises(WriteError):
            await checkpoint.uploaded


async def test_a_failure_nobody_awaited_is_raised_on_leaving(faulty: FaultyStorage) -> None:
    faulty.gate = _fail_put
    with pytest.raises(WriteError, match="broken"):
        async with Checkpointer(storage=faulty) as checkpointer:
            await checkpointer.save({"n": 1}, "ckpt")


async def test_a_failure_that_was_awaited_is_not_raised_again(faulty: FaultyStorage) -> None:
    faulty.gate = _fail_put
    async with Checkpointer(storage=faulty) as checkpointer:
        checkpoint = await checkpointer.save({"n": 1}, "ckpt")
        with pytest.raises(WriteError):
            await checkpoint.uploaded


async def test_leaving_by_an_error_drains_the_save_and_adds_its_failure_as_custom_metadata(
    faulty: FaultyStorage,
) -> None:
    gate = Gate("put")
    faulty.gate = gate
    with pytest.raises(ZeroDivisionError):
        async with Checkpointer(storage=faulty) as checkpointer:
            checkpoint = await checkpointer.save({"n": 1}, "ckpt")

            def open_when_reached() -> None:
                gate.reached.wait()
                gate.open()

            threading.Thread(target=open_when_reached).start()
            raise ZeroDivisionError
    checkpoint.uploaded.wait(0)
    assert ".metadata" in faulty.files["ckpt"]

    faulty.gate = _fail_put
    with pytest.raises(ZeroDivisionError) as caught:
        async with Checkpointer(storage=faulty) as checkpointer:
            await checkpointer.save({"n": 1}, "ckpt")
            raise ZeroDivisionError
    assert "broken" in caught.value.__notes__[0]


def _fail_put(name: str) -> None:
    if name == "put":
        raise OSError(30, "broken")


async def test_an_error_while_capturing_changes_nothing_and_the_next_save_works(faulty: FaultyStorage) -> None:
    async with Checkpointer(storage=faulty) as checkpointer:
        with pytest.raises(CaptureError, match=r"a\.lock"):
            await checkpointer.save({"a": {"lock": threading.Lock()}}, "ckpt")
        with pytest.raises(CaptureError, match=r"a\.b.*this name"):
            await (await checkpointer.save({"a.b": 1, "a": {"b": 2}}, "ckpt")).uploaded
        assert faulty.calls == []
        await (await checkpointer.save({"n": 1}, "ckpt")).uploaded


async def test_an_unexpected_error_becomes_one_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    async def surprise(self: Saver, operation: Any, place: int, take: Any, part: Any) -> None:
        await take()
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(Saver, "save", surprise)
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        checkpoint = await checkpointer.save({"n": 1}, "ckpt")
        with pytest.raises(SaveError, match="surprise") as caught:
            await checkpoint.uploaded
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


async def test_leftovers_of_failed_saves_and_of_dcp_are_removed_after_the_commit(tmp_path: Path) -> None:
    for name in ("__0_0.distcp", "__3_deadbeef.distcp", ".metadata.tmp", "notes.txt"):
        (tmp_path / name).write_text("old")
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save({"n": 1}, tmp_path)).uploaded
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 3
    assert ".metadata" in names
    assert "notes.txt" in names


# --- arguments, life and death


async def test_arguments_that_cannot_be_used_are_refused_by_name() -> None:
    with pytest.raises(aiodcp.ArgumentError, match="copy_threads"):
        Checkpointer(copy_threads=0)
    with pytest.raises(aiodcp.ArgumentError, match="share_reads: must be True, False or None, got 'yes'"):
        Checkpointer(share_reads="yes")  # type: ignore[arg-type]
    with pytest.raises(aiodcp.ArgumentError, match="heartbeat_timeout: must be a positive, finite number"):
        Checkpointer(heartbeat_timeout=0)
    with pytest.raises(aiodcp.ArgumentError, match="storage"):
        Checkpointer(storage="a path")  # type: ignore[arg-type]
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        for wrong in ("", 3, None):
            with pytest.raises(aiodcp.ArgumentError, match="checkpoint_id"):
                await checkpointer.save({"n": 1}, wrong)  # type: ignore[arg-type]
        with pytest.raises(aiodcp.ArgumentError, match="on_busy"):
            await checkpointer.save({"n": 1}, "ckpt", on_busy="panic")  # type: ignore[call-overload]


async def test_it_is_used_only_while_it_is_open() -> None:
    checkpointer = Checkpointer(storage=MemoryStorage())
    with pytest.raises(ClosedError):
        await checkpointer.save({"n": 1}, "ckpt")
    async with checkpointer:
        pass
    with pytest.raises(ClosedError):
        await checkpointer.load({}, "ckpt")
    async with checkpointer:  # and may be opened again
        await (await checkpointer.save({"n": 1}, "ckpt")).uploaded


async def test_a_forked_child_is_refused() -> None:
    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        real = os.getpid()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", lambda: real + 1)
            with pytest.raises(ClosedError, match="fork"):
                await checkpointer.save({"n": 1}, "ckpt")


async def test_no_thread_outlives_it_and_memory_stays_put_over_many_saves(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    state = {f"w{n}": torch.randn(1 << 18) for n in range(16)}  # 16 MiB
    sizes = []
    async with Checkpointer() as checkpointer:
        for _ in range(50):
            await (await checkpointer.save(state, tmp_path)).uploaded
            sizes.append(_rss())
    assert set(threading.enumerate()) == before
    assert max(sizes[10:]) - sizes[10] < 4 << 20
    assert len(os.listdir(tmp_path)) == 2


def _rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_torchs_threads_are_left_as_they_were() -> None:
    before = torch.get_num_threads()
    async with Checkpointer(storage=MemoryStorage(), copy_threads=1) as checkpointer:
        await (await checkpointer.save({"w": torch.ones(9)}, "ckpt")).uploaded
        assert torch.get_num_threads() == before
        assert await asyncio.to_thread(torch.get_num_threads) == before


async def test_progress_and_events_tell_of_bytes_and_phases(faulty: FaultyStorage) -> None:
    async with Checkpointer(storage=faulty) as checkpointer:
        checkpoint = await checkpointer.save(make_state(), "ckpt")
        entries = [entry async for entry in checkpoint.events()]
        assert entries[0].phase == "plan"
        assert entries[-1].phase == "done"
        assert {"stage", "write", "commit"} <= {entry.phase for entry in entries}
        total = entries[-1].bytes_total
        assert total > 10_000
        assert entries[-1].bytes_staged == total
        assert entries[-1].bytes_written >= total
        assert checkpoint.progress == entries[-1]
        assert "done" in repr(checkpoint)


async def test_a_cancelled_save_ends_its_events_and_is_no_untold_failure(faulty: FaultyStorage) -> None:
    gate = Gate("write")
    faulty.gate = gate
    async with Checkpointer(storage=faulty) as checkpointer:
        checkpoint = await checkpointer.save(make_state(), "ckpt")
        await gate.wait_reached()
        checkpoint.cancel()
        assert [entry async for entry in checkpoint.events()][-1].phase == "cancelled"
        with pytest.raises(SaveCancelled, match="ckpt"):
            await checkpoint.uploaded
    checkpoint.cancel()  # too late is no error


async def test_a_commit_that_fails_after_its_rename_keeps_the_data_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = make_state(5)
    real = file_io.fsync_directory

    def fail_after_commit(path: str) -> None:
        if (Path(path) / ".metadata").exists():
            raise OSError(30, "Read-only file system")
        real(path)

    monkeypatch.setattr(local, "fsync_directory", fail_after_commit)
    async with Checkpointer() as checkpointer:
        checkpoint = await checkpointer.save(state, tmp_path)
        with pytest.raises(WriteError, match="Read-only"):
            await checkpoint.uploaded
        assert_equal(state, await load(checkpointer, state, str(tmp_path)))


async def test_memory_that_cannot_be_had_is_reported_with_both_numbers_before_anything_is_written(
    faulty: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "free_nbytes", lambda: 1000)
    monkeypatch.setattr(host_memory, "SMALL_NBYTES", 0)
    async with Checkpointer(storage=faulty) as checkpointer:
        checkpoint = await checkpointer.save(make_state(), "ckpt")
        with pytest.raises(StageError, match="only 1000 bytes") as caught:
            await checkpoint.staged
        assert caught.value.nbytes > 10_000
    assert faulty.calls == []


async def test_who_waits_for_a_save_gets_its_failure_and_not_the_next_save(faulty: FaultyStorage) -> None:
    gate = Gate("put")
    faulty.gate = gate
    async with Checkpointer(storage=faulty) as checkpointer:
        checkpoint = await checkpointer.save({"n": 1}, "ckpt")

        async def wait() -> None:
            await checkpoint.uploaded

        waiting = asyncio.create_task(wait())
        next_one = asyncio.create_task(checkpointer.save({"n": 2}, "ckpt"))
        await gate.wait_reached()
        faulty.fail_once = OSError(30, "broken")
        gate.open()
        with pytest.raises(WriteError, match="broken"):
            await waiting
        await (await next_one).uploaded


async def test_two_checkpointers_that_save_to_one_place_leave_each_others_files_alone(tmp_path: Path) -> None:
    gate = Gate("sync")
    slow = FaultyStorage()
    slow.gate = gate
    quick = FaultyStorage()
    quick.files = slow.files
    async with Checkpointer(storage=slow) as one:
        first = await one.save(make_state(1), "ckpt")
        await gate.wait_reached()
        assert slow.files["ckpt"] == {}
        [save_id] = commit._live
        being_written = naming.data_file(0, save_id)
        slow.files["ckpt"][being_written] = b"being written"
        async with Checkpointer(storage=quick) as other:
            await other.save(make_state(2), "ckpt")
        assert being_written in slow.files["ckpt"]
        del slow.files["ckpt"][being_written]  # which MemoryStorage makes only when it is complete
        gate.open()
        await first
        target = blank(make_state(1))
        await one.load(target, "ckpt")
        assert_equal(make_state(1), target)


async def test_a_save_whose_data_another_process_removed_is_not_called_saved(faulty: FaultyStorage) -> None:
    async with Checkpointer(storage=faulty) as checkpointer:

        def remove(call: str) -> None:
            if call == "put":
                faulty.files["ckpt"].clear()

        faulty.gate = remove
        checkpoint = await checkpointer.save(make_state(), "ckpt")
        with pytest.raises(SaveError, match="disappeared"):
            await checkpoint


async def test_a_relative_path_means_the_directory_in_which_the_save_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    async with Checkpointer() as checkpointer:
        checkpoint = await checkpointer.save(make_state(), "ckpt")
        monkeypatch.chdir(tmp_path / "b")
        await checkpoint
        assert len(list((tmp_path / "a" / "ckpt").iterdir())) == 2
        assert list((tmp_path / "b").iterdir()) == []


async def test_a_directory_that_was_there_before_a_failed_save_is_there_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: memoryview, offset: int) -> int:
        raise OSError(28, "No space left on device")

    async with Checkpointer() as checkpointer:
        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(WriteError):
            await (await checkpointer.save(make_state(), tmp_path))
    assert list(tmp_path.iterdir()) == []


async def test_it_is_busy_until_uploaded_and_no_longer(faulty: FaultyStorage) -> None:
    async with Checkpointer(storage=faulty) as checkpointer:
        for number in range(5):
            await (await checkpointer.save({"n": number}, "ckpt", on_busy="raise"))
            assert "idle" in repr(checkpointer)


async def test_a_save_that_waits_its_turn_is_refused_when_leaving_is_cancelled(faulty: FaultyStorage) -> None:
    gate = Gate("write")
    faulty.gate = gate
    queued: list[asyncio.Task[Any]] = []

    async def body() -> None:
        async with Checkpointer(storage=faulty) as checkpointer:
            await checkpointer.save(make_state(1), "ckpt")
            queued.append(asyncio.create_task(checkpointer.save(make_state(2), "ckpt")))
            await gate.wait_reached()

    task = asyncio.create_task(body())
    await gate.wait_reached()
    for _ in range(20):
        await asyncio.sleep(0.001)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ClosedError):
        await queued[0]
    assert not faulty.files.get("ckpt")


async def test_nothing_new_is_begun_while_it_is_being_left(faulty: FaultyStorage) -> None:
    gate = Gate("put")
    faulty.gate = gate
    checkpointer = Checkpointer(storage=faulty)

    async def body() -> None:
        async with checkpointer:
            await checkpointer.save(make_state(1), "ckpt")
            await gate.wait_reached()

    task = asyncio.create_task(body())
    await gate.wait_reached()
    for _ in range(20):
        await asyncio.sleep(0.001)
    with pytest.raises(ClosedError):
        await checkpointer.save(make_state(2), "ckpt")
    gate.open()
    await task


async def test_equal_names_of_different_structure_are_not_confused() -> None:
    storage = MemoryStorage()
    one, other = torch.ones(2), torch.zeros(2)
    states: list[dict[str, Any]] = [{"a": [one, other]}, {"a": {"0": one, "1": other}}, {"a.0": one, "a.1": other}]
    async with Checkpointer(storage=storage) as checkpointer:
        for number, state in enumerate(states):
            await (await checkpointer.save(state, f"ckpt-{number}"))
    paths = [read_metadata(storage.files[f"ckpt-{n}"][".metadata"], "m").planner_data["a.0"] for n in range(3)]
    assert paths == [("a", 0), ("a", "0"), ("a.0",)]


async def test_a_tensor_whose_storage_was_freed_is_named(faulty: FaultyStorage) -> None:
    tensor = torch.ones(1000)
    tensor.untyped_storage().resize_(0)
    async with Checkpointer(storage=faulty) as checkpointer:
        checkpoint = await checkpointer.save({"ok": torch.ones(1), "model": {"w": tensor}}, "ckpt")
        with pytest.raises(CaptureError, match=r"model\.w: its storage has been freed"):
            await checkpoint
    assert not faulty.files.get("ckpt")


async def test_a_failed_save_does_not_hold_the_staging_buffer(faulty: FaultyStorage) -> None:
    faulty.gate = _fail_put
    async with Checkpointer(storage=faulty, keep_buffers=False) as checkpointer:
        checkpoint = await checkpointer.save({"w": torch.ones(1 << 20)}, "ckpt")
        with pytest.raises(WriteError):
            await checkpoint
        gc.collect()
        assert not [each for each in gc.get_objects() if type(each) is host_memory.Arena]


async def test_a_failed_capture_leaves_the_coroutine_of_its_caller_alone() -> None:
    class Broken:
        def state_dict(self) -> dict[str, Any]:
            raise ValueError("no state today")

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    async with Checkpointer(storage=MemoryStorage()) as checkpointer:
        with pytest.raises(CaptureError, match="no state today"):
            await checkpointer.save({"app": Broken()}, "ckpt")
        await asyncio.sleep(0.05)  # here the engine lets go of the error
        await (await checkpointer.save({"n": 1}, "ckpt")).uploaded


class Panic(BaseException):
    """As a client written in Rust raises it: no `Exception`."""


@pytest.mark.parametrize("call", ["create", "write", "sync", "put", "lock"])
@pytest.mark.parametrize("error", [Panic("called unwrap() on None"), SystemExit(3), asyncio.CancelledError()], ids=repr)
async def test_what_a_storage_ends_its_own_tasks_by_fails_the_save_and_not_the_engine(
    call: str, error: BaseException
) -> None:
    storage = SlowLocks()

    def fail(name: str) -> None:
        if name == call:
            raise error

    async with Checkpointer(storage=storage) as checkpointer:
        storage.gate = fail
        checkpoint = await checkpointer.save({"w": torch.ones(3)}, "root/ckpt")
        with pytest.raises(WriteError, match=r"the storage (raised|has cancelled its own call)"):
            await checkpoint.uploaded
        assert not storage.files.get("root/ckpt")
        storage.gate = lambda name: None
        await (await checkpointer.save({"w": torch.ones(3)}, "root/ckpt")).uploaded


@pytest.mark.parametrize("elements", [3, 1 << 20], ids=["in the engine's loop", "in a thread"])
async def test_a_checksum_that_exits_fails_the_save_and_not_the_engine(elements: int) -> None:
    def leave(data: Any, value: int = 0) -> int:
        raise SystemExit(3)

    async with Checkpointer(storage=MemoryStorage(), checksum=leave) as checkpointer:
        for _ in range(2):
            checkpoint = await checkpointer.save({"w": torch.ones(elements)}, "ckpt")
            with pytest.raises(SaveError, match="SystemExit"):
                await checkpoint.uploaded


async def test_whoever_waits_for_a_flow_that_is_ended_from_outside_hears_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def end(*_: Any) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(Saver, "save", end)
    with pytest.raises(SaveError, match="the save was ended"):
        async with Checkpointer(storage=MemoryStorage()) as checkpointer:
            await (await checkpointer.save({"w": torch.ones(3)}, "ckpt")).uploaded


async def test_what_another_process_has_committed_meanwhile_is_not_removed(caplog: pytest.LogCaptureFixture) -> None:
    """It was no checkpoint's when this save listed the files that nothing names."""
    storage = FaultyStorage()
    async with Checkpointer(storage=storage) as checkpointer, Checkpointer(storage=storage) as other:
        await (await checkpointer.save({"w": torch.ones(3)}, "ckpt")).uploaded
        theirs, ours = Gate("put"), Gate("open")
        storage.gate = theirs
        saving = await other.save({"w": torch.full((3,), 3.0)}, "ckpt")
        await theirs.wait_reached()  # their data is there
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(commit, "_live", set())  # as seen from another process
            storage.gate = ours
            await (await checkpointer.save({"w": torch.full((3,), 2.0)}, "ckpt")).uploaded
            await ours.wait_reached()  # about to remove what it has found
            theirs.open()
            await saving.uploaded
            ours.open()
    async with Checkpointer(storage=storage) as checkpointer:
        target = {"w": torch.zeros(3)}
        await checkpointer.load(target, "ckpt")
    assert_equal(target["w"], torch.full((3,), 3.0))
    assert "another process has committed here meanwhile" in caplog.text
