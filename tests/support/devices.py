"""A double of CUDA devices, for all of the process: torch's own names lead to it while a test runs.

Device memory is a stretch of host memory; a tensor in it says that it is on a device, and is computed with at once, as
host tensors are. What a program queues, however, is queued: a stream is a thread that can be stopped. As with CUDA

- a copy keeps no tensor alive: it reads and writes addresses, whatever lies there when its turn comes,
- an event waits for what was queued before it was recorded, and for nothing else,
- entering a stream, and the current device, are a thread's own affair; every thread begins on device 0,
- a call makes a context on the device that is current in its thread, and memory that is freed is used again at once,
- pinned memory is registered stretch by stretch, and a copy that crosses the border of one is refused,
- many tensors are copied by one kernel if they agree in dtype and strides, else one by one; some dtypes have no kernel.
"""

from __future__ import annotations

import ctypes
import importlib
import mmap
import queue
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

WAITS_AT_MOST_S = 10.0
MEMORY_NBYTES = 1 << 30  # of each device; taken where it is touched
ALIGNMENT = 512
NO_KERNEL = {torch.uint16, torch.uint32, torch.uint64, torch.complex32, torch.float8_e8m0fnu}
INVALID = "CUDA error: invalid argument"

_real_copy = torch.Tensor.copy_
_real_foreach_copy = torch._foreach_copy_
_real_empty = torch.empty
_real_zeros = torch.zeros
_real_device: Any = torch.Tensor.device


@dataclass(frozen=True, slots=True)
class _Place:
    """Where the elements of a tensor lie, without the tensor."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    is_conj: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Place:
        return cls(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.is_conj())

    @property
    def stop(self) -> int:
        reach = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.address + (1 + reach) * self.dtype.itemsize if 0 not in self.shape else self.address

    def tensor(self) -> torch.Tensor:
        memory = (ctypes.c_char * (self.stop - self.address)).from_address(self.address)
        found = torch.frombuffer(memory, dtype=torch.uint8).view(self.dtype).as_strided(self.shape, self.strides)
        return found.conj() if self.is_conj else found


class Stream:
    """Does what is queued, in order, in a thread of its own, as long as `go` is set."""

    def __init__(self, driver: Driver, index: int) -> None:
        self.device = torch.device("cuda", index)
        self.go = threading.Event()
        self.go.set()
        self._driver = driver
        self._queue: queue.Queue[Callable[[], object] | None] = queue.Queue()
        self._before: tuple[Stream | None, int] | None = None  # as torch has it: the object remembers, not the thread
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            if not self.go.wait(WAITS_AT_MOST_S):
                self.go.set()  # the test has failed, and what it left waits for this stream
            work()

    def submit(self, work: Callable[[], object]) -> None:
        self._queue.put(work)

    def wait_event(self, event: Event) -> None:
        self._driver.touch()
        self.submit(event.wait)

    def synchronize(self) -> None:
        event = Event(self.device, driver=self._driver)
        event.record(self)
        event.wait()

    def __enter__(self) -> Stream:
        here = self._driver.thread
        self._before = here.streams.get(self.device.index), here.index
        here.streams[self.device.index], here.index = self, self.device.index
        self._driver.touch()
        return self

    def __exit__(self, *_: object) -> None:
        assert self._before is not None
        here = self._driver.thread
        here.streams[self.device.index], here.index = self._before

    def close(self) -> None:
        self.go.set()
        self._queue.put(None)
        self._thread.join(WAITS_AT_MOST_S)


class Event:
    """A point in a stream. One that the host waits on by `synchronize` keeps a core busy, as torch 2.13's does."""

    def __init__(self, device: torch.device, *, driver: Driver, **_: object) -> None:
        self._driver = driver
        self._device = device
        self._reached: threading.Event | None = None

    def record(self, stream: Stream) -> None:
        assert stream.device == self._device
        driver = self._driver
        if driver.record_error is not None:
            raise driver.record_error
        before = driver.thread.index
        driver.thread.index = stream.device.index
        driver.touch()
        self._reached = threading.Event()
        stream.submit(self._reached.set)
        driver.thread.index = before
        driver.touch()  # going back makes a context there, too

    def query(self) -> bool:
        self._driver.touch()
        if self._driver.query_error is not None:
            self._driver.queries_refused += 1
            raise self._driver.query_error
        return self._reached is None or self._reached.is_set()

    def synchronize(self) -> None:
        self._driver.spins += 1
        self._driver.touch()
        self.wait()

    @property
    def wait(self) -> Callable[[], None]:
        """Wait for what is recorded now, whatever is recorded later."""
        reached = self._reached

        def wait() -> None:
            assert reached is None or reached.wait(WAITS_AT_MOST_S)

        return wait


