"""Saves and loads of tensors on devices, on a double of two of them that keeps CUDA's rules."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from aiodcp import (
    ArgumentError,
    CaptureError,
    Checkpointer,
    CorruptError,
    LoadError,
    SaveCancelled,
    SaveError,
    StageError,
    TornSnapshotError,
)
from aiodcp._engine import device_copies, host_memory
from aiodcp._engine.device_copies import CopyStreams
from aiodcp._engine.host_memory import Arena, _unpin, pieces_of
from aiodcp._save.bounded_staging import MIN_NBYTES
from aiodcp._save.comparison import Comparison
from aiodcp._save.staging import Staging
from aiodcp._state.capture import capture
from aiodcp.checkpointer import drain, flows
from aiodcp.testing import FaultyStorage

from ..support.devices import Driver, Event
from ..support.engine import wait_for_engine
from ..support.states import assert_equal, blank


def _state(devices: Driver, index: int = 0) -> dict[str, torch.Tensor]:
    return {f"w{n}": devices.put(torch.full((5 << 20,), float(n)), index) for n in range(4)}  # 80 MiB: many segments


def _on_host(devices: Driver, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(tensor.shape, dtype=tensor.dtype).copy_(tensor) for name, tensor in state.items()}


def _step(devices: Driver, state: dict[str, torch.Tensor]) -> None:
    for tensor in state.values():
        devices.queue(tensor, lambda memory: memory.add_(100))


async def _queued(ckpt: Any) -> None:
    await asyncio.to_thread(ckpt._state.queued.wait_in_thread, 30)


# --- the order of things


async def test_staged_comes_with_the_last_copy_and_nothing_is_written_before_it_is_there(
    devices: Driver, faulty: FaultyStorage
) -> None:
    state = _state(devices)
    kept = _on_host(devices, state)
    devices.hold_copies()
    async with Checkpointer(storage=faulty) as checkpointer:
        ckpt = await checkpointer.save(state, "a")
        await _queued(ckpt)
        assert not ckpt.staged.done()
        assert "write" not in faulty.calls
        assert ckpt.progress.bytes_staged == 0
        devices.let_copies_go()
        await ckpt.staged
        for tensor in state.values():
            tensor.add_(1)  # allowed from here on
        await ckpt.uploaded
        target = blank(kept)
        await checkpointer.load(target, "a")
    assert_equal(target, kept)


async def test_a_fence_holds_the_stream_and_not_the_host(devices: Driver, faulty: FaultyStorage) -> None:
    state = _state(devices)
    kept = _on_host(devices, state)
    devices.hold_copies()
    async with Checkpointer(storage=faulty) as checkpointer:
        ckpt = await checkpointer.save(state, "a")
        ckpt.fence()  # returns, while the copies are stopped
        ckpt.fence()
        assert not ckpt.staged.done()
        _step(devices, state)
        devices.let_copies_go()
        await ckpt.uploaded
        target = blank(kept)
        await checkpointer.load(target, "a")
        assert_equal(target, kept)
        devices.compute[0].synchronize()
        assert float(state["w1"][0]) == 101.0


async def test_a_fence_holds_every_stream_that_asks_for_it(devices: Driver, faulty: FaultyStorage) -> None:
    state = {"w": devices.put(torch.zeros(1000))}
    side = devices.side_stream()
    devices.hold_copies()
    async with Checkpointer(storage=faulty) as checkpointer:
        ckpt = await checkpointer.save(state, "a")
        ckpt.fence()
        with side:
            ckpt.fence()
            devices.queue(state["w"], lambda memory: memory.fill_(7), side)
        devices.let_copies_go()
        await ckpt.uploaded
        target = {"w": torch.ones(1000)}
        await checkpointer.load(target, "a")
        assert float(target["w"].sum()) == 0
        side.synchronize()
        assert float(state["w"][0]) == 7.0


class QueuedSGD(torch.optim.Optimizer):
    """Queues its step on the device, as an optimizer of parameters on one does."""

    def __init__(self, parameters: list[torch.nn.Parameter], devices: Driver) -> None:
        super().__init__(parameters, {})
        self._devices = devices

    def step(self) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            self._devices.queue(parameter, lambda memory: memory.sub_(1))


async def test_a_guarded_optimizer_is_queued_behind_the_copies(devices: Driver, faulty: FaultyStorage) -> None:
    weight = torch.nn.Parameter(devices.put(torch.zeros(1000)))
    weight.grad = torch.ones(1000)
    optimizer = QueuedSGD([weight], devices)
    devices.hold_copies()
    async with Checkpointer(storage=faulty) as checkpointer:
        checkpointer.guard(optimizer)
        ckpt = await checkpointer.save({"w": weight}, "a")
        optimizer.step()
        optimizer.step()
        assert not ckpt.staged.done()
        devices.let_copies_go()
        await ckpt.uploaded
        target = {"w": torch.ones(1000)}
        await checkpointer.load(target, "a")
        assert_equal(target, {"w": torch.zeros(1000)})
        devices.compute[0].synchronize()
        assert float(weight.detach()[0]) == -2.0


@pytest.mark.parametrize("fenced_late", [False, True])
async def test_a_change_before_a_fence_is_torn(devices: Driver, faulty: FaultyStorage, fenced_late: bool) -> None:
    state = _state(devices)
    devices.hold_copies()
    async with Checkpointer(storage=faulty) as checkpointer:
        ckpt = await checkpointer.save(state, "a")
        await _queued(ckpt)
        _step(devices, {"w2": state["w2"]})
        if fenced_late:
            ckpt.fence()
        devices.let_copies_go()
        with pytest.raises(TornSnapshotError) as caught:
            await ckpt.uploaded
        assert caught.value.fqns == ("w2",)
        assert not faulty.files.get("a")


async def test_what_was_queued_before_the_save_is_in_it(devices: Driver, faulty: FaultyStorage) -> None:
    state = _state(devices)
    devices.compute[0].go.clear()
    async with Checkpointer(storage=faulty) as checkpointer:
        devices.queue(state["w1"], lambda memory: memory.fill_(9))
        ckpt = await checkpointer.save(state, "a")
        ckpt.fence()
        assert not ckpt.staged.done()
        devices.compute[0].go.set()
        await ckpt.uploaded
        target = {"w1": torch.zeros(5 << 20)}
        await checkpointer.load(target, "a")
    assert float(target["w1"][-1]) == 9.0


async def test_memory_that_is_freed_and_used_again_at_once_is_saved_as_it_was(
    devices: Driver, faulty: FaultyStorage
) -> None:
    devices.hold_copies()
    async with Checkpointer(storage=faulty) as checkpointer:
        state = {"w": devices.put(torch.full((1 << 20,), 3.0))}
        ckpt = await checkpointer.save(state, "a")
        ckpt.fence()
        address = state.pop("w").data_ptr()
        junk = devices.put(torch.full((1 << 20,), -1.0))
        assert junk.data_ptr() != address
        devices.let_copies_go()
        await ckpt.uploaded
        junk = devices.put(torch.full((1 << 20,), -1.0))
        assert junk.data_ptr() == address  # so the double does use it again
        target = {"w": torch.zeros(1 << 20)}
        await checkpointer.load(target, "a")
    assert float(target["w"].min()) == 3.0


async def test_a_device_that_is_only_seen_when_all_tensors_are_looked_at_is_waited_for(
    devices: Driver, faulty: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large state some tensors are asked at once for their device, and the others by the engine."""
    monkeypatch.setattr("aiodcp._state.capture.SMALL", 1)
    monkeypatch.setattr("aiodcp._state.capture.SAMPLED", 1)
    synchronized: list[torch.device] = []

    def synchronize(device: torch.device) -> None:
        synchronized.append(device)
        devices.compute[device.index].synchronize()

    monkeypatch.setattr(torch.accelerator, "synchronize", synchronize)
    for first in (torch.zeros(8), devices.put(torch.zeros(8))):
        state = {"a": first, "b": devices.put(torch.zeros(8)), "c": devices.put(torch.zeros(8), 1)}
        for name in ("b", "c"):
            devices.queue(state[name], lambda tensor: tensor.add_(5.0))
        async with Checkpointer(storage=faulty) as checkpointer:
            await (await checkpointer.save(state, "a")).uploaded
            target = {name: torch.zeros(8) for name in state}
            await checkpointer.load(target, "a")
            assert [float(tensor[0]) for tensor in target.values()] == [0.0, 5.0, 5.0]
            assert [device.index for device in synchronized] in ([0, 1], [1])
            on_devices = {name: devices.put(torch.zeros(8), index) for name, index in (("a", 0), ("b", 0), ("c", 1))}
            monkeypatch.setattr("aiodcp._load.find_targets.SAMPLED", 1)
            synchronized.clear()
            await checkpointer.load(on_devices, "a")
            assert [device.index for device in synchronized] == [1]
            synchronized.clear()
        assert [float(tensor.sum()) for tensor in on_devices.values()] == [0.0, 40.0, 40.0]


