"""Copies between devices and host memory, on streams of the library's own.

    caller's stream   ... compute | mark .................. wait for `copied` | optimizer step ...
    copy stream                   | wait for the mark | copy | copied

The caller's thread sets the marks and makes the streams: one that is made in another thread may turn out to be the
stream of the computation. The copies are queued, and waited for, in threads of the library. Those begin on device 0,
whatever the caller's device is, and a call would make a context there (half a gigabyte a rank): each takes the device
of its first lane before it calls. Host tensors need none of this, and cost nothing here.

The host waits by asking again and again, with pauses: `synchronize()` of an event keeps a core busy on CUDA, and has no
end when a device hangs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import compress
from operator import lt

import torch

from .._log import SafeLogger
from ..errors import ArgumentError, CaptureError, ClosedError, SaveError
from .activity import Activity
from .device_gather import Gather, GatherBuffer, TakenPart, Tensors, gather_and_copy
from .gil_fairness import AT_ONCE

log = SafeLogger(__name__)


# Seconds between two questions whether a device has come to an event: a twentieth of the time waited so far, in bounds.
POLL_S = 0.00005

POLL_AT_MOST_S = 0.002

UNKNOWN_S = 10.0  # for which a device may refuse to say how far it has come: while a graph is captured, it does

HOST = {"cpu", "meta"}

_in_use: list[object] = []  # memory that a device may still be reading or writing: never freed


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyLane:
    """One device: the stream to copy on, and how far the caller's stream had come."""

    device: torch.device
    stream: torch.Stream
    mark: torch.Event