class _Thread(threading.local):
    """What CUDA knows of a thread."""

    def __init__(self) -> None:
        self.index = 0
        self.streams: dict[int, Stream | None] = {}


class _Memory:
    """The memory of one device: what is freed last is given out first."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, MEMORY_NBYTES)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.peak_nbytes = 0
        self._end = 0
        self._taken = 0
        self._free: list[tuple[int, int]] = []
        self._lock = threading.RLock()

    def take(self, nbytes: int) -> torch.Tensor:
        room = max(1, -(-nbytes // ALIGNMENT)) * ALIGNMENT
        with self._lock:
            fitting = [each for each in self._free if each[1] == room]
            if fitting:
                self._free.remove(fitting[-1])
                start = fitting[-1][0]
            else:
                start = self._end
                self._end += room
                if self._end > MEMORY_NBYTES:
                    raise torch.OutOfMemoryError("CUDA out of memory")
            self._taken += room
            self.peak_nbytes = max(self.peak_nbytes, self._taken)

        class Block(ctypes.c_char * room):  # type: ignore[misc]
            pass

        block = Block.from_buffer(self.map, start)
        weakref.finalize(block, self._give_back, start, room).atexit = False
        return torch.frombuffer(block, dtype=torch.uint8)[:nbytes] if nbytes else _real_empty(0, dtype=torch.uint8)

    def _give_back(self, start: int, room: int) -> None:
        with self._lock:
            self._free.append((start, room))
            self._taken -= room


class Driver:
    """The devices.

    Attributes:
        contexts: numbers of the devices on which some thread made a context.
        spins: how often a thread waited for an event and kept a core busy.
        launches: of kernels and copies, as the host counts them.
        copied: (target, source) addresses of copies that were queued, in order.
        on_copy: called before each copy is queued, with its number; may raise.
        record_error, query_error: raised by every event.
        registered: lengths of pinned stretches, by address.
        pinned_by: names of the threads that pinned them.
        peak_registered: bytes that were pinned at one time, at most.
        refuses: which stretches cannot be pinned, given address and length.
        violations: what a device would have read or written after it was given away.
        capturing: streams of which a graph is captured.
        compute: the stream of each device that is current when no other was entered.
        copies: the streams that were made since.
    """

    def __init__(self, count: int) -> None:
        self.thread = _Thread()
        self.contexts: set[int] = set()
        self.spins = 0
        self.launches = 0
        self.copied: list[tuple[int, int]] = []
        self.on_copy: Callable[[int], None] = lambda number: None
        self.record_error: Exception | None = None
        self.query_error: Exception | None = None
        self.queries_refused = 0
        self.unregister_code = 0
        self.asked_whether_pinned = 0
        self.registered: dict[int, int] = {}
        self.peak_registered = 0
        self.refuses: Callable[[int, int], bool] = lambda address, nbytes: False
        self.violations: list[str] = []
        self.capturing: list[Stream] = []
        self.memories = [_Memory() for _ in range(count)]
        self.pinned_by: set[str] = set()
        self.compute = [Stream(self, index) for index in range(count)]
        self.copies: list[Stream] = []
        self._others: list[Stream] = []
        self._are_held = False
        self._pending: list[tuple[int, int]] = []  # host memory of copies that are queued
        self._lock = threading.RLock()

    # --- for tests

    def hold_copies(self) -> None:
        """Stop the streams that the library makes, until `let_copies_go`."""
        self._are_held = True
        for stream in self.copies:
            stream.go.clear()

    def let_copies_go(self) -> None:
        self._are_held = False
        for stream in self.copies:
            stream.go.set()

    def side_stream(self, index: int = 0) -> Stream:
        """Return a stream of the test's own."""
        self._others.append(Stream(self, index))
        return self._others[-1]

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.registered[tensor.data_ptr()] = tensor.nbytes
        return tensor

    def put(self, tensor: torch.Tensor, index: int = 0) -> torch.Tensor:
        """Return a copy of a host tensor on a device, made at once."""
        made = self._empty(index, tensor.shape, tensor.dtype)
        return _real_copy(made, tensor)

    def queue(
        self, tensor: torch.Tensor, change: Callable[[torch.Tensor], object], stream: Stream | None = None
    ) -> None:
        """Change a tensor as a kernel does: counted now, done when the stream comes to it."""
        place = _Place.of(tensor)
        torch.autograd.graph.increment_version(tensor)
        if stream is None:
            stream = self.compute[self.index_of(tensor) or 0]
        stream.submit(lambda: change(place.tensor()))

    def index_of(self, tensor: torch.Tensor) -> int | None:
        """Return on which device a tensor is; None for host memory."""
        try:
            address = tensor.data_ptr()
        except RuntimeError:  # it has none
            return None
        for index, memory in enumerate(self.memories):
            if memory.address <= address < memory.address + MEMORY_NBYTES:
                return index
        return None

    # --- what torch's names lead to

    def touch(self) -> None:
        self.contexts.add(self.thread.index)

    def stream(self, device: torch.device | str) -> Stream:
        self.touch()
        stream = Stream(self, torch.device(device).index or 0)
        if self._are_held:
            stream.go.clear()
        self.copies.append(stream)
        return stream

    def current_stream(self, device: torch.device | None = None) -> Stream:
        index = self.thread.index if device is None or device.index is None else device.index
        return self.thread.streams.get(index) or self.compute[index]

    def set_index(self, index: int) -> None:
        self.thread.index = index
        self.touch()

    @contextmanager
    def device_index(self, index: int | None) -> Iterator[None]:
        before = self.thread.index
        if index is not None:
            self.thread.index = index
            self.touch()
        try:
            yield
        finally:
            self.thread.index = before  # without a context, unless there is one

    def is_capturing(self) -> bool:
        return self.current_stream() in self.capturing

    def _empty(self, index: int, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        count = 1
        for size in shape:
            count *= size
        tensor = self.memories[index].take(count * dtype.itemsize)
        return tensor.view(dtype).view(tuple(shape))

    def empty(self, *shape: Any, device: Any = None, dtype: torch.dtype | None = None, **options: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != "cuda":
            return _real_empty(*shape, device=device, dtype=dtype, **options)
        sizes: Any = shape if not shape or isinstance(shape[0], int) else shape[0]
        index: int | None = torch.device(device).index
        index = self.thread.index if index is None else index
        self.contexts.add(index)  # of the thread's device it makes none: torch goes back there without
        return self._empty(index, sizes, dtype or torch.float32)

    def zeros(self, *shape: Any, device: Any = None, **options: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != "cuda":
            return _real_zeros(*shape, device=device, **options)
        return _real_copy(self.empty(*shape, device=device, **options), _real_zeros(()))

    def copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if self.index_of(target) is None and self.index_of(source) is None:
            return _real_copy(target, source)
        self.launches += 1
        self._queue(target, source, wait=not non_blocking)
        return target

    def foreach_copy(self, targets: Sequence[Any], sources: Sequence[Any], non_blocking: bool = False) -> None:
        pairs = list(zip(targets, sources, strict=True))
        where = {(self.index_of(target), self.index_of(source)) for target, source in pairs if target.numel()}
        if where <= {(None, None)}:
            _real_foreach_copy(tuple(targets), tuple(sources))
            return
        is_one_kernel = (
            len(where) == 1
            and len({*next(iter(where))}) == 1
            and len({each.dtype for pair in pairs for each in pair}) == 1
            and all(target.stride() == source.stride() for target, source in pairs)
        )
        if is_one_kernel:
            if pairs[0][0].dtype in NO_KERNEL:
                raise NotImplementedError(f'"foreach_tensor_copy" not implemented for {pairs[0][0].dtype}')
            self.launches += 1
        for target, source in pairs:
            if self.index_of(target) is None and self.index_of(source) is None:
                _real_copy(target, source)
                continue
            self.launches += not is_one_kernel
            self._queue(target, source, wait=not non_blocking)

    def _queue(self, target: torch.Tensor, source: torch.Tensor, *, wait: bool) -> None:
        index = next(each for each in (self.index_of(target), self.index_of(source)) if each is not None)
        stream = self.current_stream(torch.device("cuda", index))
        self.touch()
        self.on_copy(len(self.copied))
        places = _Place.of(target), _Place.of(source.detach())
        hosts = [
            (place.address, place.stop)
            for place, tensor in zip(places, (target, source), strict=True)
            if self.index_of(tensor) is None and tensor.numel()
        ]
        for start, stop in hosts:
            self._check_border(start, stop)
        self.copied.append((places[0].address, places[1].address))
        torch.autograd.graph.increment_version(target)

        def move() -> None:
            if target_place.address != target_place.stop:
                _real_copy(target_place.tensor(), source_place.tensor())
            with self._lock:
                for each in hosts:
                    self._pending.remove(each)

        target_place, source_place = places
        with self._lock:
            self._pending += hosts
        stream.submit(move)
        if wait:
            stream.synchronize()

    def _check_border(self, start: int, stop: int) -> None:
        for address, nbytes in list(self.registered.items()):
            if address <= start < address + nbytes < stop:
                raise RuntimeError(INVALID)

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        self.asked_whether_pinned += 1
        return any(a <= tensor.data_ptr() < a + nbytes for a, nbytes in list(self.registered.items()))

    # --- what torch.cuda.cudart() has

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802
        self.touch()
        if self.refuses(address, nbytes):
            return 2
        self.pinned_by.add(threading.current_thread().name)
        if any(a < address + nbytes and address < a + n for a, n in self.registered.items()):
            return 712
        self.registered[address] = nbytes
        self.peak_registered = max(self.peak_registered, sum(self.registered.values()))
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        self.touch()
        if self.unregister_code:
            return self.unregister_code
        nbytes = self.registered.pop(address, None)
        if nbytes is None:
            return 713
        with self._lock:
            if any(start < address + nbytes and address < stop for start, stop in self._pending):
                self.violations.append("host memory was given back while a copy that uses it was queued")
        return 0

    def close(self) -> None:
        for stream in (*self.compute, *self.copies, *self._others):
            stream.close()


def install(patch: pytest.MonkeyPatch, count: int = 2) -> Driver:
    """Make torch's names lead to a double of so many devices."""
    importlib.import_module("torch._dynamo")  # has subclasses of what is replaced here
    driver = Driver(count)
    here = torch.device("cuda")

    def device_of(tensor: torch.Tensor) -> torch.device:
        index = driver.index_of(tensor)
        real: torch.device = _real_device.__get__(tensor)
        return real if index is None else torch.device("cuda", index)

    def get_device(tensor: torch.Tensor) -> int:
        index = driver.index_of(tensor)
        return -1 if index is None else index

    module = SimpleNamespace(
        Event=lambda **options: Event(torch.device("cuda", driver.thread.index), driver=driver),
        is_current_stream_capturing=driver.is_capturing,
    )
    patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: here)
    patch.setattr(torch.accelerator, "current_stream", driver.current_stream)
    patch.setattr(torch.accelerator, "current_device_index", lambda: driver.thread.index)
    patch.setattr(torch.accelerator, "set_device_index", driver.set_index)
    patch.setattr(torch.accelerator, "device_index", driver.device_index)
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "is_initialized", lambda: True)
    patch.setattr(torch.cuda, "cudart", lambda: driver)
    patch.setattr(torch, "get_device_module", lambda device=None: module)
    patch.setattr(torch, "Stream", driver.stream)
    patch.setattr(torch, "Event", lambda device, **options: Event(torch.device(device), driver=driver))
    patch.setattr(torch, "empty", driver.empty)
    patch.setattr(torch, "zeros", driver.zeros)
    patch.setattr(torch, "_foreach_copy_", driver.foreach_copy)
    patch.setattr(torch.Tensor, "copy_", lambda tensor, *args, **options: driver.copy(tensor, *args, **options))
    patch.setattr(torch.Tensor, "device", property(device_of))
    patch.setattr(torch.Tensor, "get_device", get_device)
    patch.setattr(torch.Tensor, "is_pinned", lambda tensor: driver.is_pinned(tensor))
    patch.setattr(torch.Tensor, "is_cpu", property(lambda tensor: device_of(tensor).type == "cpu"))
    patch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: device_of(tensor).type == "cuda"))
    patch.setattr("aiodcp._state.known_tensors.TensorGuards", None)  # C++, which asks no tensor for its `device`
    return driver
