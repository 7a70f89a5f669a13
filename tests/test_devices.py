"""The order of things when tensors come from a device, on a double of one: a queue is a thread that can be stopped."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from aiodcp import ArgumentError, Checkpointer, SaveCancelled, StageError, TornSnapshotError
from aiodcp._devices import CopyStreams, Crossing
from aiodcp._windows import MIN_NBYTES

from .conftest import FaultyStorage, assert_equal, blank
from .test_cancel import _engine_has_turned


class Stream:
    """Runs what is queued, in order, in a thread of its own; `go` lets it."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self._queue: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            self.go.wait(30)
            work()

    def submit(self, work: Callable[[], object]) -> None:
        self._queue.put(work)

    def close(self) -> None:
        self.go.set()
        self._queue.put(None)
        self._thread.join(30)


class Event:
    """Reached when a stream comes to it."""

    def __init__(self, stream: Stream) -> None:
        self.reached = threading.Event()
        stream.submit(self.reached.set)

    def synchronize(self) -> None:
        assert self.reached.wait(30)


class Device:
    """One device: the caller's stream, the copy stream, and crossings that use them as the real ones do theirs."""

    def __init__(self) -> None:
        self.compute, self.copies = Stream(), Stream()
        self.compute.go.set()
        self.queued = threading.Event()
        self.error: Exception | None = None
        self.log: list[str] = []

    def begin(self, *_: object) -> Crossing:
        return _Crossing(self)

    def close(self) -> None:
        self.compute.close()
        self.copies.close()


class _Crossing(Crossing):
    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device
        self._mark = Event(device.compute)

    def __bool__(self) -> bool:
        return True

    def start(self) -> None:
        self._device.log.append("start")
        self._device.copies.submit(self._mark.synchronize)

    def copy(self, targets: Any, sources: Any) -> list[Any]:
        if self._device.error is not None and self._device.log[-1] == "copy":  # the second one
            raise self._device.error
        self._device.log.append("copy")

        def move() -> None:
            with torch.no_grad():
                torch._foreach_copy_(list(targets), [source.data for source in sources])

        self._device.copies.submit(move)
        self._copied = [Event(self._device.copies)]  # type: ignore[list-item]
        self._device.queued.set()
        return self._copied

    def fence(self) -> None:
        for event in self._copied:
            self._device.compute.submit(event.synchronize)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    made = Device()
    monkeypatch.setattr(CopyStreams, "begin", made.begin)
    yield made
    made.close()


def _state() -> dict[str, torch.Tensor]:
    return {f"w{n}": torch.full((5 << 20,), float(n)) for n in range(4)}  # 80 MiB: several segments


def _step(device: Device, state: dict[str, torch.Tensor]) -> None:
    """Change every tensor as an optimizer on a device does: counted now, done when the stream comes to it."""
    for tensor in state.values():
        torch.autograd.graph.increment_version(tensor)
        device.compute.submit(partial(tensor.data.add_, 100))


async def test_staged_comes_with_the_last_copy_and_nothing_is_written_before_it_is_there(
    device: Device, faulty: FaultyStorage
) -> None:
    state = _state()
    async with Checkpointer(storage=faulty) as checkpointer:
        ckpt = await checkpointer.save(state, "a")
        await asyncio.to_thread(ckpt._queued.wait_in_thread, 30)
        assert not ckpt.staged.done()
        assert "write" not in faulty.calls
        assert ckpt.progress.bytes_staged == 0
        device.copies.go.set()
        await ckpt.staged
        for tensor in state.values():
            tensor.add_(1)  # allowed from here on
        await ckpt.uploaded
        target = blank(state)
        device.copies.go.set()
        await checkpointer.load(target, "a")
    assert_equal(target, _state())


async def test_a_fence_holds_the_stream_and_not_the_host(device: Device, faulty: FaultyStorage) -> None:
    state = _state()
    async with Checkpointer(storage=faulty) as checkpointer:
        ckpt = await checkpointer.save(state, "a")
        ckpt.fence()  # returns, while the copies are stopped
        ckpt.fence()
        assert not ckpt.staged.done()
        _step(device, state)
        device.copies.go.set()
        await ckpt.uploaded
        target = blank(state)
        await checkpointer.load(target, "a")
        assert_equal(target, _state())
        after = Event(device.compute)
        after.synchronize()
        assert float(state["w1"][0]) == 101.0


class QueuedSGD(torch.optim.Optimizer):
    """Queues its step on the device, as an optimizer of parameters on one does."""

    def __init__(self, parameters: list[torch.nn.Parameter], device: Device) -> None:
        super().__init__(parameters, {})
        self._device = device

    def step(self) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            torch.autograd.graph.increment_version(parameter)
            self._device.compute.submit(partial(parameter.data.sub_, 1))