async def test_windows_wait_for_the_device_too(devices: Driver, faulty: FaultyStorage) -> None:
    state = {f"w{n}": devices.put(torch.full((1 << 19,), float(n))) for n in range(4)}
    async with Checkpointer(storage=faulty, max_host_bytes=MIN_NBYTES) as checkpointer:
        for number in range(3):
            ckpt = await checkpointer.save(state, str(number))
            ckpt.fence()
            _step(devices, state)
            await ckpt.uploaded
        target = {name: torch.zeros(1 << 19) for name in state}
        for number in range(3):
            await checkpointer.load(target, str(number))
            assert [float(tensor[-1]) for tensor in target.values()] == [100.0 * number + n for n in range(4)]


async def test_each_device_of_a_state_is_copied_in_its_own_order(devices: Driver, faulty: FaultyStorage) -> None:
    state = {f"on{index}": devices.put(torch.zeros(1 << 20), index) for index in range(2)}
    devices.compute[1].go.clear()
    async with Checkpointer(storage=faulty) as checkpointer:
        ckpt = await checkpointer.save(state, "a")
        ckpt.fence()
        _step(devices, state)
        devices.compute[1].go.set()
        await ckpt.uploaded
        target = {name: torch.ones(1 << 20) for name in state}
        await checkpointer.load(target, "a")
        assert [float(tensor.sum()) for tensor in target.values()] == [0.0, 0.0]


