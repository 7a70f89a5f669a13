"""Copies between devices and host memory, on streams of the library's own.

    caller's stream   ... compute | mark .................. wait for `copied` | optimizer step ...
    copy stream                   | wait for the mark | copy | copied

The caller's thread sets the marks and makes the streams: one that is made in another thread may turn out to be the
stream of the computation. Host tensors need none of this, and cost nothing here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ._mirror import Mirror, Tensors, copy_through
from .errors import ArgumentError

_HOST = {"cpu", "meta"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lane:
    """One device: the stream to copy on, and how far the caller's stream had come."""

    device: torch.device
    stream: torch.Stream
    mark: torch.Event


class Crossing:
    """The copies of one save or load.

    They see what the caller had computed, on its current streams, when the crossing was begun. The tensors must be kept
    until the copies are done: an allocator does not know of them.
    """

    def __init__(self, lanes: Sequence[Lane] = ()) -> None:
        self._lanes = lanes
        self._copied: list[torch.Event] = []
        self._lock = threading.Lock()  # a stream that is entered remembers in itself what to go back to

    def __bool__(self) -> bool:
        """Whether there are devices: then a copy is only queued when `copy` returns."""
        return bool(self._lanes)

    def start(self) -> None:
        """Make the copies wait, on their devices, for the marks."""
        for lane in self._lanes:
            lane.stream.wait_event(lane.mark)

    def copy(self, targets: Tensors, sources: Tensors) -> list[torch.Event]:
        """Copy from host to host at once; queue what comes from or goes to a device.

        Releases the GIL, once for all tensors.

        Returns:
            What to wait for.
        """
        if not self._lanes:
            with torch.no_grad():
                torch._foreach_copy_(targets, sources)
            return []
        with self._queue():
            torch._foreach_copy_(targets, sources, non_blocking=True)
        return self._copied

    @property
    def device(self) -> torch.device | None:
        """The device, if there is exactly one: then `mirror` and `copy_through` can be used."""
        return self._lanes[0].device if len(self._lanes) == 1 else None

    def mirror(self, nbytes: int) -> Mirror:
        """Take memory on the device, for this crossing and later ones."""
        with self._queue():  # the allocator gives it to the stream of the copies
            return Mirror(self._lanes[0].device, nbytes)

    def copy_through(
        self, memory: torch.Tensor, places: Tensors, stretch: torch.Tensor, targets: Tensors, sources: Tensors
    ) -> list[torch.Event]:
        """As `copy`, by way of a mirror: see there."""
        with self._queue():
            copy_through(memory, places, stretch, targets, sources)
        return self._copied

    @contextmanager
    def _queue(self) -> Iterator[None]:
        with torch.no_grad(), self._lock, ExitStack() as stack:
            for lane in self._lanes:
                stack.enter_context(lane.stream)
            yield
            self._copied = [_recorded(lane.device, lane.stream) for lane in self._lanes]

    def drain(self) -> None:
        """Block this thread until nothing that was queued is using memory any more."""
        wait_for(self._copied)

    def fence(self) -> None:
        """Make the current streams of this thread wait for the copies queued so far: on the devices, not here."""
        for lane, copied in zip(self._lanes, self._copied, strict=False):
            torch.accelerator.current_stream(lane.device).wait_event(copied)


def is_on_device(values: Iterable[Any]) -> bool:
    """Whether some tensor is not in host memory."""
    return any(isinstance(value, torch.Tensor) and value.device.type not in _HOST for value in values)


def wait_for(events: Iterable[torch.Event]) -> None:
    """Block this thread until all are reached. Releases the GIL."""
    for event in events:
        event.synchronize()


class CopyStreams:
    """The copy streams of one `Checkpointer`: one for each device that it has met."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.Stream] = {}

    def begin(self, values: Sequence[Any], fqns: Sequence[str]) -> Crossing:
        """Mark how far the caller's streams have come, on every device among `values`. In the caller's thread.

        Args:
            values: the leaves of a state dict, and what belongs to them.
            fqns: the names of the leaves.

        Raises:
            ArgumentError: a tensor is on a device that has no streams to copy on; names it.
        """
        accelerator = torch.accelerator.current_accelerator()
        if accelerator is None or (accelerator.type == "cuda" and not torch.cuda.is_initialized()):  # type: ignore[no-untyped-call]
            return Crossing()  # nothing can be on a device: 10,000 tensors need not be asked
        first: dict[torch.device, int] = {}
        for place, value in enumerate(values):
            if isinstance(value, torch.Tensor):
                first.setdefault(value.device, place)
        names = {device: fqns[min(place, len(fqns) - 1)] for device, place in first.items() if device.type not in _HOST}
        return Crossing([self._lane(device, names[device]) for device in sorted(names, key=str)])

    def _lane(self, device: torch.device, fqn: str) -> Lane:
        try:
            if device not in self._streams:
                self._streams[device] = torch.Stream(device)
            mark = _recorded(device, torch.accelerator.current_stream(device))
        except (RuntimeError, ValueError) as error:  # as torch says that a device has no streams, or is in a bad way
            problem = f"{fqn} is on {device}, which gives no stream to copy on: {error}"
            raise ArgumentError("state_dict", problem) from error
        return Lane(device=device, stream=self._streams[device], mark=mark)


def _recorded(device: torch.device, stream: torch.Stream) -> torch.Event:
    event = torch.Event(device, blocking=True)  # to wait for it must not spin on a core
    event.record(stream)
    return event
