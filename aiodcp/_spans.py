"""Which reads go together, and how what was read reaches its places.

Items that lie close together are one span, read into scratch memory and copied out in one go. A large tensor whose
place is contiguous host memory needs none of that: it is read straight into it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch

from ._arena import Arena
from ._capture import PLAIN_TENSORS
from ._chunks import cut
from ._dcp import gc_held_off
from ._decode import Check, unpack
from ._devices import DeviceCopies
from ._engine import Threads, in_thread
from ._layout import ALIGNMENT, NOT_COPIED, copyable
from ._reads import TensorRead
from .errors import LoadError

SPAN_NBYTES = 16 << 20  # bytes read in one go: as in saving, enough that the turn at the GIL after it does not count
GAP_NBYTES = 64 << 10  # bytes read for nothing rather than asked for apart: 30 us at 2 GB/s, the price of a request
DIRECT_NBYTES = 1 << 20  # bytes from which a tensor is read straight into its place


@dataclass(slots=True, kw_only=True)
class Span:
    """Neighbouring items of one file, read together: bytes `start` to `stop`."""

    file: str
    start: int
    stop: int
    items: list[Any]


class Scratch:
    """Memory for spans, used again and again within one load: memory that was touched before is quicker."""

    def __init__(self, threads: Threads, *, pin_for: torch.device | None) -> None:
        self._threads = threads
        self._pin_for = pin_for
        self._free: list[Arena] = []

    @asynccontextmanager
    async def take(self, nbytes: int) -> AsyncIterator[Arena]:
        large_enough = [arena for arena in self._free if arena.nbytes >= nbytes]
        if large_enough:
            arena = min(large_enough, key=attrgetter("nbytes"))
            self._free.remove(arena)
        else:
            self._free.clear()  # too small: not kept beside the larger one
            arena = await in_thread(self._threads.compute, self._make, max(nbytes, SPAN_NBYTES))
        yield arena
        self._free.append(arena)  # but not after a failure: a device may be using it

    def _make(self, nbytes: int) -> Arena:
        arena = Arena(nbytes)
        arena.pin(self._pin_for)
        return arena


def copy_in(span: Span, arena: Arena, check: Check, device_copies: DeviceCopies) -> None:
    """Check the items of a span that has been read into `arena`, and copy them to their targets."""
    memory = arena.memory
    typed: dict[torch.dtype, torch.Tensor] = {}
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    odd: list[tuple[TensorRead, torch.Tensor, torch.Tensor]] = []

    def as_typed(dtype: torch.dtype) -> torch.Tensor:
        if dtype not in typed:
            typed[dtype] = arena.tensor[: arena.nbytes // dtype.itemsize * dtype.itemsize].view(dtype)
        return typed[dtype]

    device_copies.enter_thread()
    with gc_held_off():
        for read in span.items:
            frame, dtype, into = read.frame, read.dtype, read.into
            offset = read.offset - span.start
            if frame is None:
                tensor = unpack(read, arena, offset, check)
            elif read.bare:
                assert read.part is not None
                rows, place = as_typed(dtype), offset // dtype.itemsize
                if offset % dtype.itemsize:  # in files of DCP's, where items begin anywhere
                    rows, place = arena.tensor[offset : offset + read.nbytes].clone().view(dtype), 0
                tensor = rows.as_strided(read.part[1], frame.strides, place)
            else:
                start = offset + len(frame.head)
                check.framed(read, frame.head_crc + offset, memory, memory[start : start + frame.nbytes])
                tensor = as_typed(dtype).as_strided(frame.shape, frame.strides, start // dtype.itemsize)
            if read.part is not None and not read.bare:
                tensor = cut(tensor, read.part)
            if dtype in NOT_COPIED:
                tensor, into = copyable(tensor), copyable(into)
            if into.is_conj() or into.is_neg() or type(into) not in PLAIN_TENSORS:  # no kernel for many knows those
                odd.append((read, into, tensor))
                continue
            sources.append(tensor)
            targets.append(into)
    for read, into, tensor in odd:
        try:
            with torch.no_grad():
                into.copy_(tensor)
        except Exception as error:
            raise LoadError(f"{read.fqn}: a {type(into).__name__} cannot be filled in place: {error!r}") from error
    if targets:
        try:  # before the memory is used again, and before the caller looks
            device_copies.wait_for(device_copies.copy(targets, sources))
        except BaseException:
            device_copies.drain(arena, targets)
            raise


def reads_direct(read: TensorRead) -> bool:
    return (
        read.frame is not None
        and read.nbytes >= DIRECT_NBYTES
        and (read.part is None or (read.bare and read.nbytes == read.into.nbytes))
        and type(read.into) in PLAIN_TENSORS
        and read.into.dtype is read.dtype
        and read.into.is_cpu
        and read.into.is_contiguous()
        and not read.into.is_neg()
        and not read.into.is_conj()
    )


def overlapping(reads: Sequence[TensorRead]) -> set[int]:
    """Return the ids of those whose memory another one writes, too: tied tensors are copied whole, when checked."""
    ranges = sorted(
        (str(read.into.device), read.into.data_ptr(), number)
        for number, read in enumerate(reads)
        if type(read.into) in PLAIN_TENSORS and read.into.layout is torch.strided
    )
    tied: set[int] = set()
    where, stop, last = "", 0, -1
    for device, start, number in ranges:
        if device == where and start < stop:
            tied |= {number, last}
        into = reads[number].into
        steps = sum((size - 1) * stride for size, stride in zip(into.shape, into.stride(), strict=True))
        end = start + into.itemsize * (1 + steps)
        if device != where or end > stop:
            where, stop, last = device, end, number
    return {id(reads[number]) for number in tied}


def spans_of(reads: Iterable[Any]) -> list[Span]:
    """Group reads that lie close together in one file."""
    spans: list[Span] = []
    for read in sorted(reads, key=attrgetter("file", "offset")):
        start, stop = read.offset // ALIGNMENT * ALIGNMENT, read.offset + read.nbytes
        if spans:
            last = spans[-1]
            if (
                read.file == last.file
                and start <= last.stop + GAP_NBYTES
                and max(stop, last.stop) - last.start <= SPAN_NBYTES
            ):
                last.stop = max(stop, last.stop)
                last.items.append(read)
                continue
        spans.append(Span(file=read.file, start=start, stop=stop, items=[read]))
    return spans