# --- host tensors beside those on a device


async def test_a_pinned_tensor_that_a_queued_copy_is_on_its_way_to_is_saved_when_it_has_come(
    devices: Driver, faulty: FaultyStorage
) -> None:
    device = devices.put(torch.full((1000,), 5.0))
    host = devices.pin(torch.zeros(1000))
    devices.compute[0].go.clear()
    async with Checkpointer(storage=faulty) as checkpointer:
        await checkpointer.prepare({"device": device, "host": host})
        host.copy_(device, non_blocking=True)
        devices.asked_whether_pinned = 0
        ckpt = await checkpointer.save({"device": device, "host": host}, "a")
        await asyncio.to_thread(_until, lambda: devices.asked_whether_pinned or ckpt._state.queued.done())
        devices.compute[0].go.set()
        await ckpt.uploaded
        target = {"device": torch.zeros(1000), "host": torch.zeros(1000)}
        await checkpointer.load(target, "a")
    assert float(target["host"].min()) == 5.0


async def test_a_fence_waits_for_no_device_where_a_state_has_plain_host_tensors(
    devices: Driver, faulty: FaultyStorage
) -> None:
    state = {"device": devices.put(torch.zeros(1000)), "step": torch.tensor(1.0)}
    devices.compute[0].go.clear()
    async with Checkpointer(storage=faulty) as checkpointer:
        ckpt = await checkpointer.save(state, "a")
        ckpt.fence()
        state["step"] += 1
        devices.compute[0].go.set()
        await ckpt.uploaded
        target = {"step": torch.tensor(0.0)}
        await checkpointer.load(target, "a")
    assert float(target["step"]) == 1.0


async def test_a_load_is_not_undone_by_a_copy_that_was_queued_before(devices: Driver, faulty: FaultyStorage) -> None:
    async with Checkpointer(storage=faulty) as checkpointer:
        await (await checkpointer.save({"a": torch.ones(1000), "b": torch.ones(1000)}, "a")).uploaded
        target = {"a": devices.pin(torch.zeros(1000)), "b": devices.put(torch.zeros(1000))}
        devices.compute[0].go.clear()
        target["a"].copy_(target["b"], non_blocking=True)
        loading = asyncio.ensure_future(checkpointer.load(target, "a"))
        await asyncio.to_thread(wait_for_engine, checkpointer)
        devices.compute[0].go.set()
        await loading
        devices.compute[0].synchronize()
    assert float(target["a"].min()) == float(target["b"].min()) == 1.0