class DeviceCopies:
    """The copies of one save or load.

    They see what the caller had computed, on its current streams, when they were begun. The tensors must be kept
    until the copies are done: an allocator does not know of them.
    """

    def __init__(self, lanes: Sequence[CopyLane] = (), streams: CopyStreams | None = None) -> None:
        self._lanes = lanes
        self._streams = streams or CopyStreams()
        self._copied: list[torch.Event] = []
        self._is_lost = False  # copies were queued, and no event after them
        self._marks_reached = not lanes

    def __bool__(self) -> bool:
        """Whether there are devices: then a copy is only queued when `copy` returns."""
        return bool(self._lanes)

    def _named(self) -> str:
        return ", ".join(str(lane.device) for lane in self._lanes)

    @property
    def first_device(self) -> torch.device | None:
        return self._lanes[0].device if self._lanes else None

    @property
    def device(self) -> torch.device | None:
        """The device, if there is exactly one: then `gather_buffer` and `gather` can be used."""
        return self._lanes[0].device if len(self._lanes) == 1 else None

    def add(self, devices: Collection[torch.device], name_on: Callable[[torch.device], str]) -> None:
        """Take in devices that were not known when the copies were begun. From any thread; blocks it.

        How far the caller's streams had come there is not known: all of their work is waited for.

        Raises:
            ArgumentError: as `CopyStreams.begin`.
        """
        for device in sorted((device for device in devices if device.type not in HOST), key=str):
            lane = self._streams.lane(device, name_on)
            torch.accelerator.synchronize(device)
            self._lanes = [*self._lanes, lane]
            self._marks_reached = False

    def start(self) -> None:
        """Make the copies wait, on their devices, for the marks."""
        self.enter_thread()
        for lane in self._lanes:
            lane.stream.wait_event(lane.mark)

    def copy(self, targets: Tensors, sources: Tensors) -> list[torch.Event]:
        """Copy from host to host at once; queue what comes from or goes to a device.

        Releases the GIL, once for all tensors of a kind.

        Returns:
            What to wait for.
        """
        if not self._lanes:
            self._copy_on_host(targets, sources)
            return []
        where = map(max, map(torch.Tensor.get_device, targets), map(torch.Tensor.get_device, sources))
        crosses = list(map(lt, [-1] * len(targets), where))  # a host tensor's device is -1
        stays = [not each for each in crosses]
        with self.queueing():
            if not any(stays):
                torch._foreach_copy_(targets, sources, non_blocking=True)
            elif any(crosses):
                crossing = [*compress(targets, crosses)], [*compress(sources, crosses)]
                torch._foreach_copy_(*crossing, non_blocking=True)
        self._copy_on_host([*compress(targets, stays)], [*compress(sources, stays)])
        return self._copied

    def _copy_on_host(self, targets: Tensors, sources: Tensors) -> None:
        if not targets:
            return
        # A copy from a device that is queued may be on its way to a host tensor. It is only queued, and not done at
        # once, if the tensor's memory is pinned.
        if not self._marks_reached and any(map(torch.Tensor.is_pinned, sources)):
            self.wait_for_marks()
        with torch.no_grad():
            for start in range(0, len(targets), AT_ONCE):
                torch._foreach_copy_(targets[start : start + AT_ONCE], sources[start : start + AT_ONCE])

    def gather_buffer(self, nbytes: int) -> GatherBuffer:
        """Take memory on the device, for these copies and later ones."""
        with self.queueing():  # the allocator gives it to the stream of the copies
            return GatherBuffer(self._lanes[0].device, nbytes)

    def gather(self, gather: Gather, sources: Tensors) -> list[torch.Event]:
        """As `copy`, by way of a gather buffer: see there."""
        self._copy_on_host(gather.host_targets, gather.pick_host(sources))
        with self.queueing():
            gather_and_copy(gather, sources)
        return self._copied

    def take_apart(self, whole: torch.Tensor, parts: Sequence[TakenPart], buffer: GatherBuffer) -> list[torch.Event]:
        """Queue what brings bytes to the device as a whole, and their parts from there to their places.

        Args:
            whole: the bytes, in host memory.
            parts: of them; each dtype with one kernel for hundreds of tensors.
            buffer: on the device; without memory the parts cross one by one.

        Returns:
            What to wait for.
        """
        with self.queueing():
            here = whole
            if buffer.memory is not None:
                here = buffer.memory[: whole.nbytes]
                here.copy_(whole, non_blocking=True)
            for part in parts:
                typed = here[: here.nbytes // part.dtype.itemsize * part.dtype.itemsize].view(part.dtype)
                sources = [
                    typed.as_strided(target.shape, target.stride(), start // part.dtype.itemsize)
                    for target, start in zip(part.targets, part.starts, strict=True)
                ]
                torch._foreach_copy_(part.targets, sources, non_blocking=True)
        return self._copied

    @contextmanager
    def queueing(self) -> Iterator[None]:
        """Queue what the block computes on the streams of the copies."""
        self.enter_thread()
        # A stream that is entered remembers in itself what to go back to: one thread at a time.
        with torch.no_grad(), self._streams.lock, ExitStack() as stack:
            for lane in self._lanes:
                stack.enter_context(lane.stream)
            self._is_lost = True
            try:
                yield
            finally:  # a copy that fails leaves those before it queued
                self._copied = [_recorded(lane.device, lane.stream) for lane in self._lanes]
                self._is_lost = False

    def wait_for(self, events: Iterable[torch.Event]) -> None:
        """Block this thread until all are reached.

        Raises:
            ClosedError: the `Checkpointer` was closed and did not want to wait any longer.
        """
        self.enter_thread()
        waiting = [event for event in events if not event.query()]
        if not waiting:
            return
        with self._streams.activity.doing(f"copies on {self._named()}"):
            began_s = time.monotonic()
            for event in waiting:
                while not event.query():
                    waited_s = time.monotonic() - began_s
                    if self._streams.given_up.wait(min(max(waited_s / 20, POLL_S), POLL_AT_MOST_S)):
                        raise ClosedError(f"gave up waiting for copies on {self._named()} after {waited_s:.0f} s")

    def wait_for_thread(self) -> None:
        """Block this thread until all that it has queued on streams of its own is done.

        Those are the devices' default streams, so that what is queued there for memory that was freed, and which this
        thread has taken for new tensors, is done then, too.
        """
        self.enter_thread()
        self.wait_for([_recorded(lane.device, torch.accelerator.current_stream(lane.device)) for lane in self._lanes])

    def wait_for_marks(self) -> None:
        """Block this thread until all that the caller had queued before is done."""
        self.wait_for(lane.mark for lane in self._lanes)
        self._marks_reached = True

    def drain(self, *memory: object) -> None:
        """Block this thread until nothing that was queued uses `memory` any more; what may be in use is never freed.

        Raises:
            ClosedError: as `wait_for`.
            RuntimeError: the device does not answer.
        """
        if not self._lanes:
            return
        until_s = time.monotonic() + UNKNOWN_S
        with self._streams.lock:  # another thread may be queueing just now
            copied, is_lost = self._copied, self._is_lost
        try:
            while True:
                try:
                    self.wait_for(copied)
                    break
                except RuntimeError:
                    if time.monotonic() > until_s or self._streams.given_up.wait(UNKNOWN_S / 100):
                        raise
            if is_lost:
                raise RuntimeError(f"{self._named()} does not report whether its copies are done")
        except BaseException:
            _in_use.extend(memory)
            log.error("%s may still access memory of the failed operation: that memory is never freed", self._named())
            raise

    def end(self) -> None:
        """Let go of all events: to free one in a forked child aborts it. Nothing is queued any more."""
        self._lanes, self._copied = [], []

    def fence(self) -> None:
        """Make the current streams of this thread wait for the copies queued so far: on the devices, not here.

        Raises:
            SaveError: one of them captures a graph.
        """
        for lane, copied in zip(self._lanes, self._copied, strict=False):
            with torch.accelerator.device_index(lane.device.index):
                if _is_capturing(lane.device):
                    raise SaveError(
                        f"the current stream of {lane.device} captures a graph, in which it cannot wait for copies: "
                        "capture before the save, or when `staged` is reached"
                    )
                torch.accelerator.current_stream(lane.device).wait_event(copied)

    def enter_thread(self) -> None:
        """Make the device of the first lane this thread's own: it is a thread of the library."""
        if self._lanes:
            torch.accelerator.set_device_index(self._lanes[0].device.index)


class CopyStreams:
    """The copy streams of one `Checkpointer`: one for each device that it has met.

    Attributes:
        lock: to be held by whoever enters one of them.
        activity: keeps what is waited for.
        given_up: set when waiting is given up.
    """

    def __init__(self, activity: Activity | None = None, given_up: threading.Event | None = None) -> None:
        self.lock: threading.Lock = threading.Lock()
        self.activity: Activity = activity or Activity()
        self.given_up: threading.Event = given_up or threading.Event()
        self._streams: dict[torch.device, torch.Stream] = {}
        self._making = threading.Lock()

    def begin(self, devices: Collection[torch.device], name_on: Callable[[torch.device], str]) -> DeviceCopies:
        """Mark how far the caller's streams have come, on every device. In the caller's thread.

        Args:
            devices: where the tensors are, in host memory or not.
            name_on: returns the name of one that is on a device.

        Raises:
            ArgumentError: a tensor is on a device that has no streams to copy on; names it.
            CaptureError: a tensor is on a device whose current stream captures a graph; names it.
        """
        others = sorted((device for device in devices if device.type not in HOST), key=str)
        return DeviceCopies([self.lane(device, name_on) for device in others], self)

    def lane(self, device: torch.device, name_on: Callable[[torch.device], str]) -> CopyLane:
        """Mark how far the current stream of this thread has come on a device; raises what `begin` raises."""
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None or accelerator.type != device.type:
            problem = f"{name_on(device)} is on {device}, which is not torch's current accelerator"
            raise ArgumentError("state_dict", problem)
        try:
            with torch.accelerator.device_index(device.index):
                if _is_capturing(device):
                    problem = f"is on {device}, whose current stream captures a graph: save or load before or after"
                    raise CaptureError(name_on(device), problem)
                with self._making:  # the callers of two loads may be two threads
                    if device not in self._streams:
                        self._streams[device] = torch.Stream(device)
                mark = _recorded(device, torch.accelerator.current_stream(device))
        except (RuntimeError, ValueError) as error:  # as torch says that there are no streams, or a device is ill
            problem = f"{name_on(device)} is on {device}, on which no stream can be created: {error}"
            raise ArgumentError("state_dict", problem) from error
        return CopyLane(device=device, stream=self._streams[device], mark=mark)


def _is_capturing(device: torch.device) -> bool:
    """Whether the current stream of a device, which is the current one, captures a graph."""
    ask = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    return ask is not None and bool(ask())


def _recorded(device: torch.device, stream: torch.Stream) -> torch.Event:
    event = torch.Event(device)
    event.record(stream)
    return event