async def test_a_guarded_optimizer_is_queued_behind_the_copies(device: Device, faulty: FaultyStorage) -> None:
    weight = torch.nn.Parameter(torch.zeros(1000))
    weight.grad = torch.ones(1000)
    optimizer = QueuedSGD([weight], device)
    async with Checkpointer(storage=faulty) as checkpointer:
        checkpointer.guard(optimizer)
        ckpt = await checkpointer.save({"w": weight}, "a")
        optimizer.step()
        optimizer.step()
        assert not ckpt.staged.done()
        device.copies.go.set()
        await ckpt.uploaded
        target = {"w": torch.ones(1000)}
        await checkpointer.load(target, "a")
        assert_equal(target, {"w": torch.zeros(1000)})
        Event(device.compute).synchronize()
        assert float(weight.detach()[0]) == -2.0


async def test_a_change_without_a_fence_is_torn(device: Device, faulty: FaultyStorage) -> None:
    state = _state()
    async with Checkpointer(storage=faulty) as checkpointer:
        ckpt = await checkpointer.save(state, "a")
        await asyncio.to_thread(ckpt._queued.wait_in_thread, 30)
        _step(device, {"w2": state["w2"]})
        device.copies.go.set()
        with pytest.raises(TornSnapshotError) as caught:
            await ckpt.staged
        assert caught.value.fqns == ("w2",)
        assert not faulty.files.get("a")


async def test_a_fence_after_the_change_does_not_hide_it(device: Device, faulty: FaultyStorage) -> None:
    state = _state()
    async with Checkpointer(storage=faulty) as checkpointer:
        ckpt = await checkpointer.save(state, "a")
        await asyncio.to_thread(ckpt._queued.wait_in_thread, 30)
        _step(device, {"w2": state["w2"]})
        ckpt.fence()
        device.copies.go.set()
        with pytest.raises(TornSnapshotError):
            await ckpt.uploaded


async def test_what_was_queued_before_the_save_is_in_it(device: Device, faulty: FaultyStorage) -> None:
    state = _state()
    device.compute.go.clear()
    device.copies.go.set()
    async with Checkpointer(storage=faulty) as checkpointer:
        device.compute.submit(lambda: state["w1"].data.fill_(9))
        ckpt = await checkpointer.save(state, "a")
        ckpt.fence()
        assert not ckpt.staged.done()
        device.compute.go.set()
        await ckpt.uploaded
        target = blank(state)
        await checkpointer.load(target, "a")
    assert float(target["w1"][-1]) == 9.0
    assert device.log[:2] == ["start", "copy"]


async def test_a_save_that_is_cancelled_ends_when_no_copy_uses_its_memory_any_more(
    device: Device, faulty: FaultyStorage
) -> None:
    async with Checkpointer(storage=faulty) as checkpointer:
        ckpt = await checkpointer.save(_state(), "a")
        await asyncio.to_thread(ckpt._queued.wait_in_thread, 30)
        ckpt.cancel()
        await asyncio.to_thread(_engine_has_turned, checkpointer)
        assert not ckpt.uploaded.done()
        device.copies.go.set()
        with pytest.raises(SaveCancelled):
            await ckpt.uploaded


async def test_a_copy_that_cannot_be_queued_fails_the_save_and_lets_a_fence_go(
    device: Device, faulty: FaultyStorage
) -> None:
    device.error = RuntimeError("CUDA error: out of memory")
    async with Checkpointer(storage=faulty) as checkpointer:
        ckpt = await checkpointer.save(_state(), "a")
        assert await asyncio.to_thread(device.queued.wait, 30)
        await asyncio.to_thread(_engine_has_turned, checkpointer)
        assert not ckpt.uploaded.done()  # the first segment is still being copied into the arena
        device.copies.go.set()
        ckpt.fence()
        with pytest.raises(StageError, match="out of memory"):
            await ckpt.uploaded
        device.error = None
        await (await checkpointer.save(_state(), "a")).uploaded


async def test_windows_wait_for_the_device_too(device: Device, faulty: FaultyStorage) -> None:
    state = {name: tensor[: 1 << 19].clone() for name, tensor in _state().items()}
    device.copies.go.set()
    async with Checkpointer(storage=faulty, max_host_bytes=MIN_NBYTES) as checkpointer:
        for number in range(3):
            ckpt = await checkpointer.save(state, str(number))
            ckpt.fence()
            _step(device, state)
            await ckpt.uploaded
        target = blank(state)
        for number in range(3):
            await checkpointer.load(target, str(number))
            assert [float(tensor[-1]) for tensor in target.values()] == [100.0 * number + n for n in range(4)]


def test_a_device_that_torch_has_no_streams_for_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("here it has")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    streams = CopyStreams()
    assert not streams.begin([torch.zeros(2), torch.zeros(2, device="meta"), 3], ["a", "b", "c"])

    class OnDevice(torch.Tensor):
        device = torch.device("cuda", 0)

    on_device = torch.zeros(2).as_subclass(OnDevice)
    with pytest.raises(ArgumentError, match=r"state_dict: model\.w is on cuda:0"):
        streams.begin([torch.zeros(2), on_device], ["a", "model.w"])