# --- threads and contexts


@pytest.mark.parametrize("nbytes", [1000, 4 << 20])
async def test_no_thread_makes_a_context_on_another_device(
    devices: Driver, tmp_path: Path, nbytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "PIN_NBYTES", 4 << 20)
    state = {f"w{n}": devices.put(torch.full((nbytes // 4,), float(n)), 1) for n in range(6)}
    state["step"] = torch.tensor(1.0)
    async with Checkpointer() as checkpointer:
        await checkpointer.prepare(state)
        ckpt = await checkpointer.save(state, tmp_path)
        ckpt.fence()
        await ckpt.uploaded
        target = {f"w{n}": devices.put(torch.zeros(nbytes // 4), 1) for n in range(6)}
        await checkpointer.load(target, tmp_path)
    del ckpt
    gc.collect()
    assert not devices.registered
    assert devices.contexts == {1}
    assert devices.thread.index == 0
    assert_equal(_on_host(devices, target), {f"w{n}": torch.full((nbytes // 4,), float(n)) for n in range(6)})


async def test_a_sample_for_the_comparison_of_ranks_is_taken_on_the_stream_of_the_copies(
    devices: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = capture({"w": devices.put(torch.arange(90_000.0).view(300, 300), 1).t()})
    comparison = Comparison(fqns=["w"], sources=[0], frozen=[False], groups=[0], whole=[False], weights=[1])
    streams: list[Any] = []
    real, arange = torch.take, torch.arange

    def take(*args: Any) -> torch.Tensor:
        streams.append(devices.current_stream(torch.device("cuda", 1)))
        return real(*args)

    monkeypatch.setattr(torch, "take", take)
    monkeypatch.setattr(torch, "arange", lambda *args, device: arange(*args))  # the double does not make these
    copies = CopyStreams().begin(taken.devices, taken.name_on)
    await asyncio.to_thread(copies.start)
    await asyncio.to_thread(comparison.digest, taken, copies, 3)
    assert streams == devices.copies


async def test_no_thread_spins_while_it_waits_for_a_device(devices: Driver, faulty: FaultyStorage) -> None:
    state = _state(devices)
    async with Checkpointer(storage=faulty) as checkpointer:
        await (await checkpointer.save(state, "a")).uploaded
        await checkpointer.load(state, "a")
    assert devices.spins == 0


# --- many tensors


def _many(devices: Driver) -> dict[str, torch.Tensor]:
    dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.uint16, torch.complex32, torch.float8_e8m0fnu]
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number in range(300):
        data = torch.randint(256, (8 * (number % 7 + 1),), generator=generator, dtype=torch.uint8)
        state[f"w{number}"] = devices.put(data.view(dtypes[number % len(dtypes)]))
    state["turned"] = devices.put(torch.arange(12.0).view(3, 4)).t()
    state["empty"] = devices.put(torch.zeros(0, 3))
    state["host"] = torch.arange(5)
    return state


async def test_many_small_tensors_of_all_dtypes_and_strides_cross_in_a_few_calls(
    devices: Driver, faulty: FaultyStorage
) -> None:
    state = _many(devices)
    kept = _on_host(devices, state)
    async with Checkpointer(storage=faulty) as checkpointer:
        for number in range(2):
            devices.launches = 0
            await (await checkpointer.save(state, str(number))).uploaded
            assert devices.launches <= 2 + 6 + 1 + 1  # there and back, a dtype each, what is turned, what is empty
            target = blank(kept)
            await checkpointer.load(target, str(number))
            assert_equal(target, kept)


async def test_a_tensor_that_becomes_a_conjugate_view_between_saves_is_saved(
    devices: Driver, faulty: FaultyStorage
) -> None:
    data = torch.complex(torch.arange(8.0), torch.ones(8)).to(torch.complex32)
    state = {"x": devices.put(data), "y": devices.put(torch.zeros(8))}
    async with Checkpointer(storage=faulty) as checkpointer:
        await (await checkpointer.save(state, "a")).uploaded
        await (await checkpointer.save(state | {"x": state["x"].conj()}, "b")).uploaded
        target = {"x": torch.zeros(8, dtype=torch.complex32)}
        await checkpointer.load(target, "b")
    assert torch.equal(target["x"].to(torch.complex64), data.to(torch.complex64).conj())


async def test_tensors_that_move_between_saves_are_gathered_from_where_they_are(
    devices: Driver, faulty: FaultyStorage
) -> None:
    state = {f"w{n}": devices.put(torch.full((10,), float(n))) for n in range(20)}
    async with Checkpointer(storage=faulty) as checkpointer:
        for name in ("none", "w3", "w7"):
            if name in state:
                state[name] = torch.full((10,), -1.0)
            kept = _on_host(devices, state)
            await (await checkpointer.save(state, name)).uploaded
            target = blank(kept)
            await checkpointer.load(target, name)
            assert_equal(target, kept)
        state = {name: devices.put(torch.zeros(10).copy_(tensor), 1) for name, tensor in state.items()}
        await (await checkpointer.save(state, "moved")).uploaded
        target = blank(kept)
        await checkpointer.load(target, "moved")
        assert_equal(target, kept)


# --- pinned memory


async def test_memory_is_pinned_in_pieces_that_no_copy_crosses(
    devices: Driver, faulty: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "PIN_NBYTES", 4 << 20)
    state = _state(devices) | {f"small{n}": devices.put(torch.full((100,), float(n))) for n in range(50)}
    kept = _on_host(devices, state)
    for options in ({}, {"max_host_bytes": 32 << 20}):
        async with Checkpointer(storage=faulty, **options) as checkpointer:  # type: ignore[arg-type]
            await checkpointer.prepare(state)
            assert len(devices.registered) > 2
            await (await checkpointer.save(state, "a")).uploaded
            target = blank(kept)
            await checkpointer.load(target, "a")
            assert_equal(target, kept)
        gc.collect()
        assert not devices.registered


async def test_what_could_be_pinned_stays_pinned_and_the_rest_is_reported_once(
    devices: Driver,
    faulty: FaultyStorage,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(host_memory, "PIN_NBYTES", 8 << 20)
    monkeypatch.setattr(host_memory, "_warned", False)
    devices.refuses = lambda address, nbytes: sum(devices.registered.values()) + nbytes > 50 << 20
    state = _state(devices)
    kept = _on_host(devices, state)
    with caplog.at_level(logging.WARNING, "aiodcp"):
        for name in ("a", "b"):
            async with Checkpointer(storage=faulty) as checkpointer:
                await (await checkpointer.save(state, name)).uploaded
                assert 0 < sum(devices.registered.values()) <= 50 << 20
                target = blank(kept)
                await checkpointer.load(target, name)
                assert_equal(target, kept)
            gc.collect()
    [warning] = [record.getMessage() for record in caplog.records if "could be pinned" in record.getMessage()]
    assert "error 2, out of memory" in warning


def test_pieces_cover_all_memory_and_end_at_borders() -> None:
    mib = 1 << 20
    borders = [0, 16 * mib, 48 * mib, 112 * mib, 240 * mib, 368 * mib, 5000 * mib]
    pieces = list(pieces_of(5300 * mib, borders))
    assert pieces == [(0, 368 * mib), (368 * mib, 5000 * mib), (5000 * mib, 5300 * mib)]
    assert list(pieces_of(100, [])) == [(0, 100)]
    assert list(pieces_of(5000 * mib + 4096, borders)) == [(0, 368 * mib), (368 * mib, 5000 * mib + 4096)]


def test_pinned_memory_is_not_released_in_a_forked_process(devices: Driver) -> None:
    arena = Arena(1 << 20)
    arena.pin(torch.device("cuda", 1))
    _unpin(arena._mapping, arena.address, torch.device("cuda", 1), os.getpid() + 1)
    assert devices.registered == {arena.address: 1 << 20}
    del arena
    gc.collect()
    assert not devices.registered


def test_memory_that_cannot_be_released_is_never_mapped_again(
    devices: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept: list[Any] = []
    monkeypatch.setattr(host_memory, "_pinned_until_exit", kept)
    arena = Arena(1 << 20)
    arena.pin(torch.device("cuda", 1))
    address = arena.address
    devices.unregister_code = 4
    del arena
    gc.collect()
    assert torch.frombuffer(kept[0], dtype=torch.uint8).data_ptr() == address
    assert "error 4" in caplog.text
    arenas = [Arena(1 << 20) for _ in range(10)]
    assert address not in {each.address for each in arenas}


# --- loads


async def test_a_load_takes_a_few_windows_of_pinned_memory_and_never_on_the_loop(
    devices: Driver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = {f"w{n}": torch.randn(6 << 20, generator=torch.Generator().manual_seed(n)) for n in range(4)}  # 24 MiB each
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save(state, tmp_path / "ours")).uploaded
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            await asyncio.to_thread(dcp.save, state, checkpoint_id=tmp_path / "theirs")
        for name in ("ours", "theirs"):
            target = {each: devices.put(torch.zeros(6 << 20), 1) for each in state}
            await checkpointer.load(target, tmp_path / name)
            assert_equal(_on_host(devices, target), state)
    assert 0 < devices.peak_registered <= 3 * (16 << 20)
    assert not [name for name in devices.pinned_by if "engine" in name]


async def test_damage_far_into_a_large_tensor_is_found_on_the_way_to_a_device(devices: Driver, tmp_path: Path) -> None:
    async with Checkpointer() as checkpointer:
        await (await checkpointer.save({"w": torch.zeros(6 << 20)}, tmp_path)).uploaded
        [file] = tmp_path.glob("*.distcp")
        with file.open("r+b") as opened:
            opened.seek(20 << 20)
            opened.write(b"\1")
        with pytest.raises(CorruptError, match=r"\(w\): CRC32 mismatch"):
            await checkpointer.load({"w": devices.put(torch.zeros(6 << 20))}, tmp_path)
        await checkpointer.load({"w": devices.put(torch.zeros(6 << 20))}, tmp_path, check_crc=False)


async def test_a_load_into_new_tensors_waits_for_what_used_their_memory(devices: Driver, faulty: FaultyStorage) -> None:
    class Holder:
        def __init__(self, state: dict[str, Any]) -> None:
            self.state = state

        def state_dict(self) -> dict[str, Any]:
            return self.state

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.state = state

    async with Checkpointer(storage=faulty) as checkpointer:
        await (await checkpointer.save({"s": Holder({"t": torch.full((1000,), 3.0)})}, "a")).uploaded
        holder = Holder({"t": devices.put(torch.zeros(10))})  # of another shape: it is replaced

        def gate(call: str) -> None:
            if call == "get":  # in the middle of the load, another task of the caller
                victim = devices.put(torch.zeros(1000))
                devices.compute[0].go.clear()
                devices.queue(victim, lambda memory: memory.fill_(-1))
                threading.Timer(0.2, devices.compute[0].go.set).start()

        faulty.gate = gate
        await checkpointer.load({"s": holder}, "a")
        devices.compute[0].synchronize()
    assert float(holder.state["t"].min()) == 3.0


async def test_a_load_has_filled_everything_when_it_returns(
    devices: Driver, faulty: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    queued: list[int] = []
    real = torch.Tensor.fill_

    def fill(tensor: torch.Tensor, value: float) -> torch.Tensor:
        if devices.index_of(tensor) is None:
            return real(tensor, value)
        queued.append(devices.thread.index)
        devices.compute[1].go.clear()
        threading.Timer(0.2, devices.compute[1].go.set).start()
        devices.queue(tensor, lambda memory: real(memory, value), devices.current_stream(tensor.device))
        return tensor

    async with Checkpointer(storage=faulty) as checkpointer:
        await (await checkpointer.save({"step": 5, "w": torch.ones(3)}, "a")).uploaded
        target = {"step": devices.put(torch.zeros(()), 1), "w": devices.put(torch.zeros(3), 1)}
        monkeypatch.setattr(torch.Tensor, "fill_", fill)
        await checkpointer.load(target, "a")
        monkeypatch.undo()
        assert (float(target["step"]), float(target["w"][0])) == (5.0, 1.0)
    assert queued == [1]


async def test_a_tensor_on_the_meta_device_is_made_where_the_callers_thread_makes_tensors(
    devices: Driver, faulty: FaultyStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[torch.device] = []

    def empty_like(value: torch.Tensor, *, device: torch.device) -> torch.Tensor:
        made.append(device)
        return devices.empty(tuple(value.shape), device=device, dtype=value.dtype)

    async with Checkpointer(storage=faulty) as checkpointer:
        await (await checkpointer.save({"w": torch.ones(1000)}, "a")).uploaded
        target = {"w": torch.zeros(1000, device="meta")}
        monkeypatch.setattr(torch, "get_default_device", lambda: torch.device("cuda"))
        monkeypatch.setattr(torch, "empty_like", empty_like)
        devices.set_index(1)
        await checkpointer.load(target, "a")
    assert made == [torch.device("cuda", 1)]
    assert devices.contexts == {1}
    assert devices.index_of(target["w"]) == 1
    assert float(target["w"].min()) == 1.0


async def test_a_load_that_fails_holds_no_event(devices: Driver, faulty: FaultyStorage) -> None:
    async with Checkpointer(storage=faulty) as checkpointer:
        await (await checkpointer.save({"w": torch.ones(1000)}, "a")).uploaded
        [name] = [name for name in faulty.files["a"] if name.endswith(".distcp")]
        data = bytearray(faulty.files["a"][name])
        data[2000] ^= 1
        faulty.files["a"][name] = bytes(data)
        with pytest.raises(CorruptError) as caught:
            await checkpointer.load({"w": devices.put(torch.zeros(1000))}, "a")
        gc.collect()
        assert not [each for each in gc.get_objects() if type(each) is Event]
        del caught


# --- graphs


async def test_a_save_and_a_load_while_a_graph_is_captured_are_refused_by_name(
    devices: Driver, faulty: FaultyStorage
) -> None:
    state = {"host": torch.zeros(3), "model": {"w": devices.put(torch.zeros(3), 1)}}
    async with Checkpointer(storage=faulty) as checkpointer:
        devices.capturing.append(devices.compute[1])
        with pytest.raises(CaptureError, match=r"model\.w: is on cuda:1, whose current stream captures a graph"):
            await checkpointer.save(state, "a")
        devices.capturing.clear()
        await (await checkpointer.save(state, "a")).uploaded
        devices.capturing.append(devices.compute[1])
        with pytest.raises(LoadError, match=r"model\.w: is on cuda:1, whose current stream captures a graph"):
            await checkpointer.load(state, "a")


async def test_a_fence_in_a_capture_is_refused(devices: Driver, faulty: FaultyStorage) -> None:
    state = {"w": devices.put(torch.zeros(1000))}
    devices.hold_copies()
    async with Checkpointer(storage=faulty) as checkpointer:
        ckpt = await checkpointer.save(state, "a")
        devices.capturing.append(devices.compute[0])
        with pytest.raises(SaveError, match="cuda:0 captures a graph"):
            ckpt.fence()
        devices.capturing.clear()
        devices.let_copies_go()
        await ckpt.uploaded


# --- what fails


async def test_a_save_that_is_cancelled_ends_when_no_copy_uses_its_memory_any_more(
    devices: Driver, faulty: FaultyStorage
) -> None:
    devices.hold_copies()
    async with Checkpointer(storage=faulty) as checkpointer:
        ckpt = await checkpointer.save(_state(devices), "a")
        await _queued(ckpt)
        ckpt.cancel()
        await asyncio.to_thread(wait_for_engine, checkpointer)
        assert not ckpt.uploaded.done()
        devices.let_copies_go()
        with pytest.raises(SaveCancelled):
            await ckpt.uploaded


async def test_copies_that_were_queued_before_one_that_failed_are_waited_for(
    devices: Driver, faulty: FaultyStorage
) -> None:
    state = {f"w{n}": devices.put(torch.zeros(1 << 20)) for n in range(4)}
    failed = threading.Event()

    def fail(number: int) -> None:
        if number == 2:
            failed.set()
            raise RuntimeError("CUDA error: out of memory")

    devices.on_copy = fail
    devices.hold_copies()
    async with Checkpointer(storage=faulty, keep_buffers=False) as checkpointer:
        ckpt = await checkpointer.save(state, "a")
        assert await asyncio.to_thread(failed.wait, 30)
        await asyncio.to_thread(wait_for_engine, checkpointer)
        assert not ckpt.uploaded.done()  # two tensors are still being copied into the arena
        devices.let_copies_go()
        ckpt.fence()
        with pytest.raises(StageError, match="out of memory"):
            await ckpt.uploaded
        devices.on_copy = lambda number: None
        await (await checkpointer.save(state, "a")).uploaded


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "CHECK_INTERVAL_S", 0.02)
    monkeypatch.setattr(drain, "CANCEL_TIMEOUT_S", 0.2)
    monkeypatch.setattr(device_copies, "UNKNOWN_S", 0.2)


@pytest.fixture
def in_use(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is never to be freed."""
    kept: list[Any] = []
    monkeypatch.setattr(device_copies, "_in_use", kept)
    return kept


@pytest.mark.usefixtures("impatient")
async def test_closing_gives_up_a_device_that_hangs_and_never_frees_what_it_may_use(
    devices: Driver, faulty: FaultyStorage, in_use: list[Any]
) -> None:
    state = {"w": devices.put(torch.zeros(1 << 20))}
    devices.hold_copies()
    with pytest.raises(SaveError, match=r"closed with work still in flight: .*copies on cuda:0"):
        async with Checkpointer(storage=faulty, timeout=0.2) as checkpointer:
            ckpt = await checkpointer.save(state, "a")
            await _queued(ckpt)
    await asyncio.to_thread(_until, lambda: in_use)
    gc.collect()
    assert in_use[0].arena.address in devices.registered
    devices.let_copies_go()
    devices.copies[0].synchronize()


@pytest.mark.usefixtures("impatient")
async def test_memory_of_copies_that_a_device_does_not_tell_of_is_never_freed(
    devices: Driver, faulty: FaultyStorage, in_use: list[Any]
) -> None:
    state = {"w": devices.put(torch.zeros(1 << 20))}
    async with Checkpointer(storage=faulty) as checkpointer:
        await (await checkpointer.save(state, "a")).uploaded
        for error in ("query_error", "record_error"):
            failure = RuntimeError("CUDA error: unspecified launch failure")
            devices.on_copy = lambda _, error=error, failure=failure: setattr(devices, error, failure)  # type: ignore[misc]
            devices.hold_copies()
            ckpt = await checkpointer.save(state, "b")
            with pytest.raises(StageError, match=r"CUDA error|does not report"):
                await ckpt.uploaded
            devices.on_copy = lambda _: None
            setattr(devices, error, None)
            devices.let_copies_go()
            await (await checkpointer.save(state, "c")).uploaded
            target = {"w": torch.ones(1 << 20)}
            await checkpointer.load(target, "c")
            assert float(target["w"].sum()) == 0
    rooms = [each for each in in_use if isinstance(each, Staging)]
    assert len({id(room.arena) for room in rooms}) == len(rooms) == 2


@pytest.mark.usefixtures("impatient")
async def test_a_device_that_does_not_tell_for_a_moment_is_asked_again(
    devices: Driver, faulty: FaultyStorage, in_use: list[Any]
) -> None:
    """As while another thread captures a graph."""
    state = {"w": devices.put(torch.zeros(1 << 20))}
    devices.hold_copies()
    async with Checkpointer(storage=faulty) as checkpointer:
        ckpt = await checkpointer.save(state, "a")
        await _queued(ckpt)
        devices.query_error = RuntimeError("CUDA error: operation not permitted when stream is capturing")
        await asyncio.to_thread(_until, lambda: devices.queries_refused > 1)
        devices.query_error = None
        devices.let_copies_go()
        with pytest.raises(StageError, match="capturing"):
            await ckpt.uploaded
        await (await checkpointer.save(state, "a")).uploaded
    assert not in_use


def _until(reached: Callable[[], Any]) -> None:
    pause = threading.Event()
    for _ in range(30_000):
        if reached():
            return
        pause.wait(0.001)
    raise AssertionError("it has not come to that")


def test_a_device_that_torch_has_no_streams_for_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("here it has")
    streams = CopyStreams()
    devices = [torch.device(name) for name in ("cpu", "meta", "cuda:0")]
    assert not streams.begin(devices[:2], str)
    with pytest.raises(ArgumentError, match=r"model\.w is on cuda:0, which is not torch's current accelerator"):
        streams.begin(devices, lambda device: "model.w")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    with pytest.raises(ArgumentError, match=r"state_dict: model\.w is on cuda:0, on which no stream can be created"):
        streams.begin(devices, lambda device: "model.w")
