"""What several test files share: states to save, and a storage with faults."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from aiodcp import MemoryStorage
from aiodcp.storage import Reader, Writer

from .support.devices import Driver, install
from .worlds import World

HELD_AT_MOST_S = 30.0
HANGS_AFTER_S = 600.0  # no test takes a minute, on a machine that has time for it


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Name a test that hangs, print all stacks, and end the run."""

    def end() -> None:
        sys.__stderr__.write(f"\n{item.nodeid} hangs: not done after {HANGS_AFTER_S:.0f} s\n")  # type: ignore[union-attr]
        faulthandler.dump_traceback(sys.__stderr__)  # type: ignore[arg-type]
        os._exit(3)

    watch = threading.Timer(HANGS_AFTER_S, end)
    watch.daemon = True
    watch.start()
    try:
        return (yield)
    finally:
        watch.cancel()


class FaultyStorage(MemoryStorage):
    """A storage whose every call passes a gate, which may raise, block, or count.

    Attributes:
        calls: names of the calls made so far.
        gate: called with each name before the call is carried out.
        fail_once: raised by the next `put` that is carried out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.gate: Callable[[str], Any] = lambda call: None
        self.fail_once: OSError | None = None
        self.open_files = 0

    async def _pass(self, call: str) -> None:
        self.calls.append(call)
        answer = self.gate(call)
        if answer is not None:
            await answer

    @asynccontextmanager
    async def create(self, checkpoint_id: str, name: str) -> AsyncIterator[Writer]:  # type: ignore[override]
        await self._pass("create")
        async with super().create(checkpoint_id, name) as writer:
            self.open_files += 1
            try:
                yield _FaultyWriter(self, writer)
                await self._pass("sync")
            finally:
                self.open_files -= 1

    @asynccontextmanager
    async def open(self, checkpoint_id: str, name: str) -> AsyncIterator[Reader]:  # type: ignore[override]
        await self._pass("open")
        async with super().open(checkpoint_id, name) as reader:
            self.open_files += 1
            try:
                yield _FaultyReader(self, reader)
            finally:
                self.open_files -= 1

    async def put(self, checkpoint_id: str, name: str, data: bytes) -> None:
        await self._pass("put")
        if self.fail_once is not None:
            error, self.fail_once = self.fail_once, None
            raise error
        await super().put(checkpoint_id, name, data)

    async def get(self, checkpoint_id: str, name: str) -> bytes:
        await self._pass("get")
        return await super().get(checkpoint_id, name)

    async def remove(self, checkpoint_id: str, name: str, *, durable: bool = False) -> None:
        await self._pass("remove")
        await super().remove(checkpoint_id, name, durable=durable)

    async def remove_tree(self, checkpoint_id: str) -> None:
        await self._pass("remove_tree")
        await super().remove_tree(checkpoint_id)


class _FaultyWriter:
    def __init__(self, storage: FaultyStorage, writer: Writer) -> None:
        self._storage = storage
        self._writer = writer

    async def write(self, offset: int, data: memoryview) -> None:
        await self._storage._pass("write")
        await self._writer.write(offset, data)


class _FaultyReader:
    def __init__(self, storage: FaultyStorage, reader: Reader) -> None:
        self._storage = storage
        self._reader = reader
        self.nbytes = reader.nbytes
        self.modified_at = reader.modified_at

    async def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        await self._storage._pass("read")
        await self._reader.read_into(offset, buffers)


class Gate:
    """Holds the calls of one kind until it is opened, from any thread."""

    def __init__(self, call: str) -> None:
        self._call = call
        self.reached = threading.Event()
        self._open = threading.Event()

    def __call__(self, call: str) -> Any:
        return self._hold() if call == self._call and not self._open.is_set() else None

    async def _hold(self) -> None:
        self.reached.set()
        until = time.monotonic() + HELD_AT_MOST_S
        while not self._open.is_set():
            if time.monotonic() > until:  # the test has failed, and leaving its Checkpointer waits for this call
                raise OSError(f"{self._call} was held for {HELD_AT_MOST_S} s and never let go")
            await asyncio.sleep(0.001)

    def open(self) -> None:
        self._open.set()

    async def wait_reached(self) -> None:
        assert await asyncio.get_running_loop().run_in_executor(None, self.reached.wait, 30)


@pytest.fixture(scope="session")
def world() -> Iterator[World]:
    made = World()
    yield made
    made.close()


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    """Two devices, for all of the process."""
    driver = install(monkeypatch)
    yield driver
    gc.collect()  # what is pinned is released while the devices are there
    driver.close()
    assert not driver.violations


@pytest.fixture
def faulty() -> FaultyStorage:
    return FaultyStorage()


def make_state(seed: int = 0) -> dict[str, Any]:
    """A state with what real ones have: nested dicts and lists, several dtypes, numbers, strings, None."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {
            "weight": torch.randn(40, 30, generator=generator),
            "bias": torch.randn(40, generator=generator).to(torch.bfloat16),
            "ids": torch.arange(7) + seed,
            "scalar": torch.tensor(2.5 + seed),
            "empty": torch.empty(0, 3),
        },
        "optim": {
            "state": {0: {"step": torch.tensor(float(seed)), "exp_avg": torch.randn(40, 30, generator=generator)}},
            "param_groups": [{"lr": 0.1 + seed, "betas": (0.9, 0.999), "params": [0, 1]}],
        },
        "epoch": seed,
        "name": f"state {seed}",
        "blob": bytes([seed, 1, 2]),
        "none": None,
        "history": [torch.full((3,), float(seed)), {"loss": 0.5 * seed}],
    }


def blank(value: Any) -> Any:
    """The same state with zeros for tensors and wrong values for everything else."""
    if isinstance(value, torch.Tensor):
        return torch.zeros_like(value)
    if isinstance(value, dict):
        return {key: blank(each) for key, each in value.items()}
    if isinstance(value, list) and any(isinstance(each, torch.Tensor | dict | list) for each in value):
        return [blank(each) for each in value]
    return "not loaded"


def assert_equal(one: Any, other: Any, path: str = "") -> None:
    """Two states are the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor), path
        assert one.dtype is other.dtype, path
        assert one.shape == other.shape, path
        if not one.is_quantized and one.layout is torch.strided:
            flat, same = (each.detach().resolve_conj().contiguous().reshape(-1) for each in (one, other))
            if flat.numel():
                flat, same = flat.view(torch.uint8), same.view(torch.uint8)
            assert torch.equal(flat, same), path
        else:
            assert torch.equal(one.to_dense(), other.to_dense()) if one.is_sparse else torch.equal(one, other), path
    elif isinstance(one, dict):
        assert list(one) == list(other), path
        for key in one:
            assert_equal(one[key], other[key], f"{path}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), path
        for number, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{path}.{number}")
    else:
        assert one == other, path
        assert type(one) is type(other), path
